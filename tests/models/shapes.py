"""Small shapes of every family for these tests, and the strategies that draw any shape at all."""

import dataclasses

import torch
from hypothesis import strategies as st

from tidelock.models import Batch, Cache, CacheView, TransformerLM, preset
from tidelock.models.config import Yarn

TINY = dict(vocab_size=96, hidden_size=64, num_attention_heads=4, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8,
            v_head_dim=24, intermediate_size=96, n_routed_experts=8, moe_intermediate_size=32)  # fmt: skip
YARN = Yarn(factor=32.0, original_max_position_embeddings=64, beta_fast=1.0)


def shape(base, name="tiny", **changes):
    return dataclasses.replace(preset(base), name=name, **{**TINY, **changes})


K2_SHAPES = {
    "plain": shape("nano-k2", mixers=("mla",) * 3, ffns=("dense", "moe", "moe"), num_experts_per_tok=2),
    "query rank and YaRN": shape("nano-k2", q_lora_rank=48, rope_scaling=YARN, rms_norm_eps=1e-5, num_experts_per_tok=3),
    "YaRN, other betas, two dense": shape(
        "nano-k2", rope_scaling=Yarn(8.0, 256, 32.0, 1.0, 0.7, 1.0), ffns=("dense", "dense", "moe", "moe"),
        n_shared_experts=2, rope_theta=50000.0),
}  # fmt: skip
LINEAR = shape("nano-k3", mixers=("kda", "mla", "kda"), ffns=("dense", "moe", "moe"), kda_num_heads=2, kda_head_dim=16,
               kda_gate_rank=16, gate_lower_bound=None, n_shared_experts=1, routed_expert_hidden_size=None,
               latent_moe_use_norm=False, mla_use_output_gate=False, attn_res_block_size=None, hidden_act="silu",
               routed_scaling_factor=2.446)  # fmt: skip
K3 = shape("nano-k3", kda_num_heads=3, kda_head_dim=16, routed_expert_hidden_size=32, q_lora_rank=24, attn_res_block_size=2)


def lively(config, seed=0):
    """A model whose every weight matters: gains, biases and decays away from their tame initial values."""
    model = TransformerLM(config, seed=seed)
    rng = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, t in model.state_dict().items():
            noise = torch.randn(t.shape, generator=rng)
            if t.dim() >= 2:
                t.copy_(noise * (2.0 / t.shape[-1]) ** 0.5)
            else:
                t += noise * (0.05 if "e_score" in name else 0.3)
    return model


def batch(n, vocab=96, seed=5):
    ids = torch.randint(0, vocab, (n,), generator=torch.Generator().manual_seed(seed))
    return Batch(ids, torch.tensor([0, n], dtype=torch.int32), torch.zeros(1, dtype=torch.int32))


def decoded(model, ids, chunks):
    """Logits with a cache, fed in chunks."""
    cache = Cache(model.config, n_pages=40, page_size=16, n_slots=2)
    view = CacheView(torch.arange(40, dtype=torch.int32)[None], torch.tensor([1], dtype=torch.int32))
    out, at = [], 0
    for size in chunks:
        part = Batch(ids[at : at + size], torch.tensor([0, size], dtype=torch.int32), torch.tensor([at], dtype=torch.int32))
        with torch.no_grad():
            out.append(model.logits(model(part, cache, view)))
        at += size
    return torch.cat(out)



@st.composite
def any_configs(draw, published=False):
    """Every part in every combination; `published`: only what some published layout can hold."""
    mixers = draw(st.lists(st.sampled_from(["mla", "kda"]), min_size=1, max_size=4))
    full_rank, bounded, res = draw(st.booleans()), draw(st.booleans()), draw(st.sampled_from([None, 1, 2] if published else [None, 0, 1, 2]))
    latent, gate, mtp = draw(st.sampled_from([None, 32])), draw(st.booleans()), draw(st.integers(0, 1))
    situ, nope = draw(st.booleans()), draw(st.booleans())
    if published:
        deepseek = "kda" not in mixers and not nope
        nope = not deepseek
        if deepseek:
            res, latent, gate, situ = None, None, False, False
    moe = draw(st.integers(0, 3))
    return shape(
        "nano-k3", mixers=tuple(mixers), ffns=tuple("moe" if i >= moe else "dense" for i in range(len(mixers))),
        q_lora_rank=draw(st.sampled_from([None, 16])), mla_use_nope=nope, mla_use_output_gate=gate,
        rope_scaling=None if nope else draw(st.sampled_from([None, YARN])), rope_theta=draw(st.sampled_from([10000.0, 50000.0])),
        kda_num_heads=3, kda_head_dim=16, short_conv_kernel_size=draw(st.sampled_from([3, 4])),
        kda_gate_rank=None if full_rank else 16, gate_lower_bound=-5.0 if bounded else None,
        n_shared_experts=draw(st.integers(1, 2)), num_experts_per_tok=draw(st.integers(1, 3)), routed_expert_hidden_size=latent,
        latent_moe_use_norm=latent is not None and draw(st.booleans()), routed_scaling_factor=draw(st.sampled_from([1.0, 2.446])),
        hidden_act="situ" if situ else "silu", attn_res_block_size=res, num_mtp_layers=mtp,
    )  # fmt: skip
