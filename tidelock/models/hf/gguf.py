"""A checkpoint as one GGUF file, which llama.cpp loads: archs `deepseek2`, `kimi-linear` and `kimi-k3`.

A GGUF tensor is made from one or two of ours: experts stay stacked, kv_b is split and its key half transposed (llama.cpp
attends in the latent space as we do), -exp(A_log) is folded in. What an arch cannot say is refused before anything is
written. Names and keys are those that llama.cpp reads (llama-arch.cpp, as vendored by llama-cpp-python 0.3.36).
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tidelock.tokens.errors import UserError

from .. import quant
from ..config import ModelConfig
from .config import layout_of, to_hf
from .gguf_vocab import Vocabulary

ARCHS = {"deepseek_v3": "deepseek2", "kimi_linear": "kimi-linear", "kimi_k3": "kimi-k3"}
SIGMOID = 2  # llama.cpp's number for the router's gating function
LITE = (26, 27, 48)  # layer counts that llama.cpp takes for DeepSeek "lite" models, which have no query rank


@dataclass(frozen=True)
class Entry:
    """The GGUF tensor `name` is `make` of our tensors `of`. `exact`: stays fp32 in any dtype."""

    name: str
    of: tuple[str, ...]
    make: Callable[..., Tensor]
    exact: bool = False


def write_gguf(
    path: Path, config: ModelConfig, read: Callable[[str], Tensor], vocabulary: Vocabulary, dtype: str = "float32",
    on_tensor: Callable[[int, int], None] = lambda done, total: None,
) -> Path:  # fmt: skip
    """Write `config`'s weights, which `read(name)` gives one of ours at a time, whole or not at all.

    `dtype`: "float32" | "float16" | "bfloat16" of what `stored_as` says; vectors, router and convolutions stay fp32.
    Multi-token prediction layers are left out. Raises UserError for a shape that llama.cpp has no arch for.
    """
    gguf = _library()
    refuse_what_llama_cannot_say(config)
    kinds = {"float32": gguf.GGMLQuantizationType.F32, "float16": gguf.GGMLQuantizationType.F16,
             "bfloat16": gguf.GGMLQuantizationType.BF16}  # fmt: skip
    if dtype not in kinds:
        raise UserError(f"unknown dtype {dtype!r}; use one of {', '.join(kinds)}")
    listed, shapes = list(entries(config)), _shapes(config)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    writer = gguf.GGUFWriter(scratch, ARCHS[layout_of(config)])
    try:
        for key, value in keys(config).items():
            _add(writer, gguf, key, value)
        writer.add_file_type({"float32": 0, "float16": 1, "bfloat16": 32}[dtype])
        vocabulary.write(writer)
        stored = [stored_as(e, len(_made(e, shapes).shape), dtype) for e in listed]
        for entry, kind in zip(listed, stored, strict=True):
            shape = tuple(_made(entry, shapes).shape)
            size = 4 if kind == "float32" else 2
            writer.add_tensor_info(entry.name, shape, np.dtype(f"f{size}"), int(np.prod(shape)) * size, kinds[kind])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        read = functools.lru_cache(maxsize=2)(read)  # the two halves of one tensor follow each other
        for done, (entry, kind) in enumerate(zip(listed, stored, strict=True), 1):
            t = entry.make(*(read(name).float() for name in entry.of)).contiguous().to(getattr(torch, kind))
            writer.write_tensor_data((t.view(torch.int16) if kind == "bfloat16" else t).numpy())
            on_tensor(done, len(listed))
        writer.close()
        with open(scratch, "rb") as file:
            os.fsync(file.fileno())
        os.replace(scratch, path)
    finally:
        writer.close()
        scratch.unlink(missing_ok=True)
    return path


def stored_as(e: Entry, dims: int, dtype: str) -> str:
    """The dtype of one tensor in a file of `dtype`.

    llama.cpp rounds whatever meets a 16-bit matrix to that matrix's type. For the routed experts, nearly all the weights of
    a large model, that does little harm; between attention's products and in front of the head it decides near-ties, and
    an untrained model then says something else in every tenth continuation. So "float16" is of the routed experts, as the
    published 4-bit formats are; the rest stays fp32. "bfloat16" is of every matrix: the smallest file, the fastest that
    llama.cpp runs at 16 bits, and it rounds eight times as coarsely."""
    fine = dtype == "float16" and not e.name.endswith("_exps.weight")
    return "float32" if e.exact or dims < 2 or fine else dtype


def refuse_what_llama_cannot_say(c: ModelConfig) -> None:
    """Raises UserError naming the field."""
    to_hf(c)
    layout, yarn = layout_of(c), c.rope_scaling

    def must(fine: bool, field: str, why: str) -> None:
        if not fine:
            raise UserError(f"model {c.name!r} has no GGUF form: {field} = {getattr(c, field)!r}; {why}")

    if layout == "deepseek_v3":
        must(c.q_lora_rank is None or c.num_layers not in LITE, "q_lora_rank",
             f"llama.cpp takes a deepseek2 of {c.num_layers} layers for one without query rank")  # fmt: skip
        must(yarn is None or yarn.mscale == yarn.mscale_all_dim != 0, "rope_scaling",
             "llama.cpp knows YaRN only with mscale = mscale_all_dim")  # fmt: skip
        return
    must(c.mla_use_nope, "mla_use_nope", f"{ARCHS[layout]} has no rotary positions")
    must(c.kda_num_heads == c.num_attention_heads, "kda_num_heads", f"{ARCHS[layout]} has as many KDA as MLA heads")
    if layout == "kimi_linear":
        must(c.kda_gate_rank == c.kda_head_dim, "kda_gate_rank", "kimi-linear's is its kda_head_dim")
    else:
        must(bool(c.attn_res_block_size), "attn_res_block_size", "kimi-k3 always has Attention Residuals")
        must(c.hidden_act == "situ", "hidden_act", "kimi-k3's is situ")
        must(c.kda_gate_rank is None, "kda_gate_rank", "kimi-k3's output gate has full rank")


def keys(c: ModelConfig) -> dict[str, object]:
    """The metadata of the arch, by the key that llama.cpp asks for."""
    layout = layout_of(c)
    arch = ARCHS[layout]
    values: dict[str, object] = dict(
        block_count=c.num_layers, context_length=c.max_position_embeddings, embedding_length=c.hidden_size,
        feed_forward_length=c.intermediate_size, vocab_size=c.vocab_size, expert_count=c.n_routed_experts,
        expert_used_count=c.num_experts_per_tok, expert_shared_count=c.n_shared_experts,
        expert_feed_forward_length=c.moe_intermediate_size, expert_weights_scale=c.routed_scaling_factor,
        expert_weights_norm=True, expert_gating_func=SIGMOID,
        leading_dense_block_count=c.ffns.index("moe") if "moe" in c.ffns else c.num_layers,
    )  # fmt: skip
    attention = dict(
        head_count=c.num_attention_heads, layer_norm_rms_epsilon=c.rms_norm_eps, kv_lora_rank=c.kv_lora_rank,
        q_lora_rank=c.q_lora_rank or 0, key_length=c.latent_row, value_length=c.kv_lora_rank,
        key_length_mla=c.qk_nope_head_dim + c.qk_rope_head_dim, value_length_mla=c.v_head_dim,
        head_count_kv=1 if layout == "deepseek_v3" else [int(m == "mla") for m in c.mixers],  # 0 marks a KDA layer
    )  # fmt: skip
    if layout != "deepseek_v3" and c.q_lora_rank is None:
        del attention["q_lora_rank"]
    rope: dict[str, object] = {"dimension_count": c.qk_rope_head_dim, "freq_base": c.rope_theta}
    if layout == "deepseek_v3" and (yarn := c.rope_scaling) is not None:
        rope |= {"scaling.type": "yarn", "scaling.factor": yarn.factor, "scaling.yarn_beta_fast": yarn.beta_fast,
                 "scaling.original_context_length": yarn.original_max_position_embeddings,
                 "scaling.yarn_beta_slow": yarn.beta_slow, "scaling.yarn_log_multiplier": 0.1 * yarn.mscale_all_dim}  # fmt: skip
    values |= {f"attention.{k}": v for k, v in attention.items()} | {f"rope.{k}": v for k, v in rope.items()}
    if layout != "deepseek_v3":
        values |= {"ssm.conv_kernel": c.short_conv_kernel_size, "kda.head_dim": c.kda_head_dim}
    if layout == "kimi_k3":
        values |= {"attn_res.block_size": c.attn_res_block_size, "activation.situ_beta": c.activation_situ_beta,
                   "activation.situ_linear_beta": c.activation_situ_linear_beta}  # fmt: skip
        if c.gate_lower_bound is not None:
            values["kda.gate_lower_bound"] = c.gate_lower_bound
        if c.routed_expert_hidden_size is not None:
            values["expert_latent_length"] = c.routed_expert_hidden_size
    return {"general.name": c.name} | {f"{arch}.{k}": v for k, v in values.items()}


def llama_options(c: ModelConfig) -> list[str]:
    """What llama.cpp has to be told beside the file: its `deepseek2` leaves the file's YaRN betas unread, takes 32 and 1
    instead, and then turns K2 (beta_fast 1) by other angles; greedy text differs within tens of tokens."""
    yarn = c.rope_scaling
    if layout_of(c) != "deepseek_v3" or yarn is None or (yarn.beta_fast, yarn.beta_slow) == (32.0, 1.0):
        return []
    return ["--yarn-beta-fast", f"{yarn.beta_fast:g}", "--yarn-beta-slow", f"{yarn.beta_slow:g}"]


def entries(c: ModelConfig) -> Iterator[Entry]:
    """All tensors of the file."""
    yield Entry("token_embd.weight", ("embed_tokens.weight",), _same)
    for i in range(c.num_layers):
        ours, theirs = f"layers.{i}.", f"blk.{i}."
        names = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
        yield from _renamed(ours, theirs, names)
        yield from (_kda if c.mixers[i] == "kda" else _mla)(c, f"{ours}self_attn.", theirs)
        if c.ffns[i] == "moe":
            yield from _moe(c, f"{ours}mlp.", theirs)
        else:
            yield from _renamed(f"{ours}mlp.", theirs, {f"{n}_proj": f"ffn_{n}" for n in ("gate", "up", "down")})
        if c.attn_res_block_size is not None:
            yield _score(f"{theirs}attn_res_score", f"{ours}self_attention_res")
            yield _score(f"{theirs}ffn_res_score", f"{ours}mlp_res")
    if c.attn_res_block_size is not None:
        yield _score("output_res_score", "output_res")
    yield Entry("output_norm.weight", ("norm.weight",), _same)
    yield Entry("output.weight", ("lm_head.weight",), _same)


def _same(t: Tensor) -> Tensor:
    return t


def _renamed(ours: str, theirs: str, names: dict[str, str]) -> Iterator[Entry]:
    for a, b in names.items():
        yield Entry(f"{theirs}{b}.weight", (f"{ours}{a}.weight",), _same)


def _score(theirs: str, ours: str) -> Entry:
    """A depth mixer's norm and projection, which are only ever used as their product."""
    return Entry(f"{theirs}.weight", (f"{ours}.norm.weight", f"{ours}.proj.weight"), lambda norm, proj: norm * proj[0])


