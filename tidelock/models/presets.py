"""Named shapes. A preset is a declaration; a new one is a new entry here and nothing else."""

from __future__ import annotations

from tidelock.tokens.errors import UserError

from .config import ModelConfig

# K3 in small: 3 KDA : 1 gated MLA without RoPE, first layer dense, latent MoE with shared experts, SiTU-GLU,
# Attention Residuals over every layer. About 1 M active parameters.
NANO_K3 = dict(
    hidden_size=128,
    mixers=("kda", "kda", "kda", "mla"),
    ffns=("dense", "moe", "moe", "moe"),
    num_attention_heads=4,
    kv_lora_rank=64,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
    mla_use_nope=True,
    mla_use_output_gate=True,
    rope_theta=10000.0,
    kda_num_heads=4,
    kda_head_dim=32,
    short_conv_kernel_size=4,
    gate_lower_bound=-5.0,
    intermediate_size=384,
    n_routed_experts=16,
    num_experts_per_tok=2,
    n_shared_experts=2,
    moe_intermediate_size=64,
    routed_expert_hidden_size=64,
    routed_scaling_factor=1.0,
    hidden_act="situ",
    activation_situ_beta=4.0,
    activation_situ_linear_beta=25.0,
    attn_res_block_size=1,
    rms_norm_eps=1e-5,
    initializer_range=0.02,
    max_position_embeddings=2048,
)

# K2 in small: MLA with RoPE everywhere, first layer dense, MoE with one shared expert, SwiGLU, plain residuals.
NANO_K2 = dict(
    NANO_K3,
    mixers=("mla",) * 4,
    mla_use_nope=False,
    mla_use_output_gate=False,
    n_shared_experts=1,
    routed_expert_hidden_size=None,
    routed_scaling_factor=2.827,
    hidden_act="silu",
    attn_res_block_size=None,
    rms_norm_eps=1e-6,
)

PRESETS = {"nano-k2": NANO_K2, "nano-k3": NANO_K3}


def preset(name: str, vocab_size: int) -> ModelConfig:
    """The named shape for a vocabulary of `vocab_size` ids. Raises UserError for an unknown name."""
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}; choose one of {', '.join(sorted(PRESETS))}")
    return ModelConfig(name=name, vocab_size=vocab_size, **PRESETS[name])
