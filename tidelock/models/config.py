"""The shape of a model as data. Layers read numbers from it and never ask which family they are in."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from tidelock.tokens.errors import UserError


@dataclass(frozen=True)
class Yarn:
    """YaRN context extension (arXiv 2309.00071) as DeepSeek-V3 and K2 use it; names as in `rope_scaling`."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0


@dataclass(frozen=True)
class ModelConfig:
    """Field names follow the Hugging Face configs of K2 and K3 where those have one."""

    name: str
    vocab_size: int
    hidden_size: int
    mixers: tuple[str, ...]  # per layer: "mla" | "kda"
    ffns: tuple[str, ...]  # per layer: "dense" | "moe"
    num_attention_heads: int
    # MLA (K2 report §2; absorbed form)
    q_lora_rank: int | None  # None: queries come from x in one step
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    mla_use_nope: bool  # True: the "rope" part stays unrotated (Kimi Linear, K3)
    mla_use_output_gate: bool
    rope_theta: float
    rope_scaling: Yarn | None
    # KDA (Kimi Linear §3, K3 §2)
    kda_num_heads: int
    kda_head_dim: int
    short_conv_kernel_size: int
    gate_lower_bound: float | None  # log-decay in (bound, 0); None: unbounded softplus gate (Kimi Linear)
    kda_gate_rank: int | None  # output gate through this rank; None: full rank (K3)
    # FFN
    intermediate_size: int
    n_routed_experts: int
    num_experts_per_tok: int
    n_shared_experts: int
    moe_intermediate_size: int
    routed_expert_hidden_size: int | None  # latent MoE width; None: experts run at full width
    latent_moe_use_norm: bool
    routed_scaling_factor: float
    hidden_act: str  # "silu" | "situ"
    activation_situ_beta: float
    activation_situ_linear_beta: float
    # depth
    attn_res_block_size: int | None  # Attention Residuals: layers per block; 0: full form; None: plain residual stream
    rms_norm_eps: float
    initializer_range: float
    max_position_embeddings: int
    num_mtp_layers: int  # multi-token prediction layers behind the last one (DeepSeek-V3 2.2)
    expert_format: str | None = None  # "int4" | "mxfp4": routed experts compute in 4 bits, trained through rounding (QAT)

    def __post_init__(self) -> None:
        if len(self.mixers) != len(self.ffns):
            raise UserError(f"model config {self.name!r}: {len(self.mixers)} mixers but {len(self.ffns)} ffns")
        for kind, known in ((set(self.mixers), {"mla", "kda"}), (set(self.ffns), {"dense", "moe"})):
            if kind - known:
                raise UserError(f"model config {self.name!r}: unknown layer kind {sorted(kind - known)}, use {sorted(known)}")
        if self.n_shared_experts < 1 or not 1 <= self.num_experts_per_tok <= self.n_routed_experts:
            raise UserError(f"model config {self.name!r}: needs at least one shared expert and 1 <= num_experts_per_tok "
                            f"<= n_routed_experts, got {self.n_shared_experts}, {self.num_experts_per_tok}, {self.n_routed_experts}")
        if self.hidden_act not in ("silu", "situ"):
            raise UserError(f"model config {self.name!r}: unknown hidden_act {self.hidden_act!r}, use silu or situ")
        inner = self.routed_expert_hidden_size or self.hidden_size
        if self.expert_format not in (None, "int4", "mxfp4"):
            raise UserError(f"model config {self.name!r}: unknown expert_format {self.expert_format!r}, use int4 or mxfp4")
        if self.expert_format and (inner % 32 or self.moe_intermediate_size % 32):
            raise UserError(f"model config {self.name!r}: {self.expert_format} experts need widths that are multiples of 32, "
                            f"got {inner} and {self.moe_intermediate_size}")
        if (self.attn_res_block_size or 0) < 0:
            raise UserError(f"model config {self.name!r}: attn_res_block_size must not be negative, got {self.attn_res_block_size}")
        widths = {
            "hidden_size": self.hidden_size,
            "q_lora_rank": self.q_lora_rank or 8,
            "kv_lora_rank": self.kv_lora_rank,
            "qk_nope_head_dim": self.qk_nope_head_dim,
            "v_head_dim": self.v_head_dim,
            "kda_head_dim": self.kda_head_dim,
            "kda_gate_rank": self.kda_gate_rank or 8,
            "intermediate_size": self.intermediate_size,
            "moe_intermediate_size": self.moe_intermediate_size,
            "routed_expert_hidden_size": self.routed_expert_hidden_size or 8,
        }
        odd = [f"{k}={v}" for k, v in widths.items() if v % 8]
        if self.qk_rope_head_dim % 2:
            raise UserError(f"model config {self.name!r}: qk_rope_head_dim must be even, got {self.qk_rope_head_dim}")
        if odd:
            raise UserError(f"model config {self.name!r}: widths must be multiples of 8, got {', '.join(odd)}")

    @property
    def num_layers(self) -> int:
        return len(self.mixers)

    @property
    def latent_row(self) -> int:
        """Floats an MLA layer caches per token."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> ModelConfig:
        fields = dataclasses.fields(ModelConfig)
        missing = {f.name for f in fields if f.default is dataclasses.MISSING} - data.keys()
        unknown = data.keys() - {f.name for f in fields}
        if missing or unknown:
            raise UserError(f"model config: missing {sorted(missing)}, unknown {sorted(unknown)}")
        data = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        if isinstance(data["rope_scaling"], dict):
            data["rope_scaling"] = Yarn(**data["rope_scaling"])
        return ModelConfig(**data)
