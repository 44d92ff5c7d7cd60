"""Which ladder of limits is in force, and the limits that were set by hand.

`tidelock admin limits ladder` puts a ladder in force for every worker within a second.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict

from tidelock.service.accounts import OPERATOR, log
from tidelock.service.db import Database
from tidelock.service.ladder import OPEN, Ladder, Limits
from tidelock.tokens.errors import UserError

LADDER = "SELECT value FROM settings WHERE name = 'ladder'"
FRESH_S = 0.5  # how long a worker goes by the ladder it last read


class Tiers:
    """The ladder in force and what was set by hand."""

    def __init__(self, db: Database, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._db, self._monotonic = db, monotonic
        self._ladder, self._until = OPEN, float("-inf")

    @property
    def ladder(self) -> Ladder:
        """Waits for the database unless `refresh` was there first. Raises StorageDown."""
        if self._monotonic() >= self._until:
            self._take(self._db.read(LADDER))
        return self._ladder

    async def refresh(self) -> None:
        """Reads the ladder, off the event loop, if that is due."""
        if self._monotonic() >= self._until:
            self._take(await self._db.fetch(LADDER))

    def _take(self, rows: list) -> None:
        self._ladder = _parse(rows[0][0]) if rows else OPEN
        self._until = self._monotonic() + FRESH_S

    def set_ladder(self, ladder: Ladder, actor: str = OPERATOR) -> None:
        tiers = [[from_nano, asdict(limits)] for from_nano, limits in ladder.tiers]
        if [t[0] for t in tiers] != sorted({t[0] for t in tiers}):
            raise UserError("every tier of a ladder begins at more than the one before")
        value = json.dumps({"name": ladder.name, "tiers": tiers})
        with self._db.transaction() as tx:
            tx("INSERT INTO settings (name, value) VALUES ('ladder', ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value",
               (value,))  # fmt: skip
            log(tx, "", actor, "limits.ladder", ladder.name)
        self._until = float("-inf")

    def set_caps(
        self, customer: str, limits: Limits, scope: str = "", tier: int | None = None, actor: str = OPERATOR
    ) -> None:
        """Limits of an organisation (over its tier's), or caps of one project or key (`scope`) within them."""
        if tier is not None and scope:
            raise UserError("a tier is the organisation's; a project or key has caps")
        if tier is not None and not 0 <= tier < 100:
            raise UserError(f"a tier is a whole number from 0, not {tier}")
        row = (customer, scope, tier, *asdict(limits).values())
        with self._db.transaction() as tx:
            tx("DELETE FROM caps WHERE customer = ? AND scope = ?", (customer, scope))
            if tier is not None or not limits.none:
                tx("INSERT INTO caps (customer, scope, tier, concurrency, requests, tokens, day_tokens) VALUES (?, ?, ?, ?, ?, ?, ?)",
                   row)  # fmt: skip
            log(tx, customer, actor, "limits.set", scope or customer, {**asdict(limits), "tier": tier})

    def caps(self, customer: str) -> dict[str, tuple[int | None, Limits]]:
        """By scope: (tier set by hand, limits)."""
        sql = "SELECT scope, tier, concurrency, requests, tokens, day_tokens FROM caps WHERE customer = ? ORDER BY scope"
        return {row[0]: (row[1], Limits(*tuple(row)[2:])) for row in self._db.read(sql, (customer,))}

    def standing(self, customer: str) -> tuple[int | None, int, Limits]:
        """(tier, nano-USD recharged, limits in force) of an organisation; the tier is None on a ladder without tiers."""
        sql = "SELECT CAST(COALESCE(SUM(-balance_nano), 0) AS BIGINT) FROM accounts WHERE customer = ? AND kind IN ('outside', 'refunds')"
        recharged = self._db.read(sql, (customer,))[0][0]
        by_hand, own = self.caps(customer).get("", (None, Limits()))
        ladder = self.ladder
        tier = None if not ladder.tiers else ladder.tier(recharged) if by_hand is None else min(by_hand, len(ladder.tiers) - 1)
        return tier, recharged, own.over(ladder.limits(recharged, by_hand))


def _parse(text: str) -> Ladder:
    data = json.loads(text)
    return Ladder(data["name"], tuple((from_nano, Limits(**limits)) for from_nano, limits in data["tiers"]))
