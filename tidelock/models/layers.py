"""The layers, as modules that own weights. Each forward reads like its equation; the arithmetic itself is in `ops`.

Shapes: N rows of a packed batch, d hidden size, H heads. All fp32. `cache` is the layer's own part of the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import balance, ops, quant
from .batch import Batch
from .config import ModelConfig
from .ops.latent import Latent
from .ops.reference import weigh, wide
from .rope import Rope

LOW_RANK_EPS = 1e-6  # of the norms on MLA's low-rank vectors, whatever rms_norm_eps says (DeepSeek-V3 and K3 code)


class Linear(nn.Module):
    """y = x W^T. weight [out, in]; no bias anywhere in the family."""

    def __init__(self, d_in: int, d_out: int, blocks: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_out, d_in))
        self.weight.muon_blocks = blocks  # Per-Head Muon: rows orthogonalised in this many blocks (K3 §2.5)

    def forward(self, x: Tensor) -> Tensor:
        return ops.backend(x).linear(x, self.weight)


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * w over the last dimension, times sigmoid(gate) where one is given."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return ops.backend(x).rms_norm(x, self.weight, self.eps, gate)


class KDA(nn.Module):
    """Kimi Delta Attention (Kimi Linear §3, K3 Eq. 1-6).

    q, k = L2Norm(SiLU(Conv(W x))); v = SiLU(Conv(W_v x)); b = sigmoid(W_b x); z = W_f2 W_f1 x + dt;
    g = lower * sigmoid(exp(A) z) (K3) or -exp(A) softplus(z) (Kimi Linear, no lower bound);
    o = recurrence (`ops.delta`); y = W_o [sigmoid(W_g x) * RMSNorm_head(o)], W_g of full or low rank.
    """

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        d, h, k = c.hidden_size, c.kda_num_heads, c.kda_head_dim
        self.heads, self.dim, self.lower = h, k, c.gate_lower_bound
        self.q_proj, self.k_proj, self.v_proj = (Linear(d, h * k, blocks=h) for _ in range(3))
        self.conv = nn.Parameter(torch.empty(3 * h * k, c.short_conv_kernel_size))  # q, k, v channels in turn
        self.conv.optim = "adamw"
        self.f_a_proj, self.f_b_proj = Linear(d, k), Linear(k, h * k)
        self.A_log, self.dt_bias = nn.Parameter(torch.zeros(h)), nn.Parameter(torch.zeros(h * k))
        self.b_proj = Linear(d, h)
        self.low_rank_gate = c.kda_gate_rank is not None
        if self.low_rank_gate:
            self.g_a_proj, self.g_b_proj = Linear(d, c.kda_gate_rank), Linear(c.kda_gate_rank, h * k)
        else:
            self.g_proj = Linear(d, h * k)
        self.o_norm, self.o_proj = RMSNorm(k, c.rms_norm_eps), Linear(h * k, d)

    def forward(self, x: Tensor, batch: Batch, cache: tuple[Tensor, Tensor] | None) -> Tensor:
        """x [N, d] -> [N, d]. cache = (states [slots, H, D, D], tails [slots, W - 1, 3 H D]), both updated in place."""
        op = ops.backend(x)
        states, tails = cache or (None, None)
        qkv = op.linear(x, self.q_proj.weight, self.k_proj.weight, self.v_proj.weight)
        qkv = op.short_conv(qkv, self.conv, batch, tails).view(-1, 3, self.heads, self.dim)
        g = op.kda_gate(self.f_b_proj(self.f_a_proj(x)), self.dt_bias, self.A_log, self.lower)
        o = op.kda(qkv, g, self.b_proj(x), batch, states)
        gate = self.g_b_proj(self.g_a_proj(x)) if self.low_rank_gate else self.g_proj(x)
        o = self.o_norm(o, gate=gate.view_as(o))
        return self.o_proj(o.reshape(x.shape[0], -1))


class MLA(nn.Module):
    """Multi-head latent attention (K2 report §2, DeepSeek-V3) in absorbed form, optionally gated (K3 Eq. 7).

    q = W_q x, or W_qb RMSNorm(W_qa x) with a query rank.
    One cached row per token, shared by all heads: [c = RMSNorm(W_kv x) | k_rope]. Queries are taken into the latent
    space (q W_uk), attend to rows, and the attended latent is expanded by W_uv. Training and decoding use this one form,
    so both see the same numbers.
    """

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        d, h = c.hidden_size, c.num_attention_heads
        at = self.latent = Latent(h, c.kv_lora_rank, c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim)
        self.rope_of = None if c.mla_use_nope else Rope(at.rope, c.rope_theta, c.rope_scaling)
        self.scale = (at.nope + at.rope) ** -0.5 * (self.rope_of.softmax_scale if self.rope_of else 1.0)
        if c.q_lora_rank is None:
            self.q_proj = Linear(d, h * (at.nope + at.rope), blocks=h)
        else:
            self.q_a_proj, self.q_a_layernorm = Linear(d, c.q_lora_rank), RMSNorm(c.q_lora_rank, LOW_RANK_EPS)
            self.q_b_proj = Linear(c.q_lora_rank, h * (at.nope + at.rope), blocks=h)
        self.low_rank_query = c.q_lora_rank is not None
        self.kv_a_proj_with_mqa = Linear(d, at.rank + at.rope)
        self.kv_a_layernorm = RMSNorm(at.rank, LOW_RANK_EPS)
        self.kv_b_proj = Linear(at.rank, h * (at.nope + at.value), blocks=h)
        self.g_proj = Linear(d, h * at.value) if c.mla_use_output_gate else None
        self.o_proj = Linear(h * at.value, d)
        self.max_logit: Tensor | None = None  # [H], largest scaled score of the last training forward

    def forward(self, x: Tensor, batch: Batch, pages: Tensor | None) -> Tensor:
        """x [N, d] -> [N, d]. pages [n_pages, page_size, rank + rope]: new rows are written, then read, in place."""
        op, kv_b = ops.backend(x), self.kv_b_proj.weight
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))) if self.low_rank_query else self.q_proj(x)
        norm = self.kv_a_layernorm
        rows = op.latent_rows(self.kv_a_proj_with_mqa(x), norm.weight, norm.eps, self.latent, self.rope_of, batch)
        if pages is not None:
            op.write_pages(pages, rows, batch)
        q = op.absorb(q, kv_b, self.latent, self.rope_of, self.scale, batch)
        o, self.max_logit = op.mla(q, rows, self.latent.rank, batch, pages)
        o = op.expand(o, kv_b, self.latent)
        if self.g_proj is not None:
            o = op.sigmoid_gate(o, self.g_proj(x))
        return self.o_proj(o)

    @torch.no_grad()
    def clip_qk(self, tau: float) -> int:
        """QK-Clip (K2 report, Alg. 1): shrink the query/key weights of heads whose largest logit passed tau.

        Returns how many heads were clipped.
        """
        if self.max_logit is None:
            return 0
        over = self.max_logit > tau
        gamma = torch.where(over, tau / self.max_logit, torch.ones_like(self.max_logit))
        w_q = (self.q_b_proj if self.low_rank_query else self.q_proj).weight
        at = self.latent
        q_nope, q_rope = w_q.view(at.heads, -1, w_q.shape[1]).split([at.nope, at.rope], 1)
        k_nope = at.up(self.kv_b_proj.weight)[0]
        q_nope.mul_(gamma.sqrt()[:, None, None])
        k_nope.mul_(gamma.sqrt()[:, None, None])
        q_rope.mul_(gamma[:, None, None])
        return int(over.sum())


class GLU(nn.Module):
    """Dense gated FFN: W_d act(W_g x, W_u x), SwiGLU or SiTU-GLU (K3 Eq. 12)."""

    def __init__(self, c: ModelConfig, d: int, width: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = Linear(d, width), Linear(d, width), Linear(width, d)
        self.act = (c.hidden_act == "situ", c.activation_situ_beta, c.activation_situ_linear_beta)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, d] -> [N, d]."""
        op = ops.backend(x)
        return self.down_proj(op.glu(op.linear(x, self.gate_proj.weight, self.up_proj.weight), *self.act))


