"""What `convert --to gguf` writes: read back with the format's own library, and (where it is built) run by llama.cpp."""

import base64
import dataclasses
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from shapes import K2_SHAPES, K3, LINEAR, lively, shape

from tidelock.models import Batch, TransformerLM, preset, save_checkpoint
from tidelock.models.config import Yarn
from tidelock.models.hf import convert, save_hf
from tidelock.models.hf.gguf import entries, llama_options
from tidelock.models.hf.gguf_vocab import last_merge, read_vocabulary
from tidelock.models.hf.shards import Shards
from tidelock.tokens.errors import UserError
from tidelock.tokens.tokenizer import SPECIALS, BPETokenizer

gguf = pytest.importorskip("gguf", reason="the writer is an optional part: pip install 'tidelock[gguf]'")

LINEAR = dataclasses.replace(LINEAR, kda_num_heads=4)
SHAPES = {"k2": K2_SHAPES["query rank and YaRN"], "kimi linear": LINEAR,
          "k3": shape("nano-k3", kda_num_heads=4, kda_head_dim=16, routed_expert_hidden_size=32, attn_res_block_size=2)}  # fmt: skip


def read(path):
    reader = gguf.GGUFReader(path)
    tensors = {t.name: torch.from_numpy(np.array(t.data)).view(*map(int, reversed(t.shape))) for t in reader.tensors}
    return {name: field.contents() for name, field in reader.fields.items()}, tensors


@pytest.fixture(scope="module", params=SHAPES)
def written(request, tmp_path_factory):
    """(config, fields, GGUF tensors, published tensors) of a model in which every weight matters."""
    path, config = tmp_path_factory.mktemp("gguf"), SHAPES[request.param]
    model = lively(config)
    save_checkpoint(path / "ours", model)
    save_hf(model, path / "hf")
    shards = Shards(path / "hf")
    convert(path / "ours", path / "a.gguf", "gguf")
    convert(path / "hf", path / "b.gguf", "gguf")
    fields, tensors = read(path / "a.gguf")
    again = read(path / "b.gguf")[1]
    assert again.keys() == tensors.keys() and all(torch.equal(again[n], tensors[n]) for n in tensors)
    prefix = "language_model." if request.param == "k3" else ""
    return config, fields, tensors, lambda name: shards.read(f"{prefix}model.{name}")


def test_experts_are_stacked_and_kv_b_is_split_with_its_keys_transposed(written):
    c, _, tensors, published = written
    block, names = ("mlp", ("gate_proj", "up_proj", "down_proj")) if "kda" not in c.mixers else ("block_sparse_moe", ("w1", "w3", "w2"))
    for theirs, name in zip(("gate", "up", "down"), names):
        stacked = torch.stack([published(f"layers.1.{block}.experts.{e}.{name}.weight") for e in range(c.n_routed_experts)])
        assert torch.equal(tensors[f"blk.1.ffn_{theirs}_exps.weight"], stacked)
    i = c.mixers.index("mla")
    kv_b = published(f"layers.{i}.self_attn.kv_b_proj.weight").view(c.num_attention_heads, -1, c.kv_lora_rank)
    k, v = kv_b.split([c.qk_nope_head_dim, c.v_head_dim], dim=1)
    assert torch.equal(tensors[f"blk.{i}.attn_k_b.weight"], k.transpose(1, 2))
    assert torch.equal(tensors[f"blk.{i}.attn_v_b.weight"], v)
    if "kda" in c.mixers:
        j = c.mixers.index("kda")
        decay = published(f"layers.{j}.self_attn.A_log").flatten()[: c.kda_num_heads]
        assert torch.equal(tensors[f"blk.{j}.ssm_a"].flatten(), -decay.exp())
        conv = published(f"layers.{j}.self_attn.k_conv1d.weight")
        assert torch.equal(tensors[f"blk.{j}.ssm_conv1d_k.weight"].flatten(), conv.flatten())


def test_every_weight_of_the_model_is_in_the_file(written):
    c, fields, tensors, _ = written
    used = {name for entry in entries(c) for name in entry.of}
    assert used == TransformerLM(c, seed=None).state_dict().keys()
    arch = fields["general.architecture"]
    assert fields[f"{arch}.block_count"] == c.num_layers and fields[f"{arch}.expert_gating_func"] == 2
    assert fields[f"{arch}.expert_weights_scale"] == pytest.approx(c.routed_scaling_factor)
    assert fields[f"{arch}.leading_dense_block_count"] == c.ffns.count("dense")
    assert tensors["output.weight"].shape == (c.vocab_size, c.hidden_size)


