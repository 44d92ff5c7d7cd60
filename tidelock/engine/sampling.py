"""From logits to tokens. A draw depends on the request's seed and the position alone, never on the batch."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def uniform(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """One number in [0, 1) per (seed, position): SplitMix64. uint64 in, float64 out."""
    with np.errstate(over="ignore"):
        x = seeds + (positions + np.uint64(1)) * GOLDEN
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    return (x >> np.uint64(11)).astype(np.float64) * 2.0**-53


def sample(
    logits: Tensor, temperatures: np.ndarray, top_ps: np.ndarray, seeds: np.ndarray, positions: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """logits fp32 [B, V] -> (ids int64 [B], logprobs fp32 [B]).

    Temperature 0 is greedy. The log-probability is that of the raw logits (temperature 1, nothing cut off), the same
    `log_softmax` the trainer differentiates; a row that is not finite yields NaN.
    """
    ids = logits.argmax(dim=-1)
    warm = np.flatnonzero(temperatures > 0)
    if warm.size:
        scores = logits[torch.from_numpy(warm)].numpy().astype(np.float64) / temperatures[warm, None]
        p = np.exp(scores - scores.max(axis=1, keepdims=True))
        if (top_ps[warm] < 1).any():
            p = _nucleus(p, top_ps[warm])
        edges = np.cumsum(p, axis=1)
        target = uniform(seeds[warm], positions[warm]) * edges[:, -1]
        drawn = (edges <= target[:, None]).sum(axis=1)
        ids[torch.from_numpy(warm)] = torch.from_numpy(np.minimum(drawn, logits.shape[1] - 1))
    logprobs = torch.log_softmax(logits, dim=-1).gather(1, ids[:, None])[:, 0]
    return ids.numpy(), logprobs.numpy()


def _nucleus(p: np.ndarray, top_ps: np.ndarray) -> np.ndarray:
    """Zero everything outside the smallest set whose probability reaches top_p."""
    order = np.argsort(-p, axis=1, kind="stable")
    ranked = np.take_along_axis(p, order, axis=1)
    before = (np.cumsum(ranked, axis=1) - ranked) / ranked.sum(axis=1, keepdims=True)
    out = np.zeros_like(p)
    np.put_along_axis(out, order, np.where(before < top_ps[:, None], ranked, 0.0), axis=1)
    return out
