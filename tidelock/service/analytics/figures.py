"""Runs the table of metrics against a database."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tidelock.service.analytics.calendar import Month, month_of, span
from tidelock.service.analytics.metrics import METRICS, PARTS
from tidelock.service.analytics.relations import with_clause

Read = Callable[..., list[Any]]
Figures = Mapping[str, Mapping[tuple[str, str], int]]  # metric -> (month, part) -> value; zeros are left out
FIRST = """SELECT MIN(first) FROM (SELECT MIN(created) AS first FROM transactions UNION ALL SELECT MIN(starts) FROM plan_terms
UNION ALL SELECT MIN(hour) FROM refusals UNION ALL SELECT MIN(hour) FROM compute) AS firsts"""


def months_until(read: Read, last: str) -> list[Month]:
    """From the first one in which anything happened; only `last` if nothing did."""
    first = read(FIRST)[0][0]
    return span(month_of(first).name if first is not None else last, last)


def figures(read: Read, months: Sequence[Month], base: str) -> Figures:
    """All metrics of all `months`, which must begin with the first one of the books (cohorts need it)."""
    clause = query_head(months, base)
    out = {}
    for metric in METRICS:
        rows = read(clause + metric.sql)
        out[metric.name] = {(row[0], row[1]): row[2] for row in rows if row[2]}
    return out


def query_head(months: Sequence[Month], base: str) -> str:
    return with_clause(months, base) + PARTS
