"""Published layouts against other implementations: `transformers` where it has the class, and our own laws elsewhere."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

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
                           ({"quantization_config": {"quant_method": "gptq"}}, "'gptq' and format None is not supported"),
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


def fp8_checkpoint(path, config):
    """A K2-layout checkpoint whose linear layers are FP8 in blocks of 128 x 128 (K2 Instruct), and the values it stands for."""
    source = Shards(save_hf(lively(config), path / "plain"))
    stored, meant = {}, {}
    for name in source.entries:
        w = stored[name] = meant[name] = source.read(name)
        if w.dim() == 2 and not any(part in name for part in ("embed_tokens", "lm_head", "mlp.gate.weight")):
            meant[name], scales = w.clone(), torch.zeros(-(-w.shape[0] // 128), -(-w.shape[1] // 128))
            stored[name] = torch.zeros(w.shape, dtype=torch.float8_e4m3fn)
            for i in range(scales.shape[0]):
                for j in range(scales.shape[1]):
                    block = (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
                    scales[i, j] = w[block].abs().max() / 448
                    stored[name][block] = (w[block] / scales[i, j]).to(torch.float8_e4m3fn)
                    meant[name][block] = stored[name][block].float() * scales[i, j]
            stored[f"{name}_scale_inv"] = scales
    (path / "fp8").mkdir()
    save_file(stored, path / "fp8" / "model.safetensors")
    fp8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    (path / "fp8" / "config.json").write_text(json.dumps({**to_hf(config), "quantization_config": fp8}))
    return path / "fp8", meant


def test_fp8_blocks_are_read(tmp_path):
    config = dataclasses.replace(K2_SHAPES["query rank and YaRN"], hidden_size=192, intermediate_size=320, kv_lora_rank=136)
    directory, meant = fp8_checkpoint(tmp_path, config)
    state = load_hf(directory).state_dict()
    for part in parts(config):
        torch.testing.assert_close(part.view(state[part.native]), meant[part.name], rtol=1e-6, atol=0)
    tensors = load_file(directory / "model.safetensors")
    victim = "model.layers.1.self_attn.o_proj.weight_scale_inv"
    for change, words in ((lambda t: t.pop(victim), "lacks tensor"), (lambda t: t.update({victim: torch.ones(1, 1)}), "needs")):
        damaged = dict(tensors)
        change(damaged)
        save_file(damaged, directory / "model.safetensors")
        with pytest.raises(UserError, match=words) as e:
            load_hf(directory)
        assert victim in str(e.value)


def test_a_tensor_that_has_no_place_is_named_and_a_vision_tower_is_left_alone(tmp_path):
    directory = save_hf(lively(K3), tmp_path / "m")
    tensors = load_file(directory / "model.safetensors")
    tensors |= {"vision_tower.blocks.0.weight": torch.ones(3), "mm_projector.0.bias": torch.ones(3),
                "language_model.model.layers.4.eh_proj.weight": torch.ones(3)}  # fmt: skip
    save_file(tensors, directory / "model.safetensors")
    assert torch.equal(load_hf(directory).lm_head.weight, tensors["language_model.lm_head.weight"])
    stranger = "language_model.model.layers.1.self_attn.g_b_proj.bias"
    save_file(tensors | {stranger: torch.ones(3)}, directory / "model.safetensors")
    with pytest.raises(UserError, match=f"model.safetensors: tensor '{stranger}' has no place"):
        load_hf(directory)
    with pytest.raises(UserError, match=stranger):
        convert(directory, tmp_path / "out", to="tidelock")
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("damage,words", [
    (lambda t: t.pop("model.layers.2.mlp.experts.3.down_proj.weight_scale"), "lacks tensor"),
    (lambda t: t.update({"model.layers.2.mlp.experts.3.down_proj.weight_scale": torch.ones(2, 2)}), "do not fit"),
    (lambda t: t.pop("model.layers.2.mlp.experts.3.down_proj.weight_packed"), "lacks tensor"),
])  # fmt: skip
def test_damaged_packed_weights_are_named_and_leave_nothing(tmp_path, damage, words):
    directory = save_hf(lively(K2_SHAPES["plain"]), tmp_path / "m", quantize="int4")
    tensors = load_file(directory / "model.safetensors")
    damage(tensors)
    save_file(tensors, directory / "model.safetensors")
    for read in (load_hf, lambda p: convert(p, tmp_path / "out", to="tidelock"), lambda p: convert(p, tmp_path / "out")):
        with pytest.raises(UserError, match=words) as e:
            read(directory)
        assert "model.layers.2.mlp.experts.3.down_proj.weight" in str(e.value)
        assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_conversion_holds_less_than_the_largest_layer_and_a_tenth():
    """Measured in a process of its own, all ways, against the fp32 size of the largest layer."""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "benchmarks/convert_memory.py", "--experts", "16", "--json"], cwd=root, text=True,
                          env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, check=True)  # fmt: skip
    rows = json.loads(done.stdout)
    assert len(rows) >= 4
    assert all(row["peak_mib"] <= 1.1 * row["largest_layer_mib"] for row in rows), rows


def test_the_text_tower_of_a_multimodal_k2_is_read(tmp_path):
    """K2.5 to K2.7: a wrapper's config and a prefix around K2."""
    model = lively(K2_SHAPES["query rank and YaRN"])
    plain = Shards(save_hf(model, tmp_path / "m"))
    tensors = {f"language_model.{n}": plain.read(n) for n in plain.entries} | {"vision_tower.patch_embed.weight": torch.ones(2)}
    (tmp_path / "k25").mkdir()
    save_file(tensors, tmp_path / "k25" / "model.safetensors")
    config = {"model_type": "kimi_k25", "text_config": {**to_hf(model.config), "model_type": "kimi_k2"}, "vision_config": {}}
    (tmp_path / "k25" / "config.json").write_text(json.dumps(config))
    state = load_hf(tmp_path / "k25").state_dict()
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
