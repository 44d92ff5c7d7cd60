"""The objectives: each a short function of log-probabilities, reading like its equation.

logp [M] are the model's log-probabilities of the target tokens that carry weight; weights [M] say how much each counts
(0 tokens never reach this point). All return a scalar to minimise.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def cross_entropy(logp: Tensor, weights: Tensor) -> Tensor:
    """Next-token prediction and SFT: - sum_t w_t log p_t / sum_t w_t."""
    return -(weights * logp).sum() / weights.sum()


@dataclass(frozen=True)
class KimiRL:
    """The K2.5 / K3 policy objective (K2.5 report, Eq. 1), over the N sampled tokens of the batch:

    maximise 1/N sum_t [ 1[low <= log r_t <= high] r_t A_t - tau (log r_t)^2 ],  r_t = pi(t) / pi_old(t).

    Outside [low, high] the token gives no policy gradient whatever the sign of its advantage; the squared log-ratio
    always pulls it back. The report publishes no values; the defaults are ours.
    """

    tau: float = 0.1
    low: float = -1.0
    high: float = 1.0

    def __call__(self, logp: Tensor, weights: Tensor, advantage: Tensor, old_logp: Tensor) -> Tensor:
        log_ratio = logp - old_logp
        inside = (log_ratio >= self.low) & (log_ratio <= self.high)
        gain = torch.where(inside, log_ratio.exp() * advantage, torch.zeros_like(logp))
        return -(weights * (gain - self.tau * log_ratio.square())).sum() / weights.sum()


def group_advantages(rewards: list[float]) -> list[float]:
    """A_j = r_j - mean(r) within one task's group (K1.5 ... K3: no division by the standard deviation)."""
    mean = sum(rewards) / len(rewards)
    return [r - mean for r in rewards]
