"""What a growth figure may mean. "170 % a month" and "four times" are each several numbers; all are reported, with the
series they come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

DEFINITION = (
    "Over n steps from month to month: mean = the arithmetic mean of the n growth rates (each month over the one before, "
    "minus 1); cmgr = (end / start)^(1/n) - 1, the constant rate that gives the same end; multiple = end / start, so that "
    "x4 is +300 %."
)


@dataclass(frozen=True)
class Growth:
    start: int
    end: int
    steps: int
    mean: Fraction
    multiple: Fraction

    @property
    def cmgr(self) -> float:
        return float(self.multiple) ** (1 / self.steps) - 1


def growth(series: Sequence[int]) -> Growth | None:
    """Of consecutive months, the base first. None if there is no step, or a rate over a month that was not positive."""
    if len(series) < 2 or min(series[:-1]) <= 0 or series[-1] < 0:
        return None
    rates = [Fraction(now, before) - 1 for before, now in zip(series, series[1:], strict=False)]
    steps = len(rates)
    return Growth(series[0], series[-1], steps, sum(rates, Fraction(0)) / steps, Fraction(series[-1], series[0]))
