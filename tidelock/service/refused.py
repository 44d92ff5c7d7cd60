"""Requests of a known key that got no answer, one by one, for the customer's own list of receipts. (`tally` counts them
all for the founder.)

Kept in memory, where a storm of refusals costs nothing, and written with the heartbeat: at most so many an hour of one
customer, the rest are counted only. They are forgotten after a month.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable

from tidelock.service.db import Database
from tidelock.service.errors import ApiError
from tidelock.service.keys import Key
from tidelock.service.tally import HOUR_S, cause

MOST_OF_ONE, MOST = 600, 2000  # of one customer in an hour; of all between two heartbeats
KEPT_S = 30 * 86400.0
COLUMNS = ("request_id", "customer", "key_id", "model", "cause", "status", "message", "created")
OURS = ("rate_limit_exceeded", "insufficient_quota", "balance_exhausted", "budget_reached")  # messages made of our own words and numbers


class Refused:
    def __init__(self, db: Database, clock: Callable[[], float] = time.time) -> None:
        self._db, self._clock = db, clock
        self._lock = threading.Lock()
        self._rows: list[tuple] = []
        self._by_customer: Counter[str] = Counter()
        self._hour = 0  # that these are of

    def note(self, request_id: str, key: Key, model: str, error: ApiError) -> None:
        now = self._clock()
        with self._lock:
            if now // HOUR_S != self._hour:
                self._hour = now // HOUR_S
                self._by_customer.clear()
            if len(self._rows) >= MOST or self._by_customer[key.customer] >= MOST_OF_ONE:
                return
            self._by_customer[key.customer] += 1
            message = error.message if error.code in OURS else ""
            self._rows.append((request_id, key.customer, key.id, model, cause(error), error.status, message, now))

    def flush(self) -> None:
        """Raises StorageDown and then keeps the rows."""
        with self._lock:
            rows, self._rows = self._rows, []
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