@pytest.mark.parametrize("format", ["int4", "mxfp4"])
def test_experts_trained_to_be_four_bits_go_out_as_they_compute(tmp_path, format):
    model = lively(dataclasses.replace(SHAPES["k2"], expert_format=format))
    save_checkpoint(tmp_path / "ours", model)
    _, tensors = read(convert(tmp_path / "ours", tmp_path / "m.gguf", "gguf"))
    with torch.no_grad():
        w_in, w_out = model.layers[1].mlp.served(torch.zeros(1))
    assert torch.equal(tensors["blk.1.ffn_down_exps.weight"], w_out.transpose(1, 2))
    assert torch.equal(tensors["blk.1.ffn_gate_exps.weight"], w_in[:, :, :32].transpose(1, 2))
    assert not torch.equal(w_out, model.layers[1].mlp.w_out)


@pytest.mark.parametrize("dtype,kind", [("float16", torch.float16), ("bfloat16", torch.bfloat16)])
def test_half_precision_rounds_matrices_and_leaves_the_islands_and_fp16_rounds_experts_alone(tmp_path, dtype, kind):
    model = lively(LINEAR)
    save_checkpoint(tmp_path / "ours", model)
    reader = gguf.GGUFReader(convert(tmp_path / "ours", tmp_path / "half.gguf", "gguf", dtype))
    assert reader.fields["general.file_type"].contents() == (1 if kind is torch.float16 else 32)
    stored = {t.name: t.tensor_type.name for t in reader.tensors}
    experts = {stored[f"blk.1.ffn_{n}_exps.weight"] for n in ("gate", "up", "down")}
    assert experts == {"F16" if kind is torch.float16 else "BF16"}
    names = ("blk.0.attn_q", "blk.0.ssm_f_a", f"blk.{LINEAR.mixers.index('mla')}.attn_k_b", "blk.0.ffn_down", "output")
    assert {stored[f"{n}.weight"] for n in names} == {"F32" if kind is torch.float16 else "BF16"}
    assert {stored[f"blk.1.{n}"] for n in ("ffn_gate_inp.weight", "exp_probs_b.bias", "attn_norm.weight")} == {"F32"}
    assert stored["blk.0.ssm_conv1d_q.weight"] == stored["blk.0.ssm_a"] == "F32"
    raw = next(t for t in reader.tensors if t.name == "blk.1.ffn_up_exps.weight").data
    got = torch.from_numpy(np.array(raw)).view(torch.uint8).view(kind).view(8, 32, 64)
    assert torch.equal(got, model.layers[1].mlp.w_in[:, :, 32:].transpose(1, 2).to(kind))


@pytest.mark.parametrize("config,words", [
    (shape("nano-k2", rope_scaling=Yarn(8.0, 256, 32.0, 1.0, 0.7, 1.0)), "rope_scaling"),
    (shape("nano-k2", mixers=("mla",) * 27, ffns=("dense",) + ("moe",) * 26, q_lora_rank=16), "q_lora_rank"),
    (K3, "kda_num_heads"),
    (shape("nano-k3", kda_num_heads=4, hidden_act="silu"), "hidden_act"),
])  # fmt: skip
def test_what_llama_cannot_say_is_refused_before_anything_is_written(tmp_path, config, words):
    save_checkpoint(tmp_path / "ours", TransformerLM(config, seed=None))
    with pytest.raises(UserError, match=words):
        convert(tmp_path / "ours", tmp_path / "x.gguf", "gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["ours"]


def test_an_interrupted_export_leaves_no_half_file(tmp_path):
    save_checkpoint(tmp_path / "ours", TransformerLM(LINEAR, seed=0))

    def interrupt(done, total):
        if done == total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "ours", tmp_path / "x.gguf", "gguf", on_tensor=interrupt)
    assert [p.name for p in tmp_path.iterdir()] == ["ours"]


def test_llama_is_told_the_betas_it_does_not_read():
    k2 = K2_SHAPES["query rank and YaRN"]
    assert llama_options(k2) == ["--yarn-beta-fast", "1", "--yarn-beta-slow", "1"]
    assert llama_options(dataclasses.replace(k2, rope_scaling=Yarn(8.0, 64))) == llama_options(LINEAR) == []


