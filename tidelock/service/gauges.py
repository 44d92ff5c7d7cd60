"""How full the limits of an organisation, its projects and keys are right now: read, not taken (that is `limiter`'s)."""

from __future__ import annotations

from typing import Any

from tidelock.service.db import Database
from tidelock.service.ladder import Limits
from tidelock.service.limiter import PERIOD_MS


def gauges(
    db: Database, customer: str, limits: dict[str, Limits], now: float
) -> dict[str, dict[str, dict[str, int | None]]]:
    """By scope and by what is limited: limit (None: none), used, and reset_ms until all of it is free again. Buckets drain as
    `Limiter` drains them; requests at the same time are the open holds."""
    now_ms = int(now * 1000)
    sql = "SELECT scope, requests, tokens, day_tokens, at_ms FROM limit_use WHERE customer = ?"
    use = {row[0]: row for row in db.read(sql, (customer,))}
    running: dict[str, int] = {}
    sql = "SELECT project, key_id, COUNT(*) FROM holds WHERE state = 'open' AND customer = ? GROUP BY project, key_id"
    for project, key, count in db.read(sql, (customer,)):
        for scope in {"", project, key}:
            running[scope] = running.get(scope, 0) + count
    return {
        scope: {
            "concurrency": {"limit": limit.concurrency, "used": running.get(scope, 0), "reset_ms": None},
            **{which: _gauge(getattr(limit, which), use.get(scope), which, now_ms) for which in PERIOD_MS},
        }
        for scope, limit in limits.items()
    }


def _gauge(limit: int | None, use: Any, which: str, now_ms: int) -> dict[str, int | None]:
    if limit is None:
        return {"limit": None, "used": None, "reset_ms": None}
    level = max(use[which] - limit * max(now_ms - use["at_ms"], 0), 0) if use is not None else 0
    return {"limit": limit, "used": -(-level // PERIOD_MS[which]), "reset_ms": -(-level // limit) if limit else None}
