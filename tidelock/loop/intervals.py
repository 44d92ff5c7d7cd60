"""Intervals for proportions and for paired differences of proportions, at 95 %."""

from __future__ import annotations

import math
from collections.abc import Sequence

Z = 1.959963984540054


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Wilson score interval of successes / n (Wilson 1927)."""
    if n == 0:
        return 0.0, 1.0
    p, z2 = successes / n, Z * Z
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_difference(before: Sequence[bool], after: Sequence[bool]) -> tuple[float, float, float]:
    """(mean of after - before, low, high) over the same tasks.

    Newcombe's square-and-add interval for paired proportions (Newcombe 1998, Statistics in Medicine 17, method 10),
    which stays inside [-1, 1] and does not collapse when nothing disagrees.
    """
    n = len(before)
    if n != len(after) or n == 0:
        raise ValueError(f"paired samples must be equally long and not empty, got {n} and {len(after)}")
    both = sum(b and a for b, a in zip(before, after))
    only_after = sum(a and not b for b, a in zip(before, after))
    only_before = sum(b and not a for b, a in zip(before, after))
    neither = n - both - only_after - only_before
    p1, p2 = (both + only_after) / n, (both + only_before) / n
    (l1, u1), (l2, u2) = wilson(both + only_after, n), wilson(both + only_before, n)
    spread = (both + only_after) * (only_before + neither) * (both + only_before) * (only_after + neither)
    phi = 0.0
    if spread > 0:
        numerator = both * neither - only_after * only_before
        phi = max(numerator - n / 2, 0.0) if numerator > 0 else numerator
        phi /= math.sqrt(spread)
    d = p1 - p2
    low = d - math.sqrt((p1 - l1) ** 2 - 2 * phi * (p1 - l1) * (u2 - p2) + (u2 - p2) ** 2)
    high = d + math.sqrt((u1 - p1) ** 2 - 2 * phi * (u1 - p1) * (p2 - l2) + (p2 - l2) ** 2)
    return d, max(-1.0, low), min(1.0, high)


def mcnemar(before: Sequence[bool], after: Sequence[bool]) -> float:
    """Two-sided exact McNemar p-value: could the disagreements be coin flips?"""
    up = sum(a and not b for b, a in zip(before, after))
    down = sum(b and not a for b, a in zip(before, after))
    n = up + down
    if n == 0:
        return 1.0
    tail = sum(math.comb(n, k) for k in range(min(up, down) + 1)) / 2**n
    return min(1.0, 2 * tail)