class MoE(nn.Module):
    """Sparse mixture of experts, optionally in a latent width (Stable LatentMoE, K3 Eq. 11).

    u = sum_{i in top-k} p_i E_i(W_down x);  y = shared(x) + W_up RMSNorm(u).  Without a latent width: y = shared(x) + u.
    The router's selection bias follows the load (`balance`); it never enters p. With a 4-bit `format` every forward,
    training's too, computes with the experts as that format rounds them (K2 Thinking, K3 §4: QAT).
    """

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        d, latent, f, e = c.hidden_size, c.routed_expert_hidden_size, c.moe_intermediate_size, c.n_routed_experts
        self.k, self.scale, self.experts = c.num_experts_per_tok, c.routed_scaling_factor, e
        self.gate = Linear(d, e)
        self.register_buffer("e_score_correction_bias", torch.zeros(e))
        self.w_in = nn.Parameter(torch.empty(e, latent or d, 2 * f))  # [gate | up] of every expert
        self.w_out = nn.Parameter(torch.empty(e, f, latent or d))
        self.shared_experts = GLU(c, d, c.n_shared_experts * f)
        self.latent = latent is not None
        if self.latent:
            self.routed_expert_down_proj, self.routed_expert_up_proj = Linear(d, latent), Linear(latent, d)
            self.routed_expert_norm = RMSNorm(latent, c.rms_norm_eps) if c.latent_moe_use_norm else nn.Identity()
        self.act = (c.hidden_act == "situ", c.activation_situ_beta, c.activation_situ_linear_beta)
        self.format = c.expert_format
        self.load: Tensor | None = None  # [E], choices per expert in the last training forward
        self.scores: Tensor | None = None  # [N, E], the router's scores in it
        self.note_choices = False  # whether the next forwards leave `choices`
        self.choices: Tensor | None = None  # int64 [N, k], the experts of each row
        self.replayed: Tensor | None = None  # int64 [N, k], what the next forwards take instead of choosing

    def forward(self, x: Tensor) -> Tensor:
        """x [N, d] -> [N, d]; each of N rows becomes k rows of width d or latent, sorted by expert, and one again."""
        op = ops.backend(x)
        logits = self.gate(x)
        if self.replayed is None:
            idx, p = op.route(logits, self.e_score_correction_bias, self.k, self.scale)
        else:
            idx, p = self.replayed, weigh(logits, self.replayed, self.scale)
        if self.note_choices:
            self.choices = idx
        if self.training:
            self.load, self.scores = torch.bincount(idx.flatten(), minlength=self.experts), logits.detach().sigmoid()
        h = self.routed_expert_down_proj(x) if self.latent else x
        h, offsets, where = op.dispatch(h, idx, self.experts)
        w_in, w_out = self.served(x)
        h = op.glu(op.experts_linear(h, offsets, w_in), *self.act)
        u = op.combine(op.experts_linear(h, offsets, w_out), where, p)
        if self.latent:
            u = self.routed_expert_up_proj(self.routed_expert_norm(u))
        return self.shared_experts(x) + u

    def served(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The experts' matrices [E, in, out] as they are computed with: rounded to the 4-bit format, where there is one.
        What records a forward instead of running it packs them itself; its `x` is no tensor."""
        if self.format is None or not isinstance(x, Tensor):
            return self.w_in, self.w_out
        rounded = quant.fake_quant if torch.is_grad_enabled() else quant.served
        return rounded(self.w_in, self.format, dim=1), rounded(self.w_out, self.format, dim=1)

    @torch.no_grad()
    def balance(self, method: str, rate: float) -> None:
        """Set the selection bias for the next step from the last forward: "sign" moves it by `rate`, "quantile" solves it."""
        if self.load is None:
            return
        if method == "sign":
            self.e_score_correction_bias += balance.sign_update(self.load, rate)
        else:
            self.e_score_correction_bias.copy_(balance.quantile_bias(self.scores, self.e_score_correction_bias, self.k))


class Mix(nn.Module):
    """Attention Residuals (K3 Eq. 8-10): the input of a sub-layer is an attention over the depth before it."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.norm, self.proj = RMSNorm(c.hidden_size, c.rms_norm_eps), Linear(c.hidden_size, 1)
        self.proj.weight.optim = "adamw"

    def forward(self, sources: list[Tensor]) -> Tensor:
        """Sources [N, d] in the order of depth -> [N, d], weighted by softmax over them of (norm w) . RMSNorm(source)."""
        w = wide(self.norm.weight) * wide(self.proj.weight[0])
        return ops.backend(sources[0]).mix(sources, w, self.norm.eps)
