"""Rotary positions: plain RoPE, and YaRN (arXiv 2309.00071) in the form of DeepSeek-V3."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from .config import Yarn


def yarn_mscale(factor: float, mscale: float) -> float:
    """0.1 mscale ln(factor) + 1 (YaRN Eq. 22, with DeepSeek's multiplier)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


@functools.cache
def frequencies(dim: int, theta: float, yarn: Yarn | None, device: torch.device) -> Tensor:
    """Angle per position of each of the dim/2 pairs, fp32 [dim/2].

    YaRN ("NTK by parts"): pairs that turn more than beta_fast times within the original context stay, those that turn
    less than beta_slow times are slowed by `factor`, a linear ramp between (over pair indices, bounds rounded outwards).
    """
    turns = 1.0 / (theta ** (torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim))
    if yarn is None:
        return turns

    def pair_turning(times: float) -> float:
        return dim * math.log(yarn.original_max_position_embeddings / (times * 2 * math.pi)) / (2 * math.log(theta))

    low, high = max(math.floor(pair_turning(yarn.beta_fast)), 0), min(math.ceil(pair_turning(yarn.beta_slow)), dim - 1)
    ramp = (torch.arange(dim // 2, device=device, dtype=torch.float32) - low) / (high - low if high != low else 1e-3)
    keep = 1 - ramp.clamp(0, 1)
    slowed = 1.0 / (yarn.factor * (theta ** (torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)))
    return slowed * (1 - keep) + turns * keep


class Rope:
    """Rotates interleaved pairs (x0, x1), (x2, x3), ... of a `dim`-wide part, as DeepSeek-V3 and K2 store them."""

    def __init__(self, dim: int, theta: float, yarn: Yarn | None) -> None:
        self.dim, self.theta, self.yarn = dim, theta, yarn
        if yarn is None:
            self.factor = self.softmax_scale = 1.0  # of cos and sin; of the attention logits
        else:
            top = yarn_mscale(yarn.factor, yarn.mscale_all_dim)
            both = yarn.mscale and yarn.mscale_all_dim
            self.factor = yarn_mscale(yarn.factor, yarn.mscale) / top if both else yarn_mscale(yarn.factor, 1.0)
            self.softmax_scale = top**2 if yarn.mscale_all_dim else 1.0

    def __call__(self, positions: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
        """positions int64 [N]; each part [N, ..., dim]."""
        cos, sin = self.turns(positions)
        return tuple(rotate(x, cos, sin) for x in parts)

    def turns(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines fp32 [N, dim / 2] of positions int64 [N]."""
        angle = positions.float()[:, None] * frequencies(self.dim, self.theta, self.yarn, positions.device)
        return angle.cos() * self.factor, angle.sin() * self.factor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [N, ..., D], cos and sin [N, D/2]."""
    cos, sin = (f.view(-1, *[1] * (x.dim() - 2), f.shape[-1]) for f in (cos, sin))
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)