def _mla(c: ModelConfig, ours: str, theirs: str) -> Iterator[Entry]:
    query = {"q_a_proj": "attn_q_a", "q_a_layernorm": "attn_q_a_norm", "q_b_proj": "attn_q_b"}
    gate = {"g_proj": "attn_gate"} if c.mla_use_output_gate else {}
    names = {"kv_a_proj_with_mqa": "attn_kv_a_mqa", "kv_a_layernorm": "attn_kv_a_norm", "o_proj": "attn_output"}
    yield from _renamed(ours, theirs, ({"q_proj": "attn_q"} if c.q_lora_rank is None else query) | gate | names)

    def split(t: Tensor) -> tuple[Tensor, Tensor]:
        return t.view(c.num_attention_heads, -1, c.kv_lora_rank).split([c.qk_nope_head_dim, c.v_head_dim], 1)

    kv_b = (f"{ours}kv_b_proj.weight",)
    yield Entry(f"{theirs}attn_k_b.weight", kv_b, lambda t: split(t)[0].transpose(1, 2))
    yield Entry(f"{theirs}attn_v_b.weight", kv_b, lambda t: split(t)[1])


def _kda(c: ModelConfig, ours: str, theirs: str) -> Iterator[Entry]:
    gate = {"g_proj": "ssm_g"} if c.kda_gate_rank is None else {"g_a_proj": "ssm_g_a", "g_b_proj": "ssm_g_b"}
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "f_a_proj": "ssm_f_a", "f_b_proj": "ssm_f_b",
             "b_proj": "ssm_beta", "o_norm": "ssm_norm", "o_proj": "attn_output"}  # fmt: skip
    yield from _renamed(ours, theirs, names | gate)
    for i, name in enumerate("qkv"):
        yield Entry(f"{theirs}ssm_conv1d_{name}.weight", (f"{ours}conv",),
                    lambda t, i=i: t.view(3, -1, t.shape[1])[i][None, :, None], exact=True)  # fmt: skip
    shape = (-1,) if layout_of(c) == "kimi_k3" else (1, 1, -1, 1)
    yield Entry(f"{theirs}ssm_a", (f"{ours}A_log",), lambda t: -t.exp().view(shape), exact=True)
    yield Entry(f"{theirs}ssm_dt.bias", (f"{ours}dt_bias",), _same)


