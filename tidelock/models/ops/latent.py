"""The steps of multi-head latent attention around its softmax, out of norms, per-head products and rotations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..rope import Rope


@dataclass(frozen=True)
class Latent:
    """Widths: `heads` queries of nope + rope, keys and values of nope + value, one row of rank + rope per token."""

    heads: int
    rank: int
    nope: int
    rope: int
    value: int

    def up(self, kv_b: Tensor) -> tuple[Tensor, Tensor]:
        """kv_b [H * (nope + value), rank] -> W_uk [H, nope, rank], W_uv [H, value, rank]."""
        return kv_b.view(self.heads, -1, self.rank).split([self.nope, self.value], dim=1)


def latent_rows(rms_norm: Callable, kv: Tensor, w: Tensor, eps: float, at: Latent, rope: Rope | None, batch) -> Tensor:
    """kv [N, rank + rope] -> [RMSNorm(latent) | rotated key], what is cached of a token."""
    latent, key = kv.split([at.rank, at.rope], dim=-1)
    if rope is not None:
        (key,) = rope(batch.positions(), key)
    return torch.cat([rms_norm(latent, w, eps), key], dim=-1)


def absorb(head_linear: Callable, q: Tensor, kv_b: Tensor, at: Latent, rope: Rope | None, scale: float, batch) -> Tensor:
    """q [N, H * (nope + rope)] -> [N, H, rank + rope]: [q_nope W_uk | rotated q_rope] * scale, to meet cached rows."""
    nope, turned = q.view(q.shape[0], at.heads, -1).split([at.nope, at.rope], dim=-1)
    if rope is not None:
        (turned,) = rope(batch.positions(), turned)
    return torch.cat([head_linear(nope, at.up(kv_b)[0]), turned], dim=-1) * scale


def expand(head_linear: Callable, o: Tensor, kv_b: Tensor, at: Latent) -> Tensor:
    """Attended latents [N, H, rank] -> [N, H * value]."""
    return head_linear(o, at.up(kv_b)[1].transpose(1, 2)).flatten(1)


def write_pages(pages: Tensor, rows: Tensor, batch) -> None:
    """Put new rows [N, D] at their positions in the pages of their sequences."""
    size, position = pages.shape[1], batch.positions()
    owner = torch.repeat_interleave(batch.cu[1:] - batch.cu[:-1])
    page = batch.table[owner, position // size].long()
    pages.view(-1, pages.shape[-1])[page * size + position % size] = rows.to(pages.dtype)
