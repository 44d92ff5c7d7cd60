"""Named shapes. A preset is a declaration; a new one is a new entry here and nothing else.

The published ones are exact (facts and sources in the model reference); small-* and nano-* keep their proportions.
"""

from __future__ import annotations

from tidelock.tokens.errors import UserError

from .config import ModelConfig, Yarn


def hybrid(layers: int, full_attention: tuple[int, ...]) -> tuple[str, ...]:
    """KDA everywhere but in the named layers, counted from 1 as in the published configs."""
    return tuple("mla" if i in full_attention else "kda" for i in range(1, layers + 1))


def first_dense(layers: int) -> tuple[str, ...]:
    return ("dense",) + ("moe",) * (layers - 1)


# What a family without the part leaves unused.
NO_KDA = dict(kda_num_heads=0, kda_head_dim=0, short_conv_kernel_size=4, gate_lower_bound=None, kda_gate_rank=None)
NO_LATENT = dict(routed_expert_hidden_size=None, latent_moe_use_norm=False)
SWIGLU = dict(hidden_act="silu", activation_situ_beta=4.0, activation_situ_linear_beta=25.0)

# Kimi K2 (report 2507.20534): DeepSeek-V3's layers, 384 experts, 64 heads.
K2 = dict(
    vocab_size=163840,
    hidden_size=7168,
    mixers=("mla",) * 61,
    ffns=first_dense(61),
    num_attention_heads=64,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    mla_use_nope=False,
    mla_use_output_gate=False,
    rope_theta=50000.0,
    rope_scaling=Yarn(factor=32.0, original_max_position_embeddings=4096, beta_fast=1.0),
    **NO_KDA,
    intermediate_size=18432,
    n_routed_experts=384,
    num_experts_per_tok=8,
    n_shared_experts=1,
    moe_intermediate_size=2048,
    **NO_LATENT,
    routed_scaling_factor=2.827,
    **SWIGLU,
    attn_res_block_size=None,
    rms_norm_eps=1e-6,
    initializer_range=0.02,
    max_position_embeddings=131072,
    num_mtp_layers=0,
)

# Kimi K2 Thinking: the same shape on 256k context, experts in INT4.
K2_THINKING = dict(
    K2,
    rope_scaling=Yarn(factor=64.0, original_max_position_embeddings=4096, beta_fast=1.0),
    rms_norm_eps=1e-5,
    max_position_embeddings=262144,
    expert_format="int4",
)

# Moonlight (2502.16982): DeepSeek-V3's layers at 16B, no query rank, no YaRN.
MOONLIGHT_16B = dict(
    K2,
    hidden_size=2048,
    mixers=("mla",) * 27,
    ffns=first_dense(27),
    num_attention_heads=16,
    q_lora_rank=None,
    rope_scaling=None,
    intermediate_size=11264,
    n_routed_experts=64,
    num_experts_per_tok=6,
    n_shared_experts=2,
    moe_intermediate_size=1408,
    routed_scaling_factor=2.446,
    rms_norm_eps=1e-5,
    max_position_embeddings=8192,
)

# Kimi Linear 48B-A3B (2510.26692): 3 KDA : 1 MLA without positions.
KIMI_LINEAR_48B = dict(
    K2,
    hidden_size=2304,
    mixers=hybrid(27, (4, 8, 12, 16, 20, 24, 27)),
    ffns=first_dense(27),
    num_attention_heads=32,
    q_lora_rank=None,
    mla_use_nope=True,
    rope_theta=10000.0,
    rope_scaling=None,
    kda_num_heads=32,
    kda_head_dim=128,
    kda_gate_rank=128,
    intermediate_size=9216,
    n_routed_experts=256,
    moe_intermediate_size=1024,
    routed_scaling_factor=2.446,
    rms_norm_eps=1e-5,
    max_position_embeddings=1048576,
)