def _moe(c: ModelConfig, ours: str, theirs: str) -> Iterator[Entry]:
    width = c.moe_intermediate_size  # ours are [E, in, out], gate beside up; theirs [E, out, in] each

    def served(t: Tensor) -> Tensor:
        """As the experts compute: rounded to 4 bits, where they were trained to be."""
        return t if c.expert_format is None or t.is_meta else quant.served(t, c.expert_format, dim=1)

    yield Entry(f"{theirs}ffn_gate_inp.weight", (f"{ours}gate.weight",), _same, exact=True)
    yield Entry(f"{theirs}exp_probs_b.bias", (f"{ours}e_score_correction_bias",), _same)
    yield Entry(f"{theirs}ffn_gate_exps.weight", (f"{ours}w_in",), lambda t: served(t)[:, :, :width].transpose(1, 2))
    yield Entry(f"{theirs}ffn_up_exps.weight", (f"{ours}w_in",), lambda t: served(t)[:, :, width:].transpose(1, 2))
    yield Entry(f"{theirs}ffn_down_exps.weight", (f"{ours}w_out",), lambda t: served(t).transpose(1, 2))
    yield from _renamed(f"{ours}shared_experts.", theirs, {f"{n}_proj": f"ffn_{n}_shexp" for n in ("gate", "up", "down")})
    if c.routed_expert_hidden_size is not None:
        norm = {"routed_expert_norm": "ffn_routed_norm"} if c.latent_moe_use_norm else {}
        names = {"routed_expert_down_proj": "ffn_routed_down", "routed_expert_up_proj": "ffn_routed_up"}
        yield from _renamed(ours, theirs, names | norm)


def _shapes(c: ModelConfig) -> dict[str, Tensor]:
    from ..lm import TransformerLM

    with torch.device("meta"):
        return TransformerLM(dataclasses.replace(c, num_mtp_layers=0), seed=None).state_dict()


def _made(entry: Entry, meta: dict[str, Tensor]) -> Tensor:
    return entry.make(*(meta[name] for name in entry.of))


def _add(writer, gguf, key: str, value: object) -> None:
    kind = gguf.GGUFValueType
    if isinstance(value, list):
        writer.add_array(key, value)
    else:
        of = {bool: kind.BOOL, int: kind.UINT32, float: kind.FLOAT32, str: kind.STRING}[type(value)]
        writer.add_key_value(key, value, of)


def _library():
    try:
        import gguf
    except ImportError:
        raise UserError("writing GGUF needs the gguf package: pip install 'tidelock[gguf]'") from None
    return gguf
