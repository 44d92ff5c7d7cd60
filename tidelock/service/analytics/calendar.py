"""Months as analytics count them: UTC, half-open, named like 2026-03."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime

from tidelock.tokens.errors import UserError


@dataclass(frozen=True)
class Month:
    """[starts, ends) in seconds since 1970."""

    name: str
    starts: int
    ends: int


def month(name: str) -> Month:
    """Raises UserError for anything but YYYY-MM, 1970 to 2199."""
    if not re.fullmatch(r"(19[7-9][0-9]|2[01][0-9]{2})-(0[1-9]|1[0-2])", name):
        raise UserError(f"{name!r} is no month; write it like 2026-03")
    year, number = map(int, name.split("-"))
    following = (year + 1, 1) if number == 12 else (year, number + 1)
    return Month(name, int(datetime(year, number, 1, tzinfo=UTC).timestamp()), int(datetime(*following, 1, tzinfo=UTC).timestamp()))


def month_of(when: float) -> Month:
    return month(f"{datetime.fromtimestamp(when, UTC):%Y-%m}")


def shifted(name: str, by: int) -> str:
    """The month `by` months later."""
    year, number = map(int, name.split("-"))
    count = year * 12 + number - 1 + by
    return f"{count // 12:04d}-{count % 12 + 1:02d}"


def span(first: str, last: str) -> list[Month]:
    """Both included; at least `last`."""
    months = [month(last)]
    while months[0].name > first:
        months.insert(0, month(shifted(months[0].name, -1)))
    return months
