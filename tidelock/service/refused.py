"""Requests of a known key that got no answer, one by one, for the customer's own list of receipts. (`tally` counts them
all for the founder.)

Kept in memory, where a storm of refusals costs nothing, and written with the heartbeat: at most so many per customer, the
rest are counted only. They are forgotten after a month.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable

from tidelock.service.db import Database
from tidelock.service.errors import ApiError
from tidelock.service.keys import Key
from tidelock.service.tally import cause

MOST_OF_ONE, MOST = 100, 2000  # between two heartbeats
KEPT_S = 30 * 86400.0
COLUMNS = ("request_id", "customer", "key_id", "model", "cause", "status", "message", "created")
OURS = ("rate_limit_exceeded", "insufficient_quota", "balance_exhausted", "budget_reached")  # messages made of our own words and numbers


class Refused:
    def __init__(self, db: Database, clock: Callable[[], float] = time.time) -> None:
        self._db, self._clock = db, clock
        self._lock = threading.Lock()
        self._rows: list[tuple] = []
        self._by_customer: Counter[str] = Counter()

    def note(self, request_id: str, key: Key, model: str, error: ApiError) -> None:
        with self._lock:
            if len(self._rows) >= MOST or self._by_customer[key.customer] >= MOST_OF_ONE:
                return
            self._by_customer[key.customer] += 1
            message = error.message if error.code in OURS else ""
            self._rows.append(
                (request_id, key.customer, key.id, model, cause(error), error.status, message, self._clock())
            )

    def flush(self) -> None:
        """Raises StorageDown and then keeps the rows."""
        with self._lock:
            rows, self._rows = self._rows, []
            self._by_customer.clear()
        if not rows:
            return
        try:
            with self._db.transaction() as tx:
                tx.insert("refused", COLUMNS, rows)
        except BaseException:
            with self._lock:
                self._rows = rows + self._rows
            raise

    def sweep(self) -> None:
        with self._db.transaction() as tx:
            tx("DELETE FROM refused WHERE created < ?", (self._clock() - KEPT_S,))
