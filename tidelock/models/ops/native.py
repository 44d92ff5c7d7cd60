"""The C kernels as PyTorch operations: one thin autograd function each.

Every function here has a namesake in `reference` that says in plain PyTorch what it computes; `tests/models` holds the
two against each other. Tensors are fp32 and contiguous; `seq` is a `Batch` (packed sequences).
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import Function

from . import latent, reference
from .build import library

_BLOCKS = 16  # BLOCKS in c/common.h
_MARK = 32  # MARK in c/kda.c
_F, _L = ctypes.c_float, ctypes.c_long


class _Pointer(ctypes.c_void_p):
    """A pointer that keeps its tensor alive until the call returns."""

    tensor: Tensor


def _p(t: Tensor | None) -> _Pointer | None:
    if t is None:
        return None
    pointer = _Pointer(t.data_ptr())
    pointer.tensor = t
    return pointer


def _pack(owner: Tensor, key: tuple, make: Callable[[], Tensor]) -> Tensor:
    """A re-laid-out copy of a weight, kept on it and made again only when the optimizer (or a load) has changed it."""
    entry = getattr(owner, "_packed", None)
    if entry is None or entry[0] != key:
        entry = owner._packed = (key, make())
    return entry[1]


def _run(fn: type[Function], *args):
    """Skip autograd's bookkeeping when nothing asks for gradients: decode steps are made of hundreds of small calls."""
    return fn.apply(*args) if torch.is_grad_enabled() else fn.forward(None, *args)


class _Linear(Function):
    @staticmethod
    def forward(ctx, x, *weights):
        key = tuple((w._version, w.data_ptr()) for w in weights)
        wt = _pack(weights[0], key, lambda: torch.cat([w.detach() for w in weights]).t().contiguous())
        out = x.new_empty(x.shape[0], wt.shape[1])
        library().tl_linear(_L(x.shape[0]), _L(wt.shape[1]), _L(x.shape[1]), _p(x), _p(wt), _p(out))
        if ctx is not None:
            ctx.save_for_backward(x, wt)
            ctx.sizes = [w.shape[0] for w in weights]
        return out

    @staticmethod
    def backward(ctx, dy):
        x, wt = ctx.saved_tensors
        dx = dy @ wt.t() if ctx.needs_input_grad[0] else None
        return (dx, *(dy.t() @ x).split(ctx.sizes))


def linear(x: Tensor, *weights: Tensor) -> Tensor:
    return _run(_Linear, x.contiguous(), *weights)


class _HeadLinear(Function):
    @staticmethod
    def forward(ctx, x, w):
        out = x.new_empty(x.shape[0], w.shape[0], w.shape[2])
        m, h, k = x.shape
        library().tl_head_linear(_L(m), _L(h), _L(w.shape[2]), _L(k), _p(x), _p(w), _p(out))
        if ctx is not None:
            ctx.save_for_backward(x, w)
        return out

    @staticmethod
    def backward(ctx, dy):
        x, w = ctx.saved_tensors
        dx = torch.bmm(dy.transpose(0, 1), w.transpose(1, 2)).transpose(0, 1).contiguous()
        return dx, torch.bmm(x.permute(1, 2, 0), dy.transpose(0, 1))


def head_linear(x: Tensor, w: Tensor) -> Tensor:
    return _run(_HeadLinear, x.contiguous(), w.contiguous())


class _ExpertsLinear(Function):
    @staticmethod
    def forward(ctx, x, offsets, w):
        out = x.new_empty(x.shape[0], w.shape[2])
        e, k, n = w.shape
        library().tl_grouped_linear(_L(e), _p(offsets), _L(n), _L(k), _p(x), _p(w), _p(out))
        if ctx is not None:
            ctx.save_for_backward(x, offsets, w)
        return out

    @staticmethod
    def backward(ctx, dy):
        x, offsets, w = ctx.saved_tensors
        dy, wt = dy.contiguous(), w.transpose(1, 2).contiguous()
        e, k, n = w.shape
        dx, dw = torch.empty_like(x), torch.empty_like(w)
        library().tl_grouped_linear(_L(e), _p(offsets), _L(k), _L(n), _p(dy), _p(wt), _p(dx))
        library().tl_grouped_linear_dw(_L(e), _p(offsets), _L(n), _L(k), _p(x), _p(dy), _p(dw))
        return dx, None, dw


