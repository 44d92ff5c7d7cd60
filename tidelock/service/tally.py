"""What the books do not hold and the founder wants to know: requests refused, by cause, and the time each model computed.

Counted in memory, where it costs nothing, and added to the database with the heartbeat; a server that is killed loses the
counts of the last few seconds, and no money.
"""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from tidelock.service.db import Database, Transaction
from tidelock.service.errors import ApiError

HOUR_S = 3600
Cell = tuple[int, str]  # hour (its first second), model
CAUSES = {401: "key", 403: "permission", 404: "not_found", 409: "conflict", 413: "too_large", 499: "client_left",
          503: "overloaded", 529: "overloaded", 504: "timeout"}  # fmt: skip
WHICH_LIMIT = re.compile(r"reached (?:max )?(concurrency|RPM|TPM|TPD)\b")  # in Kimi's words, which clients read too


def cause(error: ApiError) -> str:
    """One word for why a request got no answer: its lost revenue is to be found under it."""
    if error.code == "budget_reached":
        return "budget"
    if error.kind == "exceeded_current_quota_error":
        return "balance"
    if error.code == "too_many_wrong_keys":
        return "key"
    if error.kind == "rate_limit_reached_error":
        which = WHICH_LIMIT.search(error.message)
        return f"limit_{which[1].lower()}" if which else "limit"
    if error.status == 429:
        return "overloaded"
    if error.code == "storage_down":
        return "storage"
    return CAUSES.get(error.status, "server" if error.status >= 500 else "bad_request")


class Tally:
    def __init__(self, db: Database, clock: Callable[[], float] = time.time) -> None:
        self._db, self._clock = db, clock
        self._lock = threading.Lock()
        self._refusals: Counter[tuple[int, str, str]] = Counter()
        self._nanoseconds: Counter[Cell] = Counter()
        self._running: Counter[str] = Counter()
        self._since_ns: dict[str, int] = {}  # the models that compute now

    def refused(self, model: str, error: ApiError) -> None:
        with self._lock:
            self._refusals[self._hour(), model, cause(error)] += 1

    @contextmanager
    def computing(self, model: str) -> Iterator[None]:
        """A customer's request is in the model (a trainer's are not counted). Side by side they are one stretch of time."""
        with self._lock:
            self._running[model] += 1
            self._since_ns.setdefault(model, time.monotonic_ns())
        try:
            yield
        finally:
            with self._lock:
                self._running[model] -= 1
                if not self._running[model]:
                    self._count(model)
                    del self._since_ns[model]

    def flush(self) -> None:
        """Adds what was counted since the last time. Raises StorageDown and then keeps the counts."""
        with self._lock:
            for model in self._since_ns:
                self._count(model)
            refusals, self._refusals = self._refusals, Counter()
            milliseconds = {cell: ns // 1_000_000 for cell, ns in self._nanoseconds.items() if ns >= 1_000_000}
            for cell, ms in milliseconds.items():
                self._nanoseconds[cell] -= ms * 1_000_000
        if not refusals and not milliseconds:
            return
        try:
            with self._db.transaction() as tx:
                add(tx, refusals, milliseconds)
        except BaseException:
            with self._lock:
                self._refusals.update(refusals)
                self._nanoseconds.update({cell: ms * 1_000_000 for cell, ms in milliseconds.items()})
            raise

    def _count(self, model: str) -> None:
        now_ns = time.monotonic_ns()
        self._nanoseconds[self._hour(), model] += now_ns - self._since_ns[model]
        self._since_ns[model] = now_ns

    def _hour(self) -> int:
        now = int(self._clock())
        return now - now % HOUR_S


def add(tx: Transaction, refusals: Mapping[tuple[int, str, str], int], milliseconds: Mapping[Cell, int]) -> None:
    """Adds to what other workers counted for the same hour; in one order, so that two of them never wait in a circle."""
    for key in sorted(refusals):
        tx(
            "INSERT INTO refusals (hour, model, cause, requests) VALUES (?, ?, ?, ?) ON CONFLICT (hour, model, cause) "
            "DO UPDATE SET requests = refusals.requests + excluded.requests",
            (*key, refusals[key]),
        )
    for cell in sorted(milliseconds):
        tx(
            "INSERT INTO compute (hour, model, milliseconds) VALUES (?, ?, ?) ON CONFLICT (hour, model) "
            "DO UPDATE SET milliseconds = compute.milliseconds + excluded.milliseconds",
            (*cell, milliseconds[cell]),
        )
