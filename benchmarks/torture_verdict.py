"""What the money torture's books must say afterwards, computed from what the clients saw, what the upstream sent, and the
rows themselves."""

from __future__ import annotations

import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tidelock.service.db import Database
from tidelock.service.keys import KeyStore
from tidelock.service.ledger import Ledger
from tidelock.service.limiter import PERIOD_MS, Limiter, RateLimited
from tidelock.service.reconciliation.job import reconcile
from tidelock.service.tiers import Tiers

TOKENS = ("tokens", "day_tokens")
Levels = dict[tuple[str, str], dict[str, int]]  # (customer, scope) -> level by limit


def must_be_zero(seen: Iterable[Any], ledger: Ledger, sent: Counter[str], paid: int, journals: Iterable[Path]) -> dict[str, int]:
    """`seen`: what clients know of their requests. `sent`: tokens by request, as the upstream wrote it down."""
    seen, db, audit = list(seen), ledger.db, ledger.audit()
    rows = {row["request_id"]: row for row in db.read("SELECT request_id, customer, completion_tokens, nano_usd FROM usage")}
    charged = {request_id for request_id, row in rows.items() if row["nano_usd"]}
    spent: Counter[str] = Counter()
    for row in rows.values():
        spent[row["customer"]] += row["nano_usd"]
    found = [reconcile(db, 0.0, time.time() + 60)[0]]
    found += [reconcile(db, 0.0, time.time() + 60, journal, books=False)[0] for journal in journals]
    return {
        "overspend_nano": sum(max(0, nano - paid) for nano in spent.values()) + audit.overspend_nano,
        "lost_usage_rows": sum(known.saw_tokens and known.request_id not in rows for known in seen),
        "double_usage_rows": db.read("SELECT COUNT(*) FROM usage")[0][0] - len(rows),
        "wrong_bills": sum(_wrong(known, rows) for known in seen),
        "billed_beyond_upstream": sum(row["completion_tokens"] > sent[request_id] for request_id, row in rows.items()),
        "leaked_holds": db.read("SELECT COUNT(*) FROM holds WHERE state = 'open'")[0][0],
        "leaked_limit_reservations": _wrong_levels(db),
        "limits_not_free_after_a_day": _still_limited(db),
        "wrong_budgets": _wrong_budgets(db),
        "charged_though_refused": sum(known.end[:1] in ("4", "5") and known.request_id in charged for known in seen),
        "sum_nano": audit.sum_nano,
        "broken_links": audit.broken_links,
        "other_audit_faults": audit.unbalanced + audit.wrong_balances + audit.unmetered + abs(audit.held_nano),
        "reconciliation_discrepancies": sum(one.total for one in found),
    }


def compared(journals: Iterable[Path], db: Database) -> dict[str, int]:
    """What the reconciliation looked at: zero discrepancies among nothing would say nothing."""
    checked: Counter[str] = Counter()
    for journal in (None, *journals):
        checked.update(reconcile(db, 0.0, time.time() + 60, journal, books=journal is None)[0].checked)
    said = db.read("SELECT COUNT(*) FROM usage WHERE upstream_completion IS NOT NULL")[0][0]
    return {"rows reconciled": checked["usage"], "with the upstream's own count": said, "with a trace": checked["traces"]}


def _wrong(known: Any, rows: dict[str, Any]) -> bool:
    """A client was told another bill than is in the books."""
    if known.told is None:
        return False
    row = rows.get(known.request_id)
    return row is None or (row["nano_usd"], row["completion_tokens"]) != (known.told["cost_nano_usd"], known.told["completion_tokens"])


# ---- limits ----------------------------------------------------------------------------------------------------------


