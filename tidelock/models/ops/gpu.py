"""What a GPU computes by other means than `reference`, from which everything else here comes unchanged.

KDA runs on flash-linear-attention's kernels where that library is installed, attention on PyTorch's SDPA, the experts on
its grouped matrix product, and the convolution without a loop over sequences. All but KDA's kernels run on a CPU too,
and the tests hold them to `reference` there; how KDA's arguments are prepared is tested against a CPU function that keeps
`chunk_kda`'s documented contract. **Nothing in this file has been run on a GPU.** `TIDELOCK_FLA=0` keeps the plain KDA.
"""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, silu

from . import reference
from .reference import wide

TOP_ROWS = 1024  # queries whose scores are formed at a time when only their maximum is wanted


@functools.cache
def fla() -> ModuleType | None:
    """`fla.ops.kda` of flash-linear-attention (0.4 or newer), or None where it is not installed or not wanted."""
    if os.environ.get("TIDELOCK_FLA", "1") == "0":
        return None
    try:
        return importlib.import_module("fla.ops.kda")
    except ImportError:
        return None


def __getattr__(name: str):
    """Every operation that is not defined here."""
    return getattr(reference, name)


def kda(qkv: Tensor, g: Tensor, beta: Tensor, seq, states: Tensor | None) -> Tensor:
    """As `reference.kda`. FLA takes the packed batch whole: q, k, v, g [1, N, H, D], write strengths [1, N, H], one fp32
    state [H, K, V] per sequence; it normalises q and k (eps 1e-6) and scales q by D^-1/2 itself."""
    kernels, (n, _, _, d) = fla(), qkv.shape
    if kernels is None or d > 256 or qkv.dtype == torch.float64:
        return reference.kda(qkv, g, beta, seq, states)
    q, k, v = (x[None].contiguous() for x in qkv.unbind(1))
    first = None
    if states is not None:  # sequences that begin here begin from nothing, whatever their slot holds
        first = states[seq.slots.long()].float() * (seq.start > 0).to(torch.float32)[:, None, None, None]
    decoding = n == seq.n and not torch.is_grad_enabled()  # one token each: the recurrent form
    rule = kernels.fused_recurrent_kda if decoding else kernels.chunk_kda
    o, last = rule(
        q, k, v, wide(g)[None].contiguous(), torch.sigmoid(wide(beta))[None].contiguous(),
        initial_state=first, output_final_state=states is not None, use_qk_l2norm_in_kernel=True, cu_seqlens=seq.cu.long(),
    )  # fmt: skip
    if states is not None:
        states[seq.slots.long()] = last.to(states.dtype)
    return o[0]


def mla(q: Tensor, rows: Tensor, rank: int, seq, pages: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """As `reference.mla`, the softmax fused: all heads share one key row per token, so queries [1, H, n, D] meet keys
    [1, 1, t, D] and values [1, 1, t, rank]. The largest logit, which a fused softmax does not tell, is formed for
    training only (QK-Clip), a block of queries at a time."""
    if pages is not None and q.shape[0] == seq.n:
        return _decode(q, rank, seq, pages), None
    out, top = [], []
    for s, (a, b, start) in enumerate(reference._spans(seq)):
        keys = rows[a:b] if pages is None else pages[seq.table[s].long()].flatten(0, 1)[: start + b - a].to(q.dtype)
        mask = None
        if start:
            mask = torch.arange(start + b - a, device=q.device) <= start + torch.arange(b - a, device=q.device)[:, None]
        out.append(_attend(q[a:b].transpose(0, 1)[None], keys[None, None], rank, mask)[0].transpose(0, 1))
        if torch.is_grad_enabled():
            top.append(_largest(q[a:b].detach(), keys.detach(), start))
    return torch.cat(out), torch.stack(top).amax(0) if top else None


def _attend(q: Tensor, keys: Tensor, rank: int, mask: Tensor | None) -> Tensor:
    """q [B, H, n, D] over keys [B, 1, t, D] -> fp32 [B, H, n, rank]; causal where no mask says otherwise.

    SDPA rounds its output to the dtype of its input, and training wants it in fp32 (K3 §2.2), so there it gets fp32.
    """
    if torch.is_grad_enabled():
        q, keys = wide(q), wide(keys)
    keys = keys.expand(-1, q.shape[1], -1, -1)
    return wide(scaled_dot_product_attention(q, keys, keys[..., :rank], mask, is_causal=mask is None, scale=1.0))


def _decode(q: Tensor, rank: int, seq, pages: Tensor) -> Tensor:
    """One new token per sequence, all sequences in one call: q [S, H, D] over the pages of each, the rest masked."""
    keys = pages[seq.table.long()].flatten(1, 2).to(q.dtype)  # [S, P * page_size, D]
    seen = torch.arange(keys.shape[1], device=q.device) <= seq.start.long()[:, None]
    longest = int(seq.start.max()) + 1
    return _attend(q[:, :, None], keys[:, None, :longest], rank, seen[:, None, None, :longest])[:, :, 0]


def _largest(q: Tensor, keys: Tensor, start: int) -> Tensor:
    """The largest causal logit of each head [H]; q [n, H, D], keys [t, D]."""
    top = []
    for a in range(0, q.shape[0], TOP_ROWS):
        scores = torch.einsum("nhd,td->hnt", wide(q[a : a + TOP_ROWS]), wide(keys))
        last = start + a + torch.arange(scores.shape[1], device=q.device)
        future = torch.arange(keys.shape[0], device=q.device) > last[:, None]
        top.append(scores.masked_fill(future, float("-inf")).amax((1, 2)))
    return torch.stack(top).amax(0)


def short_conv(x: Tensor, w: Tensor, seq, tails: Tensor | None) -> Tensor:
    """As `reference.short_conv`: tap by tap for all rows at once, what lies before a sequence's rows read from its tail."""
    width, n = w.shape[1], x.shape[0]
    cu, rows = seq.cu.long(), torch.arange(n, device=x.device)
    owner = torch.repeat_interleave(cu[1:] - cu[:-1], output_size=n)
    inside = rows - cu[:-1][owner]  # position among the new rows of its sequence
    wide_x, before = wide(x), torch.zeros(seq.n, width - 1, x.shape[1], dtype=wide(x).dtype, device=x.device)
    if tails is not None:
        before = tails[seq.slots.long()].to(before.dtype) * (seq.start > 0).to(before.dtype)[:, None, None]
    y = wide(w)[:, -1] * wide_x
    for back in range(1, width):
        earlier = wide_x[(rows - back).clamp(min=0)]
        from_tail = before[owner, (width - 1 + inside - back).clamp(max=width - 2)]
        y = y + wide(w)[:, width - 1 - back] * torch.where((inside >= back)[:, None], earlier, from_tail)
    if tails is not None:
        lengths = cu[1:] - cu[:-1]
        at = lengths[:, None] + torch.arange(width - 1, device=x.device)  # of [tail | rows], the last width - 1
        new = wide_x[(cu[:-1, None] + at - (width - 1)).clamp(0, n - 1)]
        old = before.gather(1, at.clamp(max=width - 2)[..., None].expand(-1, -1, x.shape[1]))
        tails[seq.slots.long()] = torch.where((at >= width - 1)[..., None], new, old).to(tails.dtype)
    return silu(y).to(x.dtype)
