"""Every model operation in plain PyTorch, written as its equation: the oracle of the C kernels, and the path taken on
other devices or where no compiler is found. Slower, and not bitwise independent of the batch; never different in meaning.

In a model of half precision the islands stay fp32 (`wide`): norms, router, the nonlinearity of the experts, the mixing of
Attention Residuals, and of KDA the convolution, decay, recurrence and output norm; attention is fp32 up to its output.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from . import delta, latent


def wide(x: Tensor) -> Tensor:
    """fp32, or float64 where it is that already."""
    return x if x.dtype == torch.float64 else x.float()


def linear(x: Tensor, *weights: Tensor) -> Tensor:
    """x [M, K], weights [N_i, K] -> [M, sum N_i], in the dtype of the weights (an fp32 router reads half-precision rows)."""
    return torch.cat([x.to(w.dtype) @ w.t() for w in weights], dim=-1)


def concat(a: Tensor, b: Tensor) -> Tensor:
    """[N, n], [N, m] -> [N, n + m]."""
    return torch.cat([a, b], dim=-1)


def head_linear(x: Tensor, w: Tensor) -> Tensor:
    """x [M, H, K], w [H, K, N] -> [M, H, N], in the dtype of x (attention's output is fp32 until W_o, K3 §2.2)."""
    return torch.einsum("mhk,hkn->mhn", x, w.to(x.dtype))


def experts_linear(x: Tensor, offsets: Tensor, w: Tensor) -> Tensor:
    """x [rows sorted by expert, K], offsets [E + 1], w [E, K, N] -> [rows, N]."""
    if x.dtype == torch.float64:  # which the grouped product has not
        return torch.cat([x[a:b] @ w[e] for e, (a, b) in enumerate(itertools.pairwise(offsets.tolist()))])
    return torch.nn.functional.grouped_mm(x, w, offs=offsets[1:].to(torch.int32))


def rms_norm(x: Tensor, w: Tensor, eps: float, gate: Tensor | None = None) -> Tensor:
    """x / rms(x) * w, times sigmoid(gate) when given. Over the last dimension."""
    y = wide(x)
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps) * wide(w)
    return (y if gate is None else y * torch.sigmoid(wide(gate))).to(x.dtype)


def sigmoid_gate(x: Tensor, g: Tensor) -> Tensor:
    """x * sigmoid(g), in the dtype of x."""
    return x * torch.sigmoid(g.to(x.dtype))


def glu(h: Tensor, situ: bool, beta: float, linear_beta: float) -> Tensor:
    """h [M, 2F] = [gate | up]. SwiGLU, or SiTU-GLU (K3 Eq. 12): beta tanh(g/beta) sigmoid(g) * lb tanh(u/lb)."""
    g, u = wide(h).chunk(2, dim=-1)
    s = torch.sigmoid(g)
    if situ:
        g, u = beta * torch.tanh(g / beta), linear_beta * torch.tanh(u / linear_beta)
    return (g * s * u).to(h.dtype)


def route(logits: Tensor, bias: Tensor, k: int, scale: float) -> tuple[Tensor, Tensor]:
    """K3 Eq. 13: choose top-k of sigmoid(logits) + bias; weights are the unbiased scores, renormalised. At least fp32."""
    idx = (torch.sigmoid(wide(logits)) + bias).topk(k, dim=-1).indices
    return idx, weigh(logits, idx, scale)


def weigh(logits: Tensor, idx: Tensor, scale: float) -> Tensor:
    """K3 Eq. 13, of experts that are chosen already: what each of idx [M, k] weighs."""
    p = torch.sigmoid(wide(logits)).gather(1, idx)
    return p / (p.sum(1, keepdim=True) + 1e-20) * scale