def _wrong_levels(db: Database) -> int:
    """Token counts of the limits that are not what replaying every hold and its end gives, to the last millisecond."""
    replayed, at, rates = _replay(db)
    wrong = 0
    for row in db.read("SELECT customer, scope, tokens, day_tokens, at_ms FROM limit_use"):
        key, stored = (row["customer"], row["scope"]), {which: row[which] for which in TOKENS}
        then = at.get(key, row["at_ms"])
        _drain(replayed[key], rates[key], row["at_ms"] - then)  # both as of the later of the two moments
        _drain(stored, rates[key], then - row["at_ms"])
        wrong += any(replayed[key][which] != stored[which] for which in TOKENS if rates[key].get(which) is not None)
    return wrong


def _replay(db: Database) -> tuple[Levels, dict[tuple[str, str], int], dict[tuple[str, str], dict[str, int | None]]]:
    """(levels, as of when in ms, limits), by customer and scope, in the order of each customer's chain."""
    levels: Levels = defaultdict(lambda: dict.fromkeys(TOKENS, 0))
    at: dict[tuple[str, str], int] = {}
    rates: dict[tuple[str, str], dict[str, int | None]] = defaultdict(dict)
    sql = ("SELECT t.customer, t.kind, t.created, h.reserved, COALESCE(u.prompt_tokens + u.completion_tokens, 0) FROM transactions t "
           "JOIN holds h ON h.request_id = t.reference LEFT JOIN usage u ON u.request_id = t.reference "
           "WHERE t.kind IN ('hold', 'settle', 'release') ORDER BY t.customer, t.seq")  # fmt: skip
    for customer, kind, created, reserved, used in db.read(sql):
        memo, now = json.loads(reserved or '{"scopes": {}}'), int(created * 1000)
        for scope, limits in memo["scopes"].items():
            key = (customer, scope)
            rates[key] = dict(zip(TOKENS, limits, strict=True))
            if kind == "hold":
                _drain(levels[key], rates[key], now - at.get(key, now))
                at[key] = max(now, at.get(key, now))  # of two workers, who came first may have been let in second
            for which, rate in rates[key].items():
                if rate is None:
                    continue
                if kind == "hold":
                    levels[key][which] += memo["tokens"] * PERIOD_MS[which]
                else:
                    back = max(memo["tokens"] - used, 0) * PERIOD_MS[which] - rate * max(now - memo["at_ms"], 0)
                    levels[key][which] = max(levels[key][which] - max(back, 0), 0)
    return levels, at, rates


def _drain(levels: dict[str, int], rates: dict[str, int | None], elapsed_ms: int) -> None:
    for which, rate in rates.items():
        levels[which] = max(levels[which] - (rate or 0) * max(elapsed_ms, 0), 0)


def _wrong_budgets(db: Database) -> int:
    """Budgets that are exceeded, hold something for nobody, or have counted other than the usage rows say."""
    project = {row[0]: row[1] for row in db.read("SELECT id, project FROM keys")}
    spent: Counter[tuple[str, str]] = Counter()
    for customer, key, nano in db.read("SELECT customer, key_id, nano_usd FROM usage"):
        spent[customer, key] += nano
        spent[customer, project[key]] += nano
    rows = db.read("SELECT customer, scope, hard_nano, spent_nano, held_nano FROM budgets")
    return sum(held != 0 or used > hard or used != spent[customer, scope] for customer, scope, hard, used, held in rows)


class _Undo(Exception):
    pass


def _still_limited(db: Database) -> int:
    """Keys that, a day later, may not use at once all that their limits allow."""
    ladder, still = Tiers(db).ladder, 0
    for key in KeyStore(db, b"0" * 32).list():
        tier, own = Tiers(db).caps(key.customer).get("", (None, None))
        caps = [own.over(ladder.limits(0, tier))] + [limits for scope, (_, limits) in Tiers(db).caps(key.customer).items()
                                                     if scope in (key.project, key.id)]  # fmt: skip
        whole = min(value for limits in caps for value in (limits.tokens, limits.day_tokens) if value is not None)
        try:
            with db.transaction() as tx:
                Limiter(tx, [key.customer], time.time() + 86_401).admit(key.customer, key.project, key.id, ladder, 0, whole)
                raise _Undo
        except RateLimited:
            still += 1
        except _Undo:
            pass
    return still
