"""Published layouts against other implementations: `transformers` where it has the class, and our own laws elsewhere."""

import dataclasses
import json
import os
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from shapes import K2_SHAPES, K3, LINEAR, any_configs, batch, decoded, lively  # noqa: E402

from tidelock.models import TransformerLM, load_checkpoint, ops, preset, save_checkpoint  # noqa: E402
from tidelock.models.config import ModelConfig  # noqa: E402
from tidelock.models.hf import convert, from_hf, load_hf, save_hf, to_hf  # noqa: E402
from tidelock.models.hf.config import layout_of  # noqa: E402
from tidelock.models.hf.names import parts  # noqa: E402
from tidelock.models.hf.shards import INDEX, Shards  # noqa: E402
from tidelock.tokens.errors import UserError  # noqa: E402

def their_model(path, kind):
    transformers = pytest.importorskip("transformers")
    cls = {"deepseek_v3": transformers.DeepseekV3ForCausalLM, "kimi_linear": transformers.KimiLinearForCausalLM}[kind]
    model, info = cls.from_pretrained(path, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    return model.eval()


def with_query_rank(config, rank):
    return dataclasses.replace(config, q_lora_rank=rank)


THEIR_SHAPES = {f"{name}, query rank {rank}": with_query_rank(c, rank) for name, c in K2_SHAPES.items() for rank in (None, 48)}


@pytest.mark.parametrize("config", [*THEIR_SHAPES.values(), LINEAR], ids=[*THEIR_SHAPES, "kimi linear"])
@pytest.mark.parametrize("weights", ["initial", "lively"])
def test_what_we_write_loads_in_transformers_and_gives_the_same_logits_and_gradients(tmp_path, config, weights):
    """2e-5 on every logit of 512 tokens, and the gradient of every parameter; lively weights make logits of 5 to 10, so
    there it is 2e-5 of the largest. What is cached and fed in pieces gives the very bits of the whole."""
    model = TransformerLM(config, seed=3) if weights == "initial" else lively(config)
    theirs = their_model(save_hf(model, tmp_path / "m"), layout_of(config))
    b = batch(512)
    ours, other = model.logits(model(b)), theirs(b.ids[None]).logits[0]
    scale = 1.0 if weights == "initial" else float(other.detach().abs().max())
    assert (ours - other).abs().max() <= 2e-5 * scale
    coefficients = torch.randn(ours.shape, generator=torch.Generator().manual_seed(9)) / ours.numel() ** 0.5
    (ours * coefficients).sum().backward()
    (other * coefficients).sum().backward()
    compare_gradients(model, theirs)
    for chunks in ([512], [200, 1, 1, 310], [509, 1, 1, 1]):
        cached = decoded(model.eval(), b.ids, chunks)
        assert (cached - other).abs().max() <= 2e-5 * scale
        assert torch.equal(cached, ours.detach()) or not ops.exact(), chunks


def published_gradients(theirs):
    """The gradients of a transformers model by our tests' short names: its fused tensors taken apart again."""
    for name, p in theirs.named_parameters():
        name = name.replace(".forget_gate.", ".")
        if name.endswith("experts.gate_up_proj"):
            for e, (gate, up) in enumerate(g.chunk(2) for g in p.grad):
                yield name.replace("gate_up_proj", f"{e}.gate_proj"), gate
                yield name.replace("gate_up_proj", f"{e}.up_proj"), up
        elif name.endswith("experts.down_proj"):
            yield from ((name.replace("down_proj", f"{e}.down_proj"), g) for e, g in enumerate(p.grad))
        elif name.endswith("self_attn.conv1d.weight"):
            yield from ((name.replace("conv1d", f"{kind}_conv1d"), g) for kind, g in zip("qkv", p.grad.chunk(3)))
        else:
            yield name.removesuffix(".weight"), p.grad


def compare_gradients(model, theirs):
    """Every published tensor's gradient: ours through its view of our tensor, theirs by name."""
    short = {"block_sparse_moe": "mlp", ".w1": ".gate_proj", ".w3": ".up_proj", ".w2": ".down_proj"}
    theirs = {n.removesuffix(".weight"): g for n, g in published_gradients(theirs)}
    mine, compared = {n: p.grad for n, p in model.named_parameters()}, 0
    for part in (p for p in parts(model.config) if p.native in mine):  # the router's bias has no gradient
        name = part.name.removesuffix(".weight")
        for long, ours in short.items():
            name = name.replace(long, ours)
        a, g = part.view(mine[part.native]).reshape(-1), theirs.pop(name).reshape(-1)
        assert (a - g).norm() <= 1e-4 * g.norm() + 1e-9, name
        compared += a.numel()
    assert compared == sum(p.numel() for p in model.parameters()) and not theirs


@pytest.mark.parametrize("config", [K2_SHAPES["query rank and YaRN"], LINEAR], ids=["k2", "kimi linear"])
def test_what_transformers_writes_loads_here(tmp_path, config):
    transformers = pytest.importorskip("transformers")
    data = to_hf(config)
    if data["model_type"] == "kimi_linear":
        theirs = transformers.KimiLinearForCausalLM(transformers.KimiLinearConfig(**data))
    else:
        theirs = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**data))
    theirs.save_pretrained(tmp_path / "m")
    model, b = load_hf(tmp_path / "m"), batch(64)
    with torch.no_grad():
        torch.testing.assert_close(model.logits(model(b)), theirs.eval()(b.ids[None]).logits[0], rtol=2e-5, atol=2e-5)


