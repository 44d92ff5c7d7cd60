"""Router balancing: selection biases that make every expert be chosen equally often. Biases never enter the weights."""

from __future__ import annotations

import torch
from torch import Tensor


def sign_update(load: Tensor, rate: float) -> Tensor:
    """Aux-loss-free balancing (DeepSeek-V3 2.1.2, K2): the step rate * sign(mean load - load). load [E] -> [E] fp32."""
    load = load.float()
    return rate * torch.sign(load.mean() - load)


def thresholds(scores: Tensor, bias: Tensor, k: int) -> Tensor:
    """alpha_i, the (k+1)-th largest biased score of each token: what an expert has to beat. [N, E] -> [N]."""
    return (scores + bias).topk(k + 1, dim=-1).values[:, k]


def quantile_bias(scores: Tensor, bias: Tensor, k: int) -> Tensor:
    """Quantile Balancing (K3 Eq. 14): b_j = -quantile_{1 - k/n}(s_ij - alpha_i over tokens i), then centred.

    With this bias each expert is chosen by k/n of the batch, if alpha stayed where it is. scores [N, n] in (0, 1) of the
    whole global batch, bias [n] the one they were routed with. No learning rate. Fewer than all experts must be active.
    """
    n = scores.shape[1]
    if k >= n:
        return torch.zeros_like(bias)
    b = -quantile(scores - thresholds(scores, bias, k)[:, None], 1 - k / n)
    return b - b.mean()


def quantile(x: Tensor, q: float) -> Tensor:
    """Linear-interpolated quantile over dim 0, for any size (torch.quantile stops at 16 M elements)."""
    at = q * (x.shape[0] - 1)
    x = x.sort(dim=0).values
    return torch.lerp(x[int(at)], x[min(int(at) + 1, x.shape[0] - 1)], at - int(at))


def quantile_histogram(scores: Tensor, bias: Tensor, k: int, bins: int = 1000, uniform: bool = False) -> Tensor:
    """What micro-batches and ranks add up for Quantile Balancing (K3 App. D): counts int64 [n, bins] of
    r_ij = alpha_i - s_ij between the `bin_edges` of the bias they were routed with."""
    r = (thresholds(scores, bias, k)[:, None] - scores).t().contiguous()
    at = torch.searchsorted(bin_edges(bias, bins, uniform)[:, 1:-1].contiguous(), r, right=True)
    counts = torch.zeros(scores.shape[1], bins, dtype=torch.int64, device=scores.device)
    return counts.scatter_add_(1, at, torch.ones_like(at))


def bias_from_histogram(counts: Tensor, bias: Tensor, k: int, uniform: bool = False) -> Tensor:
    """The bias from summed histograms (K3 App. D): the q-th smallest r of each expert, q = m k / n, interpolated within
    its bin, then centred. counts [n, bins] of m tokens, bias [n] the one they were routed with."""
    n, bins = counts.shape
    edges = bin_edges(bias, bins, uniform)
    q = counts.sum(1, keepdim=True) * k / n
    cum = counts.cumsum(1)
    bin_ = (cum < q.ceil()).sum(1, keepdim=True)
    inside, below = counts.gather(1, bin_), (cum - counts).gather(1, bin_)
    share = ((q - below) / inside.clamp(min=1)).clamp(0, 1)
    b = torch.lerp(edges.gather(1, bin_), edges.gather(1, bin_ + 1), share)[:, 0]
    return b - b.mean()


def bin_edges(bias: Tensor, bins: int, uniform: bool = False) -> Tensor:
    """Where the bins of each expert begin and end, ascending, [n, bins + 1]; every r lies in [min b - 1, max b + 1].

    `uniform` is App. D to the letter. At its 1000 bins a bin is 1/350 wide, and all scores of an expert that saturates
    near 1 fall into one or two: the load of such an expert then stays off for good (1.38 times the mean where the exact
    quantile reaches 1.02). The quantile of a balanced expert *is* its bias, so by default the same number of bins lies
    cubically around each expert's own: as balancing converges, the bins that matter become as fine as fp32.
    """
    low, high = bias.min() - 1, bias.max() + 1
    u = torch.linspace(-1, 1, bins + 1, dtype=bias.dtype, device=bias.device)
    if uniform:
        return (low + (high - low) * (u + 1) / 2).expand(bias.numel(), -1)
    return bias[:, None] + (high - low) * u**3
