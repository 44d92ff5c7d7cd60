"""A published config.json as a `ModelConfig`, and back."""

from __future__ import annotations

import dataclasses
from typing import Any

from tidelock.tokens.errors import UserError

from .. import quant
from ..config import ModelConfig, Yarn

UNUSED_KDA = dict(kda_num_heads=0, kda_head_dim=0, short_conv_kernel_size=4, gate_lower_bound=None, kda_gate_rank=None)
SITU = dict(activation_situ_beta=4.0, activation_situ_linear_beta=25.0)  # K3 §2.3


def from_hf(data: dict[str, Any], name: str = "model") -> ModelConfig:
    """The shape that a Hugging Face config describes. Raises UserError naming the field that we cannot follow."""
    kind, quantization = data.get("model_type"), data.get("quantization_config")
    if kind in ("kimi_k3", "kimi_k25") and "text_config" in data:
        data = data["text_config"]
        data = {**data, "quantization_config": data.get("quantization_config") or quantization}
        kind = data.get("model_type", "kimi_linear" if kind == "kimi_k3" else "kimi_k2")
    if kind in ("deepseek_v3", "kimi_k2"):
        return _deepseek(data, name)
    if kind == "kimi_linear":
        return _kimi_linear(data, name)
    raise UserError(f"unknown model_type {kind!r}; known are deepseek_v3, kimi_k2, kimi_k25, kimi_linear and kimi_k3")


def _read(data: dict[str, Any], key: str, *default: Any) -> Any:
    if key in data:
        return data[key]
    if default:
        return default[0]
    raise UserError(f"config.json lacks {key!r}")


def _require(data: dict[str, Any], **wanted: Any) -> None:
    """Fields that, where present, must have the one value these layers implement."""
    for key, value in wanted.items():
        allowed = value if isinstance(value, tuple) else (value,)
        if data.get(key) is not None and data[key] not in allowed:
            raise UserError(f"config.json: {key} = {data[key]!r} is not supported; it must be {' or '.join(map(repr, allowed))}")


def _common(data: dict[str, Any], name: str) -> dict[str, Any]:
    _require(data, tie_word_embeddings=False, attention_bias=False, topk_group=1, moe_layer_freq=1,
             topk_method="noaux_tc", num_key_value_heads=data["num_attention_heads"])  # fmt: skip
    layers, kinds = _read(data, "num_hidden_layers"), data.get("mlp_layer_types") or []
    dense = kinds.count("dense") if kinds else _read(data, "first_k_dense_replace", 1)
    return dict(
        name=name,
        vocab_size=_read(data, "vocab_size"),
        hidden_size=_read(data, "hidden_size"),
        ffns=tuple("dense" if i < dense else "moe" for i in range(layers)),
        num_attention_heads=_read(data, "num_attention_heads"),
        q_lora_rank=_read(data, "q_lora_rank", None),
        kv_lora_rank=_read(data, "kv_lora_rank"),
        qk_nope_head_dim=_read(data, "qk_nope_head_dim"),
        qk_rope_head_dim=_read(data, "qk_rope_head_dim"),
        v_head_dim=_read(data, "v_head_dim"),
        intermediate_size=_read(data, "intermediate_size"),
        moe_intermediate_size=_read(data, "moe_intermediate_size"),
        routed_scaling_factor=float(_read(data, "routed_scaling_factor")),
        hidden_act=_read(data, "hidden_act", "silu"),
        activation_situ_beta=float(_read(data, "activation_situ_beta", SITU["activation_situ_beta"])),
        activation_situ_linear_beta=float(_read(data, "activation_situ_linear_beta", SITU["activation_situ_linear_beta"])),
        rms_norm_eps=float(_read(data, "rms_norm_eps", 1e-6)),
        initializer_range=float(_read(data, "initializer_range", 0.02)),
        num_mtp_layers=_read(data, "num_nextn_predict_layers", 0) or 0,
        expert_format=_expert_format(data.get("quantization_config") or {}),
    )


def _expert_format(quantization: dict[str, Any]) -> str | None:
    """Which 4 bits the routed experts are in; FP8 blocks are a storage format only, so None."""
    if not quantization:
        return None
    if quantization.get("quant_method") == "fp8":
        _require(quantization, weight_block_size=([128, 128],), fmt="e4m3")
        return None
    groups = (quantization.get("config_groups") or {}).values()
    kinds = {quantization.get("format"), *(g.get("format") for g in groups)}
    for ours, theirs in quant.FORMATS.items():
        if theirs in kinds:
            return ours
    raise UserError(f"config.json: quantization_config of method {quantization.get('quant_method')!r} and format "
                    f"{quantization.get('format')!r} is not supported; use fp8 or {', '.join(quant.FORMATS.values())}")


