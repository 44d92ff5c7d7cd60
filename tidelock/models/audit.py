"""What a shape costs, counted on the meta device: parameters, cache, state and FLOPs, component by component.

Conventions: one multiply-add is 2 FLOPs; matrix products are counted, norms, nonlinearities and softmax are not.
Training is forward plus backward, three times the forward's products, on a sequence of `context` tokens; decode is one
token after `context` cached ones, with MLA in absorbed form.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from .config import ModelConfig
from .lm import TransformerLM

BF16, FP32 = 2, 4
EXPERT_BITS = {None: 16, "int4": 4 + 16 / 32, "mxfp4": 4 + 8 / 32}  # with the scale of every group of 32


@dataclass(frozen=True)
class Component:
    """One kind of part: how many there are, parameters of all of them, and those that touch one token."""

    name: str
    count: int
    total: int
    active: int
    flops_decode: int  # per token, all of them


def component_of(name: str, c: ModelConfig) -> str:
    """Which row of the table a parameter belongs to."""
    if name.startswith("mtp."):
        return "MTP"
    if name.startswith("layers."):
        layer, rest = int(name.split(".")[1]), name.split(".", 2)[2]
        if rest.startswith("self_attn."):
            return "KDA" if c.mixers[layer] == "kda" else "MLA"
        if rest.startswith("mlp."):
            if c.ffns[layer] == "dense":
                return "dense FFN"
            kind = rest.split(".")[1]
            return {"w_in": "routed experts", "w_out": "routed experts", "shared_experts": "shared experts",
                    "gate": "router"}.get(kind, "latent projections")  # fmt: skip
        return "attention residuals" if "_res." in rest else "norms"
    return {"embed_tokens": "embedding", "lm_head": "head", "output_res": "attention residuals"}.get(name.split(".")[0], "norms")


ORDER = ("embedding", "MLA", "KDA", "dense FFN", "router", "shared experts", "latent projections", "routed experts",
         "attention residuals", "norms", "head", "MTP")  # fmt: skip


def audit(c: ModelConfig, context: int = 8192) -> dict[str, Any]:
    """Everything `tidelock models show` prints. No weight is allocated."""
    with torch.device("meta"):
        model = TransformerLM(c, seed=None)
    total: Counter[str] = Counter()
    for name, p in model.named_parameters():
        total[component_of(name, c)] += p.numel()
    active = dict(total)
    if c.n_routed_experts:
        active["routed experts"] = total["routed experts"] * c.num_experts_per_tok // c.n_routed_experts
    active.pop("MTP", None)  # a training target, not on a token's way

    moe, mla, kda = c.ffns.count("moe"), c.mixers.count("mla"), c.mixers.count("kda")
    counts = {"embedding": 1, "head": 1, "attention residuals": 2 * c.num_layers + 1, "norms": 2 * c.num_layers + 1, "MLA": mla, "KDA": kda, "dense FFN": c.num_layers - moe, "MTP": c.num_mtp_layers,
              "routed experts": moe * c.n_routed_experts}  # fmt: skip
    rows = [Component(n, counts.get(n, moe if n in ("router", "shared experts", "latent projections") else c.num_layers),
                      total[n], active.get(n, 0), _products(n, active, c) + _sequence(n, c, context, decode=True))
            for n in ORDER if total[n]]  # fmt: skip
    forward = sum(_products(r.name, active, c) + _sequence(r.name, c, context, decode=False) for r in rows)
    state = c.kda_num_heads * c.kda_head_dim * c.kda_head_dim * FP32 * kda
    everything = sum(active.values())
    return {
        "name": c.name,
        "context": context,
        "total_params": sum(total.values()) - total["MTP"],
        "mtp_params": total["MTP"],
        "active_params": everything,
        "active_params_without_embedding": everything - total["embedding"],
        "weight_bytes": int(total["routed experts"] * EXPERT_BITS[c.expert_format] / 8)
        + BF16 * (sum(total.values()) - total["MTP"] - total["routed experts"]),
        "cache_bytes_per_token": mla * c.latent_row * BF16,
        "state_bytes_per_sequence": state,
        "conv_tail_bytes_per_sequence": kda * 3 * c.kda_num_heads * c.kda_head_dim * (c.short_conv_kernel_size - 1) * FP32,
        "flops_per_token": {"train": 3 * forward, "decode": sum(r.flops_decode for r in rows)},
        "components": [r.__dict__ for r in rows],
    }


def _products(name: str, active: dict[str, int], c: ModelConfig) -> int:
    """FLOPs per token of the products with weights: two for each active parameter of a matrix."""
    return 0 if name in ("embedding", "norms", "attention residuals", "MTP") else 2 * active.get(name, 0)


def _sequence(name: str, c: ModelConfig, context: int, decode: bool) -> int:
    """FLOPs per token of what depends on the other tokens: attention scores and values, the delta rule's state."""
    if name == "MLA":
        heads, layers = c.num_attention_heads, c.mixers.count("mla")
        if decode:  # absorbed: every head meets the latent row twice
            return layers * heads * context * 2 * (c.latent_row + c.kv_lora_rank)
        seen = context // 2  # the mean over a causal sequence
        return layers * heads * seen * 2 * (c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim)
    if name == "KDA":  # decay, read kTS, write k uT, read qTS: 1 + 2 + 2 + 2 per entry of the state
        return c.mixers.count("kda") * c.kda_num_heads * 7 * c.kda_head_dim**2
    return 0