def experts_linear(x: Tensor, offsets: Tensor, w: Tensor) -> Tensor:
    return _run(_ExpertsLinear, x, offsets, w)


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx, x, w, eps, gate):
        y, rstd = torch.empty_like(x), x.new_empty(x.numel() // x.shape[-1])
        d = x.shape[-1]
        library().tl_rmsnorm(_L(rstd.numel()), _L(d), _p(x), _L(d), _p(w), _p(gate), _F(eps), _p(y), _L(d), _p(rstd))
        if ctx is not None:
            ctx.save_for_backward(x, w, gate, rstd)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, w, gate, rstd = ctx.saved_tensors
        dx, dgate = torch.empty_like(x), None if gate is None else torch.empty_like(gate)
        dw, d = x.new_empty(_BLOCKS, x.shape[-1]), x.shape[-1]
        library().tl_rmsnorm_bwd(_L(rstd.numel()), _L(d), _p(x), _p(w), _p(gate), _p(rstd), _p(dy.contiguous()),
                                 _p(dx), _p(dgate), _p(dw))
        return dx, dw.sum(0), None, dgate


def rms_norm(x: Tensor, w: Tensor, eps: float, gate: Tensor | None = None) -> Tensor:
    return _run(_RMSNorm, x.contiguous(), w, eps, gate)


class _SigmoidGate(Function):
    @staticmethod
    def forward(ctx, x, g):
        y = torch.empty_like(x)
        library().tl_sigmoid_gate(_L(x.numel()), _p(x), _p(g), _p(y))
        if ctx is not None:
            ctx.save_for_backward(x, g)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, g = ctx.saved_tensors
        dx, dg = torch.empty_like(x), torch.empty_like(g)
        library().tl_sigmoid_gate_bwd(_L(x.numel()), _p(x), _p(g), _p(dy.contiguous()), _p(dx), _p(dg))
        return dx, dg


def sigmoid_gate(x: Tensor, g: Tensor) -> Tensor:
    return _run(_SigmoidGate, x.contiguous(), g.contiguous())


class _GLU(Function):
    @staticmethod
    def forward(ctx, h, situ, beta, linear_beta):
        y = h.new_empty(h.shape[0], h.shape[1] // 2)
        library().tl_glu(_L(y.shape[0]), _L(y.shape[1]), int(situ), _F(beta), _F(linear_beta), _p(h), _p(y))
        if ctx is not None:
            ctx.save_for_backward(h)
            ctx.args = (situ, beta, linear_beta)
        return y

    @staticmethod
    def backward(ctx, dy):
        (h,), (situ, beta, linear_beta) = ctx.saved_tensors, ctx.args
        dh = torch.empty_like(h)
        library().tl_glu_bwd(_L(dy.shape[0]), _L(dy.shape[1]), int(situ), _F(beta), _F(linear_beta), _p(h),
                             _p(dy.contiguous()), _p(dh))
        return dh, None, None, None


def glu(h: Tensor, situ: bool, beta: float, linear_beta: float) -> Tensor:
    return _run(_GLU, h, situ, beta, linear_beta)


class _Route(Function):
    @staticmethod
    def forward(ctx, logits, bias, k, scale):
        m, e = logits.shape
        idx, p = torch.empty(m, k, dtype=torch.int64), logits.new_empty(m, k)
        library().tl_router(_L(m), _L(e), _L(k), _p(logits), _p(bias), _F(scale), _p(idx), _p(p))
        if ctx is not None:
            ctx.save_for_backward(logits, idx, p)
            ctx.scale = scale
            ctx.mark_non_differentiable(idx)
        return idx, p

    @staticmethod
    def backward(ctx, _, dp):
        logits, idx, p = ctx.saved_tensors
        s = torch.sigmoid(logits.gather(1, idx))
        q = p / ctx.scale
        ds = ctx.scale * (dp - (dp * q).sum(1, keepdim=True)) / s.sum(1, keepdim=True)
        return torch.zeros_like(logits).scatter_(1, idx, ds * s * (1 - s)), None, None, None


def route(logits: Tensor, bias: Tensor, k: int, scale: float) -> tuple[Tensor, Tensor]:
    return _run(_Route, logits, bias, k, scale)


class _Dispatch(Function):
    @staticmethod
    def forward(ctx, x, where, k):
        xs = x.new_empty(where.numel(), x.shape[1])
        library().tl_scatter(_L(x.shape[0]), _L(k), _L(x.shape[1]), _p(x), _p(where), None, _p(xs))
        if ctx is not None:
            ctx.save_for_backward(where)
            ctx.k = k
        return xs

    @staticmethod
    def backward(ctx, dxs):
        (where,) = ctx.saved_tensors
        dx = dxs.new_empty(where.numel() // ctx.k, dxs.shape[1])
        library().tl_combine(_L(dx.shape[0]), _L(ctx.k), _L(dx.shape[1]), _p(dxs.contiguous()), _p(where), None, _p(dx))
        return dx, None, None


def dispatch(x: Tensor, idx: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    where, offsets = torch.empty_like(idx), torch.empty(experts + 1, dtype=torch.int64)
    library().tl_dispatch(_L(idx.numel()), _L(experts), _p(idx), _p(where), _p(offsets))
    return _run(_Dispatch, x.contiguous(), where, idx.shape[1]), offsets, where


class _Combine(Function):
    @staticmethod
    def forward(ctx, xs, where, p):
        y = xs.new_empty(p.shape[0], xs.shape[1])
        library().tl_combine(_L(p.shape[0]), _L(p.shape[1]), _L(xs.shape[1]), _p(xs), _p(where), _p(p), _p(y))
        if ctx is not None:
            ctx.save_for_backward(xs, where, p)
        return y

    @staticmethod
    def backward(ctx, dy):
        xs, where, p = ctx.saved_tensors
        dy, dxs, dp = dy.contiguous(), torch.empty_like(xs), torch.empty_like(p)
        (m, k), d = p.shape, xs.shape[1]
        library().tl_scatter(_L(m), _L(k), _L(d), _p(dy), _p(where), _p(p), _p(dxs))
        library().tl_combine_dp(_L(m), _L(k), _L(d), _p(xs), _p(where), _p(dy), _p(dp))
        return dxs, None, dp


def combine(xs: Tensor, where: Tensor, p: Tensor) -> Tensor:
    return _run(_Combine, xs, where, p)


class _ShortConv(Function):
    @staticmethod
    def forward(ctx, x, w, seq, tails):
        wt, y = _pack(w, (w._version, w.data_ptr()), lambda: w.detach().t().contiguous()), torch.empty_like(x)
        slots = None if tails is None else seq.slots
        library().tl_conv(_L(seq.n), _p(seq.cu), _p(seq.start), _p(slots), _L(wt.shape[0]), _L(x.shape[1]), _p(x),
                          _p(wt), _p(tails), _p(y))
        if ctx is not None:
            ctx.save_for_backward(x, wt)
            ctx.seq = seq
        return y

    @staticmethod
    def backward(ctx, dy):
        (x, wt), seq = ctx.saved_tensors, ctx.seq
        dx, scratch, dw = torch.empty_like(x), torch.empty_like(x), x.new_empty(_BLOCKS, *wt.shape)
        library().tl_conv_bwd(_L(seq.n), _p(seq.cu), _L(wt.shape[0]), _L(x.shape[1]), _p(x), _p(wt),
                              _p(dy.contiguous()), _p(dx), _p(dw), _p(scratch))
        return dx, dw.sum(0).t(), None, None


def short_conv(x: Tensor, w: Tensor, seq, tails: Tensor | None) -> Tensor:
    return _run(_ShortConv, x, w, seq, tails)


class _KDAGate(Function):
    @staticmethod
    def forward(ctx, z, dt_bias, a_log, lower):
        h = a_log.numel()
        g = z.new_empty(z.shape[0], h, z.shape[1] // h)
        library().tl_kda_gate(_L(g.shape[0]), _L(h), _L(g.shape[2]), _p(z), _p(dt_bias), _p(a_log), _F(lower), _p(g))
        if ctx is not None:
            ctx.save_for_backward(z, dt_bias, a_log, g)
            ctx.lower = lower
        return g

    @staticmethod
    def backward(ctx, dg):
        z, dt_bias, a_log, g = ctx.saved_tensors
        (m, h, d), dz, dg = g.shape, torch.empty_like(z), dg.contiguous()
        library().tl_kda_gate_bwd(_L(m), _L(h), _L(d), _p(z), _p(dt_bias), _p(a_log), _F(ctx.lower), _p(dg), _p(dz))
        # dg/dA: bounded, it enters as exp(A) y like y itself; unbounded, g is proportional to exp(A).
        da = (dz * (z + dt_bias)).view(m, h, d) if ctx.lower < 0 else dg * g
        return dz, dz.sum(0), da.sum((0, 2)), None


def kda_gate(z: Tensor, dt_bias: Tensor, a_log: Tensor, lower: float | None) -> Tensor:
    return _run(_KDAGate, z.contiguous(), dt_bias, a_log, lower or 0.0)


class _KDA(Function):
    @staticmethod
    def forward(ctx, qkv, g, beta, seq, states):
        n, _, h, d = qkv.shape
        o = qkv.new_empty(n, h, d)
        marks = offsets = None
        if ctx is not None:
            counts = (seq.cu[1:] - seq.cu[:-1] + _MARK - 1) // _MARK
            offsets = (counts.cumsum(0) - counts).to(torch.int32)
            marks = qkv.new_empty(int(counts.sum()), h, d, d)
            ctx.save_for_backward(qkv, g, beta, marks, offsets)
            ctx.seq = seq
        slots = None if states is None else seq.slots
        library().tl_kda(_L(seq.n), _p(seq.cu), _p(seq.start), _p(slots), _L(h), _L(d), _p(qkv), _p(g), _p(beta),
                         _p(states), _p(o), _p(marks), _p(offsets))
        return o

    @staticmethod
    def backward(ctx, do):
        (qkv, g, beta, marks, offsets), seq = ctx.saved_tensors, ctx.seq
        _, _, h, d = qkv.shape
        dqkv, dg, dbeta = torch.empty_like(qkv), torch.empty_like(g), torch.empty_like(beta)
        library().tl_kda_bwd(_L(seq.n), _p(seq.cu), _L(h), _L(d), _p(qkv), _p(g), _p(beta), _p(marks), _p(offsets),
                             _p(do.contiguous()), _p(dqkv), _p(dg), _p(dbeta))
        return dqkv, dg, dbeta, None, None


def kda(qkv: Tensor, g: Tensor, beta: Tensor, seq, states: Tensor | None) -> Tensor:
    return _run(_KDA, qkv, g, beta.contiguous(), seq, states)


class _MLA(Function):
    @staticmethod
    def forward(ctx, q, rows, rank, seq, pages):
        n, h, d = q.shape
        out, top = q.new_empty(n, h, rank), q.new_empty(seq.n, h) if ctx is not None else None
        p, maxp = (pages.shape[1], seq.table.shape[1]) if pages is not None else (0, 0)
        table = None if pages is None else seq.table
        library().tl_mla(_L(seq.n), _p(seq.cu), _p(seq.start), _L(h), _L(d), _L(rank), _p(q), _p(rows), _p(pages),
                         _p(table), _L(p), _L(maxp), _p(out), _p(top))
        if ctx is None:
            return out, None
        ctx.save_for_backward(q, rows, out)
        ctx.args = (rank, seq)
        top = top.amax(0)
        ctx.mark_non_differentiable(top)
        return out, top

    @staticmethod
    def backward(ctx, dout, _):
        (q, rows, out), (rank, seq) = ctx.saved_tensors, ctx.args
        n, h, d = q.shape
        dq, drows = torch.empty_like(q), torch.empty_like(rows)
        library().tl_mla_bwd(_L(seq.n), _p(seq.cu), _L(h), _L(d), _L(rank), _p(q), _p(rows), _p(out),
                             _p(dout.contiguous()), _p(dq), _p(drows))
        return dq, drows, None, None, None


concat = reference.concat
latent_rows = functools.partial(latent.latent_rows, rms_norm)
absorb = functools.partial(latent.absorb, head_linear)
expand = functools.partial(latent.expand, head_linear)
write_pages = latent.write_pages


def mla(q: Tensor, rows: Tensor, rank: int, seq, pages: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return _run(_MLA, q.contiguous(), rows.contiguous(), rank, seq, pages)


class _Mix(Function):
    @staticmethod
    def forward(ctx, w, eps, *sources):
        (m, d), j = sources[0].shape, len(sources)
        h, p, rstd = torch.empty_like(sources[0]), sources[0].new_empty(m, j), sources[0].new_empty(m, j)
        pointers = (ctypes.c_void_p * j)(*[s.data_ptr() for s in sources])
        library().tl_attnres(_L(m), _L(d), _L(j), pointers, _p(w), _F(eps), _p(h), _p(p), _p(rstd))
        if ctx is not None:
            ctx.save_for_backward(w, p, rstd, *sources)
        return h

    @staticmethod
    def backward(ctx, dh):
        w, p, rstd, *sources = ctx.saved_tensors
        (m, d), j = sources[0].shape, len(sources)
        grads, dw = [torch.empty_like(s) for s in sources], w.new_empty(_BLOCKS, d)
        v = (ctypes.c_void_p * j)(*[s.data_ptr() for s in sources])
        dv = (ctypes.c_void_p * j)(*[g.data_ptr() for g in grads])
        library().tl_attnres_bwd(_L(m), _L(d), _L(j), v, _p(w), _p(p), _p(rstd), _p(dh.contiguous()), dv, _p(dw))
        return dw.sum(0), None, *grads


def mix(sources: Sequence[Tensor], w: Tensor, eps: float) -> Tensor:
    return _run(_Mix, w.contiguous(), eps, *[s.contiguous() for s in sources])