def _deepseek(data: dict[str, Any], name: str) -> ModelConfig:
    _require(data, n_group=1, norm_topk_prob=True, scoring_func="sigmoid", rope_interleave=True, hidden_act="silu")
    layers = _read(data, "num_hidden_layers")
    rope = {**(data.get("rope_scaling") or {}), **(data.get("rope_parameters") or {})}
    return ModelConfig(
        **_common(data, name),
        mixers=("mla",) * layers,
        mla_use_nope=False,
        mla_use_output_gate=False,
        rope_theta=float(data.get("rope_theta") or rope.get("rope_theta") or 10000.0),
        rope_scaling=_yarn(rope, data),
        **UNUSED_KDA,
        n_routed_experts=_read(data, "n_routed_experts"),
        num_experts_per_tok=_read(data, "num_experts_per_tok"),
        n_shared_experts=_read(data, "n_shared_experts"),
        routed_expert_hidden_size=None,
        latent_moe_use_norm=False,
        attn_res_block_size=None,
        max_position_embeddings=_read(data, "max_position_embeddings", 4096),
    )


def _yarn(rope: dict[str, Any], data: dict[str, Any]) -> Yarn | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind != "yarn":
        raise UserError(f"config.json: rope_scaling of type {kind!r} is not supported; use yarn or none")
    _require(rope, attention_factor=None, truncate=True)
    original = rope.get("original_max_position_embeddings", 4096)
    factor = rope.get("factor") or data["max_position_embeddings"] / original
    return Yarn(
        factor=float(factor), original_max_position_embeddings=original,
        beta_fast=float(rope.get("beta_fast") or 32), beta_slow=float(rope.get("beta_slow") or 1),
        mscale=float(rope.get("mscale") or 0), mscale_all_dim=float(rope.get("mscale_all_dim") or 0),
    )  # fmt: skip


def _kimi_linear(data: dict[str, Any], name: str) -> ModelConfig:
    """Kimi Linear and K3's text tower, which share a model_type: what K3 adds is there or not, field by field."""
    _require(data, num_expert_group=1, n_group=1, moe_renormalize=True, moe_router_activation_func="sigmoid",
             mla_use_nope=True, hidden_act=("silu", "situ"))  # fmt: skip
    layers = _read(data, "num_hidden_layers")
    linear = data["linear_attn_config"] if "layer_types" not in data else _as_published(data)
    full = set(_read(linear, "full_attn_layers"))
    bound, latent = linear.get("gate_lower_bound"), data.get("routed_expert_hidden_size")
    return ModelConfig(
        **_common(data, name),
        mixers=tuple("mla" if i in full else "kda" for i in range(1, layers + 1)),
        mla_use_nope=True,
        mla_use_output_gate=bool(data.get("mla_use_output_gate", False)),
        rope_theta=float(data.get("rope_theta") or 10000.0),
        rope_scaling=None,
        kda_num_heads=_read(linear, "num_heads"),
        kda_head_dim=_read(linear, "head_dim"),
        short_conv_kernel_size=_read(linear, "short_conv_kernel_size", 4),
        gate_lower_bound=None if bound is None else float(bound),
        kda_gate_rank=None if linear.get("use_full_rank_gate") else _read(linear, "head_dim"),
        n_routed_experts=_read(data, "num_experts"),
        num_experts_per_tok=_read(data, "num_experts_per_token"),
        n_shared_experts=_read(data, "num_shared_experts"),
        routed_expert_hidden_size=latent,
        latent_moe_use_norm=bool(latent and data.get("latent_moe_use_norm", True)),
        attn_res_block_size=data.get("attn_res_block_size"),
        max_position_embeddings=data.get("model_max_length") or data.get("max_position_embeddings") or 1048576,
    )


def _as_published(data: dict[str, Any]) -> dict[str, Any]:
    """`linear_attn_config` from the fields that transformers' own class writes instead."""
    full = [i for i, kind in enumerate(data["layer_types"], 1) if kind == "full_attention"]
    return dict(full_attn_layers=full, num_heads=data["linear_num_heads"], head_dim=data["linear_head_dim"],
                short_conv_kernel_size=data["linear_conv_kernel_dim"])  # fmt: skip


def layout_of(c: ModelConfig) -> str:
    """Which published layout holds this shape: "deepseek_v3" | "kimi_linear" | "kimi_k3"."""
    residuals = c.attn_res_block_size is not None
    if "kda" not in c.mixers and not (c.mla_use_nope or c.mla_use_output_gate or residuals or c.routed_expert_hidden_size):
        return "deepseek_v3"
    k3 = (residuals, c.routed_expert_hidden_size, c.gate_lower_bound, c.mla_use_output_gate)
    return "kimi_k3" if any(k3) or ("kda" in c.mixers and c.kda_gate_rank is None) else "kimi_linear"


