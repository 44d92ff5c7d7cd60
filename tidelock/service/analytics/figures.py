"""Runs the table of metrics against a database."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tidelock.service.analytics import selling
from tidelock.service.analytics.calendar import Month, month_of, span
from tidelock.service.analytics.metric import SECONDS, Metric
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
    head = query_head(months, base, ladder(read))
    out: dict[str, dict[tuple[str, str], int]] = {metric.name: {} for metric in METRICS}
    for metrics in _of_one_type():
        # one statement, so that what several metrics stand on is computed once
        every = " UNION ALL ".join(f"SELECT '{metric.name}' AS metric, q.* FROM ({metric.sql}) AS q" for metric in metrics)
        for name, name_of_month, part, value in read(head + every):
            if value:
                out[name][name_of_month, part] = value
    return out


def _of_one_type() -> list[list[Metric]]:
    """The columns of one statement have one type each, and times are not integers."""
    return [[metric for metric in METRICS if (metric.unit == SECONDS) == seconds] for seconds in (False, True)]


def ladder(read: Read) -> list[int]:
    """From which recharge each tier of the ladder in force begins; none without a ladder."""
    rows = read("SELECT value FROM settings WHERE name = 'ladder'")
    return [from_nano for from_nano, _ in json.loads(rows[0][0])["tiers"]] if rows else []


def query_head(months: Sequence[Month], base: str, thresholds: Sequence[int]) -> str:
    return with_clause(months, base) + selling.tiers(thresholds) + selling.RELATIONS + PARTS
