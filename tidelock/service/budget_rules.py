"""Setting and showing the budgets that `budgets` keeps."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from tidelock.service.accounts import OPERATOR, log
from tidelock.service.budgets import COLUMNS, Budget, month_number
from tidelock.service.db import Database, Transaction
from tidelock.tokens.errors import UserError


def set_budget(
    db: Database, customer: str, scope: str, soft_nano: int | None, hard_nano: int | None, now: float, actor: str = OPERATOR
) -> None:
    """None for both: no budget any more. What the month's requests used so far is counted from the usage rows; what runs at
    this moment is not. Raises UserError."""
    if min(soft_nano or 1, hard_nano if hard_nano is not None else 1) < 0 or soft_nano == 0:
        raise UserError("a budget is a positive amount; a hard one of 0 lets nothing through")
    with db.transaction() as tx:
        if tx(f"SELECT 1 FROM customers WHERE customer = ?{tx.for_update}", (customer,)).fetchone() is None:
            raise UserError(f"no organization {customer!r}")
        if scope and not _belongs(tx, customer, scope):
            raise UserError(f"{scope!r} is no project and no key of {customer!r}")
        tx("DELETE FROM budgets WHERE customer = ? AND scope = ?", (customer, scope))
        if soft_nano is not None or hard_nano is not None:
            row = (customer, scope, soft_nano, hard_nano, month_number(now), _spent(tx, customer, scope, now), 0, 0)
            tx(f"INSERT INTO budgets ({', '.join(COLUMNS)}) VALUES ({', '.join('?' * len(COLUMNS))})", row)
        log(tx, customer, actor, "budget.set", scope or customer, {"soft_nano_usd": soft_nano, "hard_nano_usd": hard_nano}, now)


def listed(db: Database, customer: str, now: float) -> list[dict[str, Any]]:
    rows = [Budget(*row) for row in db.read(f"SELECT {', '.join(COLUMNS)} FROM budgets WHERE customer = ? ORDER BY scope", (customer,))]
    current = month_number(now)
    return [{"scope": b.scope or None, "soft_nano_usd": b.soft_nano, "hard_nano_usd": b.hard_nano, "held_nano_usd": b.held_nano,
             "spent_nano_usd": b.spent_nano if b.month == current else 0} for b in rows]  # fmt: skip


def in_force(db: Database) -> bool:
    """Whether anybody has a budget: while nobody has, no request looks for one."""
    return bool(db.read("SELECT 1 FROM budgets LIMIT 1"))


def _belongs(tx: Transaction, customer: str, scope: str) -> bool:
    project = tx("SELECT 1 FROM projects WHERE id = ? AND organization = ?", (scope, customer)).fetchone()
    return project is not None or tx("SELECT 1 FROM keys WHERE id = ? AND customer = ?", (scope, customer)).fetchone() is not None


def _spent(tx: Transaction, customer: str, scope: str, now: float) -> int:
    begun = datetime.fromtimestamp(now, UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0).timestamp()
    sql = "SELECT CAST(COALESCE(SUM(u.nano_usd), 0) AS BIGINT) FROM usage u WHERE u.customer = ? AND u.created >= ?"
    if scope:
        sql += " AND (u.key_id = ? OR u.key_id IN (SELECT id FROM keys WHERE project = ?))"
    return tx(sql, (customer, begun, *([scope, scope] if scope else []))).fetchone()[0]