def to_hf(c: ModelConfig, dtype: str = "float32") -> dict[str, Any]:
    """The config.json of `c`. Raises UserError where no published layout can say it."""
    if c.attn_res_block_size == 0:
        raise UserError(f"model {c.name!r} has no published layout: its Attention Residuals are of the full form, K3's of blocks")
    layout, dense = layout_of(c), c.ffns.index("moe") if "moe" in c.ffns else c.num_layers
    shared = dict(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
        moe_intermediate_size=c.moe_intermediate_size, num_hidden_layers=c.num_layers, first_k_dense_replace=dense,
        num_attention_heads=c.num_attention_heads, num_key_value_heads=c.num_attention_heads,
        q_lora_rank=c.q_lora_rank, kv_lora_rank=c.kv_lora_rank, qk_nope_head_dim=c.qk_nope_head_dim,
        qk_rope_head_dim=c.qk_rope_head_dim, v_head_dim=c.v_head_dim, routed_scaling_factor=c.routed_scaling_factor,
        hidden_act=c.hidden_act, rms_norm_eps=c.rms_norm_eps, initializer_range=c.initializer_range,
        num_nextn_predict_layers=c.num_mtp_layers, tie_word_embeddings=False, topk_group=1, moe_layer_freq=1,
        rope_theta=c.rope_theta, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    if layout == "deepseek_v3":
        data = dict(
            model_type="deepseek_v3", architectures=["DeepseekV3ForCausalLM"], torch_dtype=dtype, **shared,
            n_routed_experts=c.n_routed_experts, num_experts_per_tok=c.num_experts_per_tok,
            n_shared_experts=c.n_shared_experts, n_group=1, norm_topk_prob=True, scoring_func="sigmoid",
            topk_method="noaux_tc", attention_bias=False, max_position_embeddings=c.max_position_embeddings,
            rope_scaling=None if c.rope_scaling is None else {"type": "yarn", **dataclasses.asdict(c.rope_scaling)},
        )  # fmt: skip
    else:
        full = [i for i, m in enumerate(c.mixers, 1) if m == "mla"]
        linear = dict(
            full_attn_layers=full, kda_layers=[i for i, m in enumerate(c.mixers, 1) if m == "kda"],
            num_heads=c.kda_num_heads, head_dim=c.kda_head_dim, short_conv_kernel_size=c.short_conv_kernel_size,
        )  # fmt: skip
        data = dict(
            model_type="kimi_linear", architectures=["KimiLinearForCausalLM"], torch_dtype=dtype, **shared,
            num_experts=c.n_routed_experts, num_experts_per_token=c.num_experts_per_tok,
            num_shared_experts=c.n_shared_experts, num_expert_group=1, moe_renormalize=True,
            moe_router_activation_func="sigmoid", mla_use_nope=c.mla_use_nope, linear_attn_config=linear,
            model_max_length=c.max_position_embeddings,
        )  # fmt: skip
        if layout == "kimi_k3":
            data["max_position_embeddings"] = data.pop("model_max_length")
            linear.update(gate_lower_bound=c.gate_lower_bound, use_full_rank_gate=c.kda_gate_rank is None)
            data.update(
                mla_use_output_gate=c.mla_use_output_gate, routed_expert_hidden_size=c.routed_expert_hidden_size,
                latent_moe_use_norm=c.latent_moe_use_norm, attn_res_block_size=c.attn_res_block_size,
                activation_situ_beta=c.activation_situ_beta, activation_situ_linear_beta=c.activation_situ_linear_beta,
            )  # fmt: skip
            data = {"model_type": "kimi_k3", "architectures": ["KimiK3ForConditionalGeneration"], "torch_dtype": dtype,
                    "tie_word_embeddings": False, "text_config": data}  # fmt: skip
    try:
        back = from_hf(data, c.name)
    except UserError as e:
        raise UserError(f"model {c.name!r} has no published layout: {e}") from None
    lost = [f.name for f in dataclasses.fields(c) if getattr(back, f.name) != getattr(c, f.name) and _used(c, f.name)]
    if lost:
        raise UserError(f"model {c.name!r} has no published layout: {layout} cannot hold its {', '.join(lost)}")
    return data


def _used(c: ModelConfig, field: str) -> bool:
    """Whether a field shapes the model at all (a model without KDA layers still has a kda_head_dim)."""
    if field in UNUSED_KDA:
        return "kda" in c.mixers
    if field in SITU:
        return c.hidden_act == "situ"
    if field in ("rope_theta", "rope_scaling"):
        return not c.mla_use_nope
    if field == "expert_format":
        return False  # said by quantization_config, where the experts are written packed
    return field != "latent_moe_use_norm" or c.routed_expert_hidden_size is not None
