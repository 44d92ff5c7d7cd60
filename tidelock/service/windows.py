"""Windows of time: monthly anniversaries, seven days from a first day, five hours from a first use. Pure functions of
moments (seconds since 1970, UTC); and what may be spent of a pocket within one."""

from __future__ import annotations

import calendar
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

FIVE_HOURS, WEEK = 5 * 3600.0, 7 * 86400.0


def anniversary(anchor: float, months: int) -> float:
    """The same day and time `months` later; the last day of a month that is too short, counted from the anchor, so that
    31 January leads to 28 February and then to 31 March."""
    begun = datetime.fromtimestamp(anchor, UTC)
    year, month = divmod(begun.year * 12 + begun.month - 1 + months, 12)
    day = min(begun.day, calendar.monthrange(year, month + 1)[1])
    return begun.replace(year=year, month=month + 1, day=day).timestamp()


def period(anchor: float, now: float) -> int:
    """How many whole anniversary months lie between; negative before the anchor."""
    begun, here = datetime.fromtimestamp(anchor, UTC), datetime.fromtimestamp(now, UTC)
    months = (here.year - begun.year) * 12 + here.month - begun.month
    return months if anniversary(anchor, months) <= now else months - 1


@dataclass
class Allowance:
    """At most `limit_nano` of the pocket within each window."""

    pocket: str
    span: str
    limit_nano: int
    anchor: float
    started: float = 0.0
    ends: float = 0.0
    used_nano: int = 0
    changed: bool = False

    def at(self, now: float) -> Allowance:
        """In the window that `now` is in. Five hours begin with the first use after the last ones ended."""
        if now >= self.ends or now < self.started:
            if self.span == "5h":
                started, ends = 0.0, 0.0
            elif self.span == "7d":
                started = self.anchor + (now - self.anchor) // WEEK * WEEK
                ends = started + WEEK
            else:
                n = period(self.anchor, now)
                started, ends = anniversary(self.anchor, n), anniversary(self.anchor, n + 1)
            self.started, self.ends, self.used_nano, self.changed = started, ends, 0, True
        return self

    def left(self, now: float) -> int:
        return max(self.at(now).limit_nano - self.used_nano, 0)

    def spend(self, nano: int, now: float) -> None:
        self.at(now)
        if self.span == "5h" and not self.ends:
            self.started, self.ends = now, now + FIVE_HOURS
        self.used_nano, self.changed = self.used_nano + nano, True

    def give_back(self, nano: int, since: float, now: float) -> None:
        """What a request that began at `since` did not use; another window's is not this one's."""
        if since >= self.at(now).started:
            self.used_nano, self.changed = max(self.used_nano - nano, 0), True


def left(allowances: Sequence[Allowance], pocket: str, now: float) -> int | None:
    """Nano-USD that may still be spent of a pocket; None: as much as is in it."""
    return min((a.left(now) for a in allowances if a.pocket == pocket), default=None)
