"""Which published tensor is which part of which of ours.

Every published tensor is a *view* of a native one (a slice, a transpose), so reading is copying into the view and
writing is copying out of it; nothing is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from ..config import ModelConfig
from .config import layout_of

IGNORED = ("vision_tower.", "mm_projector.", "rotary_emb.inv_freq")  # only the text tower's weights are ours
ISLANDS = ("A_log", "dt_bias", "e_score_correction_bias", "conv1d.weight", "o_norm.weight")  # stay fp32 in any dtype


@dataclass(frozen=True)
class Part:
    """The published tensor `name` is `view(native)`; with an `expert`, `of(native[expert])`, so that no more than one
    expert of a layer need be at hand. Experts may be quantised."""

    name: str
    native: str
    of: Callable[[Tensor], Tensor]
    expert: int | None = None
    pad_to: int = 0  # stored with zeros up to this length

    @property
    def routed(self) -> bool:
        return self.expert is not None

    def view(self, native: Tensor) -> Tensor:
        return self.of(native if self.expert is None else native[self.expert])


def same(t: Tensor) -> Tensor:
    return t


def parts(c: ModelConfig, layout: str | None = None, prefix: str | None = None) -> Iterator[Part]:
    """All published tensors, in the order of our state_dict. `prefix` as in "language_model.": K3's by default."""
    layout = layout or layout_of(c)
    prefix = ("language_model." if layout == "kimi_k3" else "") if prefix is None else prefix
    yield Part(f"{prefix}model.embed_tokens.weight", "embed_tokens.weight", same)
    for i in range(c.num_layers):
        yield from _layer(c, i, f"{prefix}model.layers.{i}.", f"layers.{i}.", layout, c.attn_res_block_size is not None)
    for i in range(c.num_mtp_layers):
        theirs, ours = f"{prefix}model.layers.{c.num_layers + i}.", f"mtp.{i}."
        for name in ("enorm", "hnorm", "eh_proj"):
            yield Part(f"{theirs}{name}.weight", f"{ours}{name}.weight", same)
        yield Part(f"{theirs}shared_head.norm.weight", f"{ours}norm.weight", same)
        yield from _layer(c, c.num_layers - 1, theirs, f"{ours}layer.", layout, False)
    if c.attn_res_block_size is not None:
        yield from _plain(f"{prefix}model.output_attn_res_", "output_res.", {"norm": "norm", "proj": "proj"})
    yield Part(f"{prefix}model.norm.weight", "norm.weight", same)
    yield Part(f"{prefix}lm_head.weight", "lm_head.weight", same)


def _plain(theirs: str, ours: str, names: dict[str, str]) -> Iterator[Part]:
    for a, b in names.items():
        yield Part(f"{theirs}{a}.weight", f"{ours}{b}.weight", same)


def _layer(c: ModelConfig, i: int, theirs: str, ours: str, layout: str, residuals: bool) -> Iterator[Part]:
    mixer = _kda if c.mixers[i] == "kda" else _mla
    yield from mixer(c, f"{theirs}self_attn.", f"{ours}self_attn.", layout)
    if c.ffns[i] == "moe":
        block = "mlp." if layout == "deepseek_v3" else "block_sparse_moe."
        yield from _moe(c, theirs + block, f"{ours}mlp.", layout)
    else:
        yield from _plain(f"{theirs}mlp.", f"{ours}mlp.", {n: n for n in ("gate_proj", "up_proj", "down_proj")})
    yield from _plain(theirs, ours, {n: n for n in ("input_layernorm", "post_attention_layernorm")})
    if residuals:
        for name in ("self_attention_res", "mlp_res"):
            yield from _plain(f"{theirs}{name}_", f"{ours}{name}.", {"norm": "norm", "proj": "proj"})


def _mla(c: ModelConfig, theirs: str, ours: str, layout: str) -> Iterator[Part]:
    query = ("q_proj",) if c.q_lora_rank is None else ("q_a_proj", "q_a_layernorm", "q_b_proj")
    gate = ("g_proj",) if c.mla_use_output_gate else ()
    names = (*query, "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", *gate, "o_proj")
    yield from _plain(theirs, ours, {n: n for n in names})


def _kda(c: ModelConfig, theirs: str, ours: str, layout: str) -> Iterator[Part]:
    width = c.kda_num_heads * c.kda_head_dim
    yield from _plain(theirs, ours, {n: n for n in ("q_proj", "k_proj", "v_proj")})
    for j, name in enumerate(("q_conv1d", "k_conv1d", "v_conv1d")):  # ours is one [3 H K, W]; theirs are [H K, 1, W]
        yield Part(f"{theirs}{name}.weight", f"{ours}conv", lambda t, j=j: t[j * width : (j + 1) * width, None])
    if layout == "kimi_k3":  # 96 heads are stored as 128 entries, the rest zero
        yield Part(f"{theirs}A_log", f"{ours}A_log", same, pad_to=-(-c.kda_num_heads // 128) * 128)
    else:
        yield Part(f"{theirs}A_log", f"{ours}A_log", lambda t: t.view(1, 1, -1, 1))
    yield Part(f"{theirs}dt_bias", f"{ours}dt_bias", same)
    gate = ("g_proj",) if c.kda_gate_rank is None else ("g_a_proj", "g_b_proj")
    yield from _plain(theirs, ours, {n: n for n in ("f_a_proj", "f_b_proj", "b_proj", *gate, "o_norm", "o_proj")})


def _moe(c: ModelConfig, theirs: str, ours: str, layout: str) -> Iterator[Part]:
    gate, up, down = ("gate_proj", "up_proj", "down_proj") if layout == "deepseek_v3" else ("w1", "w3", "w2")
    width = c.moe_intermediate_size
    for e in range(c.n_routed_experts):  # ours are [E, in, out], gate beside up; theirs [out, in] each
        expert = f"{theirs}experts.{e}."
        yield Part(f"{expert}{gate}.weight", f"{ours}w_in", lambda t: t[:, :width].t(), e)
        yield Part(f"{expert}{up}.weight", f"{ours}w_in", lambda t: t[:, width:].t(), e)
    for e in range(c.n_routed_experts):
        yield Part(f"{theirs}experts.{e}.{down}.weight", f"{ours}w_out", lambda t: t.t(), e)
    yield Part(f"{theirs}gate.weight", f"{ours}gate.weight", same)
    yield Part(f"{theirs}gate.e_score_correction_bias", f"{ours}e_score_correction_bias", same)
    names = ("gate_proj", "up_proj", "down_proj")
    yield from _plain(f"{theirs}shared_experts.", f"{ours}shared_experts.", {n: n for n in names})
    if c.routed_expert_hidden_size is not None:
        norm = ("routed_expert_norm",) if c.latent_moe_use_norm else ()
        yield from _plain(theirs, ours, {n: n for n in ("routed_expert_down_proj", "routed_expert_up_proj", *norm)})
