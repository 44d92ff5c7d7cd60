"""The second path to the metrics of `selling`: rows in order, in plain Python."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from typing import Any


def selling(read: Any, out: Any, months: list[tuple[str, float, float]]) -> None:
    """`months`: (name, first moment, first moment after)."""
    _tiers(read, out, months)
    _prices(read, out, months)
    _capacity(read, out, months)


def _within(months: list[tuple[str, float, float]], when: float) -> str | None:
    return next((name for name, starts, ends in months if starts <= when < ends), None)


def _tiers(read: Any, out: Any, months: list[tuple[str, float, float]]) -> None:
    rows = read("SELECT value FROM settings WHERE name = 'ladder'")
    thresholds = [from_nano for from_nano, _ in json.loads(rows[0][0])["tiers"]] if rows else []
    created = {row[0]: row[1] for row in read("SELECT customer, created FROM customers")}
    moves: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for customer, _, when, nano in read(
        "SELECT t.customer, t.seq, t.created, e.nano_usd FROM transactions t JOIN entries e ON e.customer = t.customer "
        "AND e.seq = t.seq WHERE e.kind IN ('outside', 'refunds') ORDER BY t.customer, t.seq, e.n"
    ):
        moves[customer].append((when, -nano))
    waits: dict[tuple[str, int], list[float]] = defaultdict(list)
    for customer, begun in created.items():
        total, at = 0, {0: begun} if begun > 0 else {}
        for when, nano in moves[customer]:
            total += nano
            for tier in range(1, len(thresholds)):
                if total >= thresholds[tier]:
                    at[tier] = min(when, at.get(tier, when))
        for tier, when in at.items():
            if tier and (name := _within(months, when)):
                out["tiers.reached"][name, f"tier {tier}"] += 1
                if tier - 1 in at and when > at[tier - 1]:
                    waits[name, tier - 1].append(when - at[tier - 1])
        for name, _, ends in months:
            if any(when < ends for when, _ in moves[customer]):
                now = sum(nano for when, nano in moves[customer] if when < ends)
                tier = max([n for n, nano in enumerate(thresholds) if now >= nano], default=0)
                out["tiers.customers"][name, f"tier {tier}"] += 1
    for (name, tier), seconds in waits.items():
        out["tiers.dwell_seconds"][name, f"tier {tier}"] = sorted(seconds)[(len(seconds) - 1) // 2]


def _prices(read: Any, out: Any, months: list[tuple[str, float, float]]) -> None:
    effective = sorted(row[0] for row in read("SELECT effective FROM price_versions"))
    used: dict[str, Counter[tuple[str, str]]] = defaultdict(Counter)
    for when, model, prompt, completion, nano in read("SELECT created, model, prompt_tokens, completion_tokens, nano_usd FROM usage"):
        name = _within(months, when) or ""
        used[name][model, "tokens"] += prompt + completion
        used[name][model, "list"] += nano
    pairs = set()
    for when in effective:
        for n, (_, starts, ends) in enumerate(months):
            if when > effective[0] and starts <= when < ends:
                pairs.add((n - 1, n if when == starts else n + 1))
    for before, after in pairs:
        if before < 0 or after >= len(months):
            continue
        was, has, name = used[months[before][0]], used[months[after][0]], months[after][0]
        for model in {model for model, _ in was} & {model for model, _ in has}:
            for what in ("tokens", "list"):
                out[f"price_change.{what}_before"][name, model] += was[model, what]
                out[f"price_change.{what}_after"][name, model] += has[model, what]


def _capacity(read: Any, out: Any, months: list[tuple[str, float, float]]) -> None:
    plans = {row[0]: row[1] for row in read("SELECT reference, detail FROM transactions WHERE kind = 'plan_grant'")}
    for kind, detail, when, lot, nano in read(
        "SELECT t.kind, t.detail, t.created, e.lot, e.nano_usd FROM transactions t JOIN entries e "
        "ON e.customer = t.customer AND e.seq = t.seq WHERE e.kind = 'plan'"
    ):
        name = _within(months, when)
        if name and kind == "plan_grant":
            out["capacity.sold"][name, detail] += nano
        elif name and kind in ("hold", "extend", "settle", "release"):
            out["capacity.served"][name, plans.get(lot, "")] -= nano