# Kimi K3 (report 2607.24653): KDA with a bounded gate, gated MLA, latent MoE, SiTU-GLU, Attention Residuals.
K3 = dict(
    K2,
    mixers=hybrid(93, (*range(4, 93, 4), 93)),
    ffns=first_dense(93),
    num_attention_heads=96,
    mla_use_nope=True,
    mla_use_output_gate=True,
    rope_theta=10000.0,
    rope_scaling=None,
    kda_num_heads=96,
    kda_head_dim=128,
    gate_lower_bound=-5.0,
    intermediate_size=33792,
    n_routed_experts=896,
    num_experts_per_tok=16,
    n_shared_experts=2,
    moe_intermediate_size=3072,
    routed_expert_hidden_size=3584,
    latent_moe_use_norm=True,
    routed_scaling_factor=1.0,
    hidden_act="situ",
    attn_res_block_size=12,
    rms_norm_eps=1e-5,
    initializer_range=0.006,
    max_position_embeddings=1048576,
    expert_format="mxfp4",
)

# For one GPU: 50 to 150 M active parameters. Heads, widths, ranks and sparsity in the proportions of the large shapes
# (heads x head_dim : hidden, expert : hidden, latent : hidden, dense : hidden, query rank : hidden, experts : active).
SMALL_K3 = dict(
    K3,
    vocab_size=32768,
    hidden_size=768,
    mixers=hybrid(13, (4, 8, 12, 13)),
    ffns=first_dense(13),
    num_attention_heads=10,
    q_lora_rank=160,
    kv_lora_rank=128,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    kda_num_heads=10,
    kda_head_dim=128,
    intermediate_size=3616,
    n_routed_experts=224,
    num_experts_per_tok=4,
    moe_intermediate_size=320,
    routed_expert_hidden_size=384,
    attn_res_block_size=2,
    expert_format=None,
    initializer_range=0.02,
    max_position_embeddings=32768,
)
SMALL_K2 = dict(
    K2,
    vocab_size=32768,
    hidden_size=768,
    mixers=("mla",) * 12,
    ffns=first_dense(12),
    num_attention_heads=7,
    q_lora_rank=160,
    kv_lora_rank=128,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    rope_scaling=Yarn(factor=8.0, original_max_position_embeddings=4096, beta_fast=1.0),
    intermediate_size=1984,
    n_routed_experts=192,
    num_experts_per_tok=4,
    moe_intermediate_size=224,
    max_position_embeddings=32768,
)

# For a CPU: about 1 M active parameters, at the vocabulary of the tokenizer in use. Three KDA to one MLA, widths within
# half to twice the large shapes' ratios; sparsity stops at 8, for below a million parameters experts must stay few.
NANO_K3 = dict(
    K3,
    vocab_size=1024,
    hidden_size=128,
    mixers=hybrid(4, (4,)),
    ffns=first_dense(4),
    num_attention_heads=4,
    q_lora_rank=None,
    kv_lora_rank=64,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
    kda_num_heads=4,
    kda_head_dim=32,
    intermediate_size=384,
    n_routed_experts=16,
    num_experts_per_tok=2,
    moe_intermediate_size=64,
    routed_expert_hidden_size=64,
    attn_res_block_size=1,
    expert_format=None,
    initializer_range=0.02,
    max_position_embeddings=2048,
)
NANO_K2 = dict(
    K2,
    vocab_size=1024,
    hidden_size=128,
    mixers=("mla",) * 4,
    ffns=first_dense(4),
    num_attention_heads=4,
    q_lora_rank=None,
    kv_lora_rank=64,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
    rope_theta=10000.0,
    rope_scaling=None,
    intermediate_size=384,
    n_routed_experts=16,
    num_experts_per_tok=2,
    moe_intermediate_size=64,
    max_position_embeddings=2048,
)

PRESETS = {
    "k2": K2, "k2-thinking": K2_THINKING, "moonlight-16b": MOONLIGHT_16B, "kimi-linear-48b": KIMI_LINEAR_48B, "k3": K3,
    "small-k2": SMALL_K2, "small-k3": SMALL_K3, "nano-k2": NANO_K2, "nano-k3": NANO_K3,
}  # fmt: skip


def preset(name: str, vocab_size: int | None = None) -> ModelConfig:
    """The named shape, at its own vocabulary or at `vocab_size` ids. Raises UserError for an unknown name."""
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}; choose one of {', '.join(PRESETS)}")
    shape = PRESETS[name]
    return ModelConfig(name=name, **(shape if vocab_size is None else {**shape, "vocab_size": vocab_size}))
