"""Monthly budgets of an organisation, a project or a key: soft ones are told of, hard ones are never exceeded.

As the limits, they are part of the books: what is spent and what running requests hold is counted under the customer's
lock, in the transaction of the hold and of the settlement. A request takes no more than what every hard budget it falls
under has left, as if the balance ended there. A month is UTC's; what is settled in it counts in it. Vouchers and plan
credits count as money does: a budget is about use.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from tidelock.service import notices
from tidelock.service.db import Transaction

COLUMNS = ("customer", "scope", "soft_nano", "hard_nano", "month", "spent_nano", "held_nano", "told")
SOFT, HARD = 1, 2  # bits of `told`: of what was told this month


@dataclass
class Budget:
    customer: str
    scope: str  # '' for the organisation, else a project's or a key's id
    soft_nano: int | None
    hard_nano: int | None
    month: int
    spent_nano: int
    held_nano: int
    told: int
    changed: bool = False

    @property
    def left(self) -> int | None:
        return None if self.hard_nano is None else max(self.hard_nano - self.spent_nano - self.held_nano, 0)


def month_number(now: float) -> int:
    at = datetime.fromtimestamp(now, UTC)
    return at.year * 12 + at.month - 1


class Budgets:
    """For one transaction over some customers, whose rows are locked. Reads nothing until it is asked."""

    def __init__(self, tx: Transaction, customers: Sequence[str], now: float) -> None:
        self._tx, self._names, self._now = tx, list(customers), now
        self._rows: dict[tuple[str, str], Budget] | None = None

    def of(self, customer: str, project: str, key: str) -> str:
        """The scopes with a budget that a request falls under, as a hold remembers them; "" for none."""
        scopes = [scope for scope in ("", project, key) if (customer, scope) in self._load()]
        return json.dumps(scopes) if scopes else ""

    def left(self, customer: str, scopes: str) -> int | None:
        """Nano-USD that may still be held; None: no hard budget says."""
        return min((b.left for b in self._named(customer, scopes) if b.left is not None), default=None)

    def hold(self, customer: str, scopes: str, nano_usd: int) -> None:
        for budget in self._named(customer, scopes):
            budget.held_nano, budget.changed = budget.held_nano + nano_usd, True

    def close(self, customer: str, scopes: str, held_nano: int, spent_nano: int) -> None:
        for budget in self._named(customer, scopes):
            budget.held_nano = max(budget.held_nano - held_nano, 0)  # less only where a budget was set anew meanwhile
            budget.spent_nano, budget.changed = budget.spent_nano + spent_nano, True
            if budget.soft_nano is not None and budget.spent_nano >= budget.soft_nano:
                self._tell(budget, SOFT, "budget.soft")

    def refused(self, customer: str, scopes: str) -> None:
        """A request did not fit: the hard budgets that have the least left are told of, once a month."""
        least = self.left(customer, scopes)
        for budget in self._named(customer, scopes):
            if budget.left is not None and budget.left == least:
                self._tell(budget, HARD, "budget.hard")

    def write(self) -> None:
        if not self._rows:
            return
        rows = [(b.customer, b.scope, b.month, b.spent_nano, b.held_nano, b.told) for b in self._rows.values() if b.changed]
        self._tx.update("budgets", ("customer", "scope"), ("month", "spent_nano", "held_nano", "told"), rows)

    def _named(self, customer: str, scopes: str) -> list[Budget]:
        if not scopes:
            return []
        rows = self._load()
        return [rows[customer, scope] for scope in json.loads(scopes) if (customer, scope) in rows]

    def _load(self) -> dict[tuple[str, str], Budget]:
        if self._rows is None:
            marks = ", ".join("?" * len(self._names))
            sql = f"SELECT {', '.join(COLUMNS)} FROM budgets WHERE customer IN ({marks})"
            self._rows = {(row[0], row[1]): Budget(*row) for row in self._tx(sql, self._names).fetchall()}
            month = month_number(self._now) if self._rows else 0
            for budget in self._rows.values():
                if budget.month < month:
                    budget.month, budget.spent_nano, budget.told, budget.changed = month, 0, 0, True
        return self._rows

    def _tell(self, budget: Budget, bit: int, kind: str) -> None:
        if budget.told & bit:
            return
        budget.told, budget.changed = budget.told | bit, True
        name = f"{kind}/{budget.customer}/{budget.scope or 'organization'}/{budget.month}"
        data = {"organization": budget.customer, "scope": budget.scope or None, "spent_nano_usd": budget.spent_nano,
                "soft_nano_usd": budget.soft_nano, "hard_nano_usd": budget.hard_nano}  # fmt: skip
        notices.put(self._tx, budget.customer, kind, name, data, self._now)
