"""Everything the console, the command line and the HTTP endpoint show of the founder's numbers, as plain data: each with
its definition and the query that gives it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from tidelock import charts
from tidelock.service.analytics import growth as g
from tidelock.service.analytics.calendar import Month, month, month_of, shifted
from tidelock.service.analytics.figures import Figures, Read, figures, ladder, months_until, query_head
from tidelock.service.analytics.metric import USD
from tidelock.service.analytics.metrics import METRICS
from tidelock.service.analytics.ratios import RATIOS, Ratio, total
from tidelock.service.prices import NANO_PER_USD
from tidelock.tokens.errors import UserError

GROWING = ("payers.usage", "payers.usage_or_plan", "payers.cash", "revenue.usage", "revenue.by_region",
           "revenue.constant_currency", "revenue.by_model")  # fmt: skip
DEFAULT_STEPS = 3
ADDED, TAKEN = ("new", "reactivation", "expansion"), ("contraction", "churn")


def report(read: Read, name: str, base: str | None = None, now: float | None = None) -> dict[str, Any]:
    """Of one month, with the whole series before it. `base`: where growth begins, and whose exchange rates the
    constant-currency view uses (default: three months earlier).

    Raises UserError for a month that is none, or has not begun, or a base that is not before it."""
    now = time.time() if now is None else now
    base = base or shifted(month(name).name, -DEFAULT_STEPS)
    if month(name).starts > now:
        raise UserError(f"the month {name} has not begun")
    if month(base).name >= name:
        raise UserError(f"growth to {name} begins with an earlier month than {base}")
    months = months_until(read, name)
    found = figures(read, months, base)
    names = [m.name for m in months]
    return {
        "object": "analytics",
        "month": name,
        "base": base,
        "complete": months[-1].ends <= now,
        "months": names,
        "with": query_head(months, base, ladder(read)),
        "metrics": [
            {"name": metric.name, "definition": metric.definition, "unit": metric.unit, "sql": metric.sql,
             "value": _parts(found, metric.name, name), "series": {m: _parts(found, metric.name, m) for m in names}}
            for metric in METRICS
        ],
        "ratios": [
            {"name": ratio.name, "definition": ratio.definition, "unit": ratio.unit, "value": _ratio(ratio, found, name)}
            for ratio in RATIOS
        ],
        "growth": {"definition": g.DEFINITION, "from": base, "to": name, "of": _growth(found, names, base)},
        "checks": identities(found, months),
        "plots": plots(found, names),
    }  # fmt: skip


def _parts(found: Figures, metric: str, name: str) -> dict[str, int]:
    return {part: value for (m, part), value in sorted(found[metric].items()) if m == name}


def _ratio(ratio: Ratio, found: Figures, name: str) -> dict[str, float]:
    """By part, as a metric's value; empty where there is nothing to divide by."""
    value = None if ratio.each else ratio.of(found, name)
    exact = ratio.parts(found, name) if ratio.each else {} if value is None else {"": value}
    return {part: float(fraction) for part, fraction in exact.items()}


def _growth(found: Figures, names: Sequence[str], base: str) -> list[dict[str, Any]]:
    window = [name for name in names if name >= base]
    out = []
    for metric in GROWING if base in names else ():
        for part in sorted({part for _, part in found[metric]}):
            grown = g.growth([found[metric].get((name, part), 0) for name in window])
            if grown:
                out.append({
                    "metric": metric, "part": part, "start": grown.start, "end": grown.end, "steps": grown.steps,
                    "mean": float(grown.mean), "cmgr": grown.cmgr, "multiple": float(grown.multiple),
                })  # fmt: skip
    return out


def identities(found: Figures, months: Sequence[Month]) -> dict[str, bool]:
    """What must hold of the numbers of every month, whatever happened in it."""
    holds = {"the parts of revenue are revenue": True, "the cohorts are the payers": True, "the MRR bridge closes": True,
             "the MRR of a month starts where the one before ended": True}  # fmt: skip
    before = 0
    for m in months:
        whole = {name: total(found, (name, ()), m.name) for name in found}
        step = _parts(found, "mrr", m.name)
        revenue = whole["revenue.usage"]
        parts = (whole["revenue.by_region"], whole["revenue.by_model"], whole["cohorts.revenue"])
        closing = step.get("start", 0) + sum(step.get(p, 0) for p in ADDED) - sum(step.get(p, 0) for p in TAKEN)
        for name, held in zip(holds, (
            all(part == revenue for part in parts),
            whole["cohorts.payers"] == whole["payers.by_region"] == whole["payers.usage"],
            closing == step.get("end", 0),
            step.get("start", 0) == before,
        ), strict=True):  # fmt: skip
            holds[name] &= held
        before = step.get("end", 0)
    return holds


def plots(found: Figures, names: Sequence[str]) -> dict[str, str]:
    """SVG by name, over at most the last twelve months."""
    last, shown = names[-1], names[-12:]
    step = _parts(found, "mrr", last)
    moves = [("start", step.get("start", 0)), *((p, step.get(p, 0)) for p in ADDED), *((p, -step.get(p, 0)) for p in TAKEN),
             ("end", step.get("end", 0))]  # fmt: skip
    return {
        "payers": charts.columns([(m[2:], total(found, ("payers.usage", ()), m)) for m in shown], "paying users (usage)"),
        "revenue": charts.columns([(m[2:], _usd(found, "revenue.usage", m)) for m in shown], "usage revenue, USD"),
        "deferred": charts.columns([(m[2:], _usd(found, "deferred", m)) for m in shown], "prepaid and unused, USD"),
        "revenue_by_region": _bars(found, "revenue.by_region", last, NANO_PER_USD),
        "margin": _bars(found, "margin", last, NANO_PER_USD),
        "tokens": _bars(found, "tokens", last, 1),
        "rejected": _bars(found, "rejected", last, 1),
        "mrr": charts.bridge([(part, nano / NANO_PER_USD) for part, nano in moves], f"MRR in {last}, USD"),
        "cohorts": charts.triangle(_cohorts(found, shown)),
    }


def _usd(found: Figures, metric: str, name: str) -> float:
    """For drawing only."""
    return max(total(found, (metric, ()), name), 0) / NANO_PER_USD


def _bars(found: Figures, metric: str, name: str, unit: int) -> str:
    parts = sorted(_parts(found, metric, name).items(), key=lambda item: -item[1])
    return charts.bars([(part, max(value, 0) / unit, charts.short(value / unit)) for part, value in parts], left=170)


def _cohorts(found: Figures, names: Sequence[str]) -> list[tuple[str, list[float]]]:
    """Payers that still pay, as shares of the cohort's first month."""
    out = []
    for n, cohort in enumerate(names):
        size = found["cohorts.payers"].get((cohort, cohort), 0)
        if size:
            out.append((cohort, [found["cohorts.payers"].get((m, cohort), 0) / size for m in names[n:]]))
    return out


def this_month(now: float | None = None) -> str:
    return month_of(time.time() if now is None else now).name


def shown(value: int, unit: str) -> str:
    """For people: money to the cent, rounded half away from zero."""
    if unit != USD:
        return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"
    cents = (abs(value) + 5_000_000) // 10_000_000
    return f"{'-' if value < 0 and cents else ''}{cents // 100:,}.{cents % 100:02d} USD"
