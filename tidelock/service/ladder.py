"""Limits, and the ladder that gives them: which tier an organisation is on by what it has recharged in cash, in all.

`KIMI` is Kimi's published table. A service starts with `OPEN`, which limits nobody (`tiers` says which is in force).
"""

from __future__ import annotations

from dataclasses import dataclass

from tidelock.tokens.errors import UserError

NANO = 1_000_000_000
MOST = 10**11  # of anything a limit counts: what keeps its arithmetic within 64 bits


@dataclass(frozen=True)
class Limits:
    """None: no limit. Tokens are those of prompts and answers together."""

    concurrency: int | None = None
    requests: int | None = None  # a minute
    tokens: int | None = None  # a minute
    day_tokens: int | None = None

    def __post_init__(self) -> None:
        for name, value in self.__dict__.items():
            if value is not None and not 0 <= value <= MOST:
                raise UserError(f"a limit is a whole number from 0 to {MOST}, not {value} ({name})")

    @property
    def none(self) -> bool:
        return self.concurrency is self.requests is self.tokens is self.day_tokens is None

    def over(self, other: Limits) -> Limits:
        """Ours where we say something, else the other's."""
        if other is NONE or other.none:
            return self
        return Limits(**{k: w if (v := self.__dict__[k]) is None else v for k, w in other.__dict__.items()})


NONE = Limits()


@dataclass(frozen=True)
class Ladder:
    """Tiers by the nano-USD recharged from which they begin. Below the first there is the first."""

    name: str
    tiers: tuple[tuple[int, Limits], ...] = ()

    def tier(self, recharged_nano: int) -> int:
        return max([n for n, (from_nano, _) in enumerate(self.tiers) if recharged_nano >= from_nano], default=0)

    def limits(self, recharged_nano: int, tier: int | None = None) -> Limits:
        """`tier`: the one set by hand, if any."""
        if not self.tiers:
            return NONE
        at = self.tier(recharged_nano) if tier is None else min(tier, len(self.tiers) - 1)
        return self.tiers[at][1]


OPEN = Ladder("open")
KIMI = Ladder(
    "kimi",
    (
        (1 * NANO, Limits(1, 3, 500_000, 1_500_000)),
        (10 * NANO, Limits(50, 200, 2_000_000)),
        (20 * NANO, Limits(100, 500, 3_000_000)),
        (100 * NANO, Limits(200, 5_000, 3_000_000)),
        (1_000 * NANO, Limits(400, 5_000, 4_000_000)),
        (3_000 * NANO, Limits(1_000, 10_000, 5_000_000)),
    ),
)
KNOWN = {ladder.name: ladder for ladder in (OPEN, KIMI)}