@settings(max_examples=20, deadline=None)
@given(any_configs(published=True), st.integers(0, 99))
def test_any_shape_goes_out_and_comes_back_the_same(tmp_path_factory, config, seed):
    model, path = lively(config, seed), tmp_path_factory.mktemp("hf")
    save_hf(model, path / "m", max_shard_bytes=60_000)
    again = load_hf(path / "m")
    assert to_hf(again.config) == to_hf(config)  # `to_hf` itself refuses to lose a field that matters
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values()):
        assert torch.equal(a, b), name
    save_checkpoint(path / "ours", model)
    convert(path / "ours", path / "a", max_shard_bytes=60_000)
    written, converted = Shards(path / "m"), Shards(path / "a")
    for name in written.entries:
        assert torch.equal(converted.read(name), written.read(name)), name
    convert(path / "a", path / "back", to="tidelock")
    for (name, a), b in zip(model.state_dict().items(), load_checkpoint(path / "back").state_dict().values()):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("name", ["k2", "k2-thinking", "kimi-linear-48b", "k3", "moonlight-16b", "small-k2", "small-k3"])
def test_presets_survive_their_published_config(name):
    config = preset(name)
    back = from_hf(json.loads(json.dumps(to_hf(config))), name)
    assert layout_of(back) == layout_of(config)
    assert to_hf(back) == to_hf(config)


def test_k3_names_are_the_published_ones(tmp_path):
    save_hf(lively(K3), tmp_path / "m", dtype="bfloat16")
    entries = Shards(tmp_path / "m").entries
    layer = "language_model.model.layers.1."
    for name in ("self_attention_res_norm.weight", "mlp_res_proj.weight", "self_attn.q_conv1d.weight", "self_attn.A_log",
                 "self_attn.g_proj.weight", "block_sparse_moe.gate.e_score_correction_bias",
                 "block_sparse_moe.routed_expert_norm.weight", "block_sparse_moe.experts.7.w2.weight",
                 "block_sparse_moe.shared_experts.gate_proj.weight"):  # fmt: skip
        assert layer + name in entries, name
    assert "language_model.lm_head.weight" in entries and "language_model.model.output_attn_res_proj.weight" in entries
    assert entries[layer + "self_attn.A_log"].shape == (128,)  # 3 heads and padding
    for island in ("self_attn.A_log", "self_attn.dt_bias", "self_attn.k_conv1d.weight", "self_attn.o_norm.weight",
                   "block_sparse_moe.gate.e_score_correction_bias"):  # fmt: skip
        assert entries[layer + island].dtype == torch.float32, island
    assert entries[layer + "self_attn.q_proj.weight"].dtype == torch.bfloat16


@pytest.fixture
def published(tmp_path):
    return save_hf(lively(K2_SHAPES["plain"]), tmp_path / "m", max_shard_bytes=100_000)


def test_shards_are_read_by_the_library_too(published):
    index = json.loads((published / INDEX).read_text())
    together = {name: t for file in set(index["weight_map"].values()) for name, t in load_file(published / file).items()}
    assert together.keys() == Shards(published).entries.keys()
    assert all(torch.equal(t, Shards(published).read(name)) for name, t in together.items())


@pytest.mark.parametrize("keep", [4, 200, -3])
def test_a_truncated_shard_is_named(published, keep):
    victim = sorted(published.glob("*.safetensors"))[1]
    victim.write_bytes(victim.read_bytes()[:keep])
    with pytest.raises(UserError, match=victim.name):
        load_hf(published)
    with pytest.raises(UserError, match=victim.name):
        convert(published, published.parent / "out", to="tidelock")
    assert sorted(p.name for p in published.parent.iterdir()) == ["m"]


def test_a_missing_tensor_a_wrong_shape_and_an_unknown_model_are_named(published, tmp_path):
    config = json.loads((published / "config.json").read_text())

    def with_config(**changes):
        (published / "config.json").write_text(json.dumps({**config, **changes}))

    with_config(n_routed_experts=9)
    with pytest.raises(UserError, match=r"lacks tensor 'model.layers.1.mlp.experts.8.gate_proj.weight'"):
        load_hf(published)
    with_config(vocab_size=97)
    with pytest.raises(UserError, match=r"'model.embed_tokens.weight' is \[96, 64\], the config asks for \[97, 64\]"):
        load_hf(published)
    for changes, words in (({"model_type": "gpt9"}, "unknown model_type 'gpt9'"), ({"n_group": 8}, "n_group = 8"),
                           ({"hidden_size": "x"}, "config.json"), ({"rope_scaling": {"type": "linear"}}, "linear")):
        with_config(**changes)
        with pytest.raises(UserError, match=words):
            load_hf(published)
    (published / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json is not JSON"):
        load_hf(published)
    with pytest.raises(UserError, match="does not exist"):
        load_hf(tmp_path / "nowhere")


def test_a_crash_while_writing_leaves_the_old_checkpoint(published, monkeypatch):
    before = {p.name: p.read_bytes() for p in published.iterdir()}
    module = sys.modules["tidelock.models.hf.convert"]
    monkeypatch.setattr(module, "write_shards", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError):
        save_hf(lively(K2_SHAPES["plain"], 3), published)
    assert {p.name: p.read_bytes() for p in published.iterdir()} == before
    assert [p.name for p in published.parent.iterdir()] == ["m"]


def test_configs_without_a_layout_say_so():
    with pytest.raises(UserError, match="no published layout"):
        to_hf(dataclasses.replace(K3, mla_use_nope=False))


def test_from_dict_still_reads_what_to_dict_writes():
    for config in (*K2_SHAPES.values(), LINEAR, K3):
        assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
