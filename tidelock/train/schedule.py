"""Learning-rate schedules as plain functions of the step."""

from __future__ import annotations

import math


def warm(step: int, peak: float, warmup: int) -> float:
    return peak * (step + 1) / warmup if step < warmup else peak


def warmup_cosine(step: int, total: int, peak: float, warmup: int, floor: float) -> float:
    """Linear warm-up, then half a cosine from `peak` down to `floor` at the last step (K3's choice)."""
    if step < warmup:
        return warm(step, peak, warmup)
    progress = min(1.0, (step - warmup) / max(1, total - 1 - warmup))
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def wsd(step: int, total: int, peak: float, warmup: int, decay_fraction: float, floor: float) -> float:
    """Warm-up, stable, linear decay to `floor` over the last `decay_fraction` of the steps (K2's choice)."""
    decay = max(1, round(total * decay_fraction))
    if step < total - decay:
        return warm(step, peak, warmup)
    progress = min(1.0, (step - (total - decay) + 1) / decay)
    return peak + (floor - peak) * progress