def test_our_tokenizer_keeps_its_ids_and_its_merges_remake_every_token(tmp_path):
    tokenizer = BPETokenizer.train(['message role="user" twelve times seven is eighty-four ' * 20, "Tag: é 12"], 340)
    tokenizer.save(tmp_path / "run" / "tokenizer")
    checkpoint = tmp_path / "run" / "checkpoints" / "a"
    save_checkpoint(checkpoint, TransformerLM(preset("nano-k2", tokenizer.vocab_size + 6), seed=None))
    fields, _ = read(convert(checkpoint, tmp_path / "a.gguf", "gguf"))
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert tokens[tokenizer.base : tokenizer.base + len(SPECIALS)] == list(SPECIALS)
    assert tokens[-6:] == [f"[PAD{tokenizer.vocab_size + i}]" for i in range(6)]
    assert types == [1] * tokenizer.base + [3] * len(SPECIALS) + [5] * 6
    assert tokens[fields["tokenizer.ggml.eos_token_id"]] == "<|end_of_msg|>"
    made = {a + b for a, b in (m.split(" ") for m in fields["tokenizer.ggml.merges"])}
    assert made == {t for t in tokens[: tokenizer.base] if len(t) > 1} and made
    with pytest.raises(UserError, match="ids but the model's vocabulary is 300"):
        read_vocabulary(tmp_path / "run" / "tokenizer", 300)


def test_k2s_ranks_become_merges(tmp_path):
    words = [bytes([b]) for b in range(256)] + [b"th", b"in", b"the", b"thin", b"thing"]
    (tmp_path / "tiktoken.model").write_text("".join(f"{base64.b64encode(w).decode()} {i}\n" for i, w in enumerate(words)))
    named = {"261": {"content": "[BOS]"}, "262": {"content": "<|im_end|>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": named}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 262}))
    found = read_vocabulary(tmp_path, 264)
    assert found.merges == ["t h", "i n", "th e", "th in", "thin g"]
    assert found.pre == "kimi-k2" and found.eos == 262 and found.tokens[261:] == ["[BOS]", "<|im_end|>", "[PAD263]"]


def test_a_token_no_pair_makes_has_no_merge():
    ranks = {b"a": 0, b"b": 1, b"c": 2, b"abc": 3}
    assert last_merge(b"abc", ranks) is None


def llama():
    spec = importlib.util.spec_from_file_location("llama", Path(__file__).parents[2] / "benchmarks" / "llama.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(llama().find_server() is None, reason="no llama-server: build it as benchmarks/llama.py says, or set $TIDELOCK_LLAMA")
@pytest.mark.parametrize("name", SHAPES)
def test_llama_continues_ids_as_our_forward_does(tmp_path, name):
    """Twelve greedy tokens; what benchmarks/agreement.py does for 200 prompts of 64."""
    config = dataclasses.replace(SHAPES[name], vocab_size=320)
    model = TransformerLM(config, seed=0).eval()
    save_checkpoint(tmp_path / "m", model)
    file = convert(tmp_path / "m", tmp_path / "m.gguf", "gguf")
    rng = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, 256, (n,), generator=rng).tolist() for n in (3, 8, 17, 40)]
    ends = {i for i, text in enumerate(read_vocabulary(None, 320).tokens) if text in ("<|end_of_msg|>", "<|im_end|>")}

    def greedy(ids):
        ids, out = list(ids), []
        with torch.no_grad():
            while len(out) < 12:
                batch = Batch(torch.tensor(ids), torch.tensor([0, len(ids)], dtype=torch.int32), torch.zeros(1, dtype=torch.int32))
                token = int(model.logits(model(batch)[-1:]).argmax())
                if token in ends:
                    break
                ids.append(token)
                out.append(token)
        return out

    peer = llama()
    with peer.llama_server(peer.find_server(), file, options=(*peer.PLAIN, *llama_options(config))) as url:
        for prompt in prompts:
            assert peer.complete(url, prompt, 12) == greedy(prompt)


def test_the_command_writes_the_file_and_says_how_to_serve_it(tmp_path, capsys):
    from tidelock.cli.main import main

    save_checkpoint(tmp_path / "m", TransformerLM(SHAPES["k2"], seed=0))
    argv = ["models", "convert", str(tmp_path / "m"), str(tmp_path / "m.gguf"), "--to", "gguf", "--dtype", "float16"]
    assert main(argv) == 0
    assert f"llama-server -m {tmp_path / 'm.gguf'} --yarn-beta-fast 1 --yarn-beta-slow 1" in capsys.readouterr().out
    assert main(argv) == 2 and "exists" in capsys.readouterr().err
    assert main([*argv[:3], str(tmp_path / "q.gguf"), "--to", "gguf", "--quantize", "int4"]) == 2
    assert "llama-quantize" in capsys.readouterr().err