def dispatch(x: Tensor, idx: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Copies of the rows of x sorted by expert, the experts' offsets [E + 1], and where each choice went [M, k]."""
    order = idx.flatten().argsort(stable=True)
    where = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=x.device)).view_as(idx)
    counts = torch.bincount(idx.flatten(), minlength=experts)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return x[order // idx.shape[1]], offsets, where


def combine(xs: Tensor, where: Tensor, p: Tensor) -> Tensor:
    """y[m] = sum_j p[m, j] xs[where[m, j]]."""
    return (xs[where] * p[..., None]).sum(1).to(xs.dtype)


def _spans(seq) -> list[tuple[int, int, int]]:
    cu, start = seq.cu.tolist(), seq.start.tolist()
    return [(a, b, s) for a, b, s in zip(cu, cu[1:], start)]


def short_conv(x: Tensor, w: Tensor, seq, tails: Tensor | None) -> Tensor:
    """silu(causal depthwise convolution) per sequence. x [N, C], w [C, W], tails [slots, W - 1, C] (updated)."""
    dtype, width, out = x.dtype, w.shape[1], []
    x, w = wide(x), wide(w)
    for s, (a, b, start) in enumerate(_spans(seq)):
        past = x.new_zeros(width - 1, x.shape[1])
        if tails is not None and start:
            past = tails[seq.slots[s]]
        padded = torch.cat([past, x[a:b]])
        pre = sum(w[:, j] * padded[j : j + b - a] for j in range(width))
        out.append(torch.nn.functional.silu(pre))
        if tails is not None:
            tails[seq.slots[s]] = padded[b - a :].to(tails.dtype)
    return torch.cat(out).to(dtype)


def kda_gate(z: Tensor, dt_bias: Tensor, a_log: Tensor, lower: float | None) -> Tensor:
    """Log-decay of every channel, y = z + dt: lower sigmoid(exp(A) y) (K3 Eq. 4) or, without a lower bound,
    -exp(A) softplus(y) (Kimi Linear Eq. 2). z [N, H*D], dt_bias [H*D], a_log [H] -> [N, H, D] in fp32 or wider."""
    y, a = (wide(z) + wide(dt_bias)).unflatten(-1, (a_log.numel(), -1)), wide(a_log).exp()[:, None]
    return lower * torch.sigmoid(a * y) if lower else -a * torch.nn.functional.softplus(y)


def kda(qkv: Tensor, g: Tensor, beta: Tensor, seq, states: Tensor | None) -> Tensor:
    """Kimi Delta Attention: q and k L2-normalised, q scaled by D^-1/2, write strength sigmoid(beta); see `delta`.

    qkv [N, 3, H, D], g [N, H, D], beta [N, H] (logits), states [slots, H, D, D] (updated). Returns o [N, H, D].
    """
    _, _, h, d = qkv.shape
    q, k, v = wide(qkv).unbind(1)
    q = q * torch.rsqrt(q.pow(2).sum(-1, keepdim=True) + 1e-6) * d**-0.5
    k = k * torch.rsqrt(k.pow(2).sum(-1, keepdim=True) + 1e-6)
    b, out = torch.sigmoid(wide(beta)), []
    for s, (lo, hi, start) in enumerate(_spans(seq)):
        state = states[seq.slots[s]].to(q.dtype) if states is not None and start else q.new_zeros(h, d, d)
        rule = delta.recurrent if hi - lo == 1 else delta.chunkwise
        o, state = rule(q[lo:hi], k[lo:hi], v[lo:hi], g[lo:hi], b[lo:hi], state)
        out.append(o)
        if states is not None:
            states[seq.slots[s]] = state.to(states.dtype)
    return torch.cat(out).to(qkv.dtype)


latent_rows = functools.partial(latent.latent_rows, rms_norm)
absorb = functools.partial(latent.absorb, head_linear)
expand = functools.partial(latent.expand, head_linear)
write_pages = latent.write_pages


def mla(q: Tensor, rows: Tensor, rank: int, seq, pages: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Absorbed multi-head latent attention: q [N, H, D] (scaled) over shared rows [T, D] = [latent | rope key].

    Returns softmax(q . row) row[:rank] as [N, H, rank], at least fp32 (K3 §2.2), and the largest logit per head [H].
    """
    q, rows, out, top = wide(q), wide(rows), [], []
    for s, (a, b, start) in enumerate(_spans(seq)):
        keys = rows[a:b]
        if pages is not None:
            keys = pages[seq.table[s].long()].flatten(0, 1)[: start + b - a].to(q.dtype)
        scores = torch.einsum("nhd,td->hnt", q[a:b], keys)
        future = torch.arange(keys.shape[0], device=q.device) > start + torch.arange(b - a, device=q.device)[:, None]
        scores = scores.masked_fill(future, float("-inf"))
        top.append(scores.detach().amax((1, 2)))
        out.append(torch.einsum("hnt,tr->nhr", scores.softmax(-1), keys[:, :rank]))
    return torch.cat(out), torch.stack(top).amax(0)


def mix(sources: Sequence[Tensor], w: Tensor, eps: float) -> Tensor:
    """Attention Residuals (K3 Eq. 8-10): softmax over sources of w . RMSNorm(source), values not normalised."""
    v = wide(torch.stack(list(sources), dim=1))
    logits = (v * torch.rsqrt(v.pow(2).mean(-1, keepdim=True) + eps) * wide(w)).sum(-1)
    return torch.einsum("mj,mjd->md", logits.softmax(-1), v).to(sources[0].dtype)
