"""Reconciling: once, on request, and again and again while a server runs, with an alarm when something differs.

Of all the workers on one set of books, one compares the books in each period (whoever writes the period's row first);
every worker compares its own traces, going on where it stopped.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tidelock.service import notices
from tidelock.service.db import Database
from tidelock.service.metrics import Metrics
from tidelock.service.reconciliation import money, traces, usage
from tidelock.service.reconciliation.kinds import Found

log = logging.getLogger(__name__)

BOOKS = "books"
KEPT = 1000  # slots whose findings are kept
TOLD = 20  # discrepancies that a notice lists

Inexact = Callable[[str], bool]


def reconcile(
    db: Database, since: float, until: float, journal: Path | None = None, *, start: int = 0, books: bool = True,
    inexact: Inexact = lambda upstream: False, siblings: Sequence[Path] = (),
) -> tuple[Found, int]:  # fmt: skip
    """Everything of [since, until), as the books stand now, and the journal's end as far as it was read. Memory does not
    grow with the tables. `books`: False compares only the traces. `siblings`: journals of other workers, compared whole."""
    found = Found(since, until)
    end = traces.size(journal) if journal is not None else 0  # before the snapshot: what is traced by then is settled in it
    ends = [(path, traces.size(path)) for path in siblings]
    with db.snapshot() as read:
        if books:
            usage.check(read, found, inexact)
            money.check(read, found)
        stopped = traces.check(read, found, journal, end, start) if journal is not None else 0
        for path, its_end in ends:
            traces.check(read, found, path, its_end)
    return found, stopped


@dataclass
class Job:
    """One worker's part. `tick` is called a few times per period."""

    db: Database
    worker: str
    journal: Path
    metrics: Metrics
    every_s: float = 3600.0
    window_s: float = 2 * 86400.0  # how far back each run looks
    clock: Callable[[], float] = time.time
    _slot: int = -1
    _offset: int = 0

    def tick(self, inexact: Inexact) -> Found | None:
        """Reconciles if it is time. Raises StorageDown."""
        now = self.clock()
        slot = int(now // self.every_s)
        if slot == self._slot:
            self.show()
            return None
        books = self._claim(slot, BOOKS, now)
        found, self._offset = reconcile(
            self.db, now - self.window_s, now, self.journal, start=self._offset, books=books, inexact=inexact
        )
        self._slot = slot
        if books or found.total:
            part = BOOKS if books else self.worker
            if not books:
                self._claim(slot, part, now)
            self._finish(slot, part, found)
        if found.total:
            log.error("reconciliation: %d discrepancies worth %d nano-USD, %d rows missing: %s", found.total,
                      found.drift_nano, found.missing, dict(found.by_kind))  # fmt: skip
        self.show()
        return found

    def show(self) -> None:
        """Sets the gauges to what the newest finished period found, on all workers."""
        sql = ("SELECT MAX(finished), SUM(discrepancies), SUM(missing), SUM(drift_nano) FROM reconciliations WHERE slot = "
               "(SELECT MAX(slot) FROM reconciliations WHERE finished IS NOT NULL AND part = ?)")  # fmt: skip
        finished, discrepancies, missing, drift = self.db.read(sql, (BOOKS,))[0]
        if finished is not None:
            self.metrics.reconciled(finished, int(discrepancies), int(missing), int(drift))

    def _claim(self, slot: int, part: str, now: float) -> bool:
        with self.db.transaction() as tx:
            tx("DELETE FROM reconciliations WHERE slot < ?", (slot - KEPT,))
            done = tx("INSERT INTO reconciliations (slot, part, started, discrepancies, missing, drift_nano, report) "
                      "VALUES (?, ?, ?, 0, 0, 0, '') ON CONFLICT (slot, part) DO NOTHING", (slot, part, now))  # fmt: skip
            return done.rowcount == 1

    def _finish(self, slot: int, part: str, found: Found) -> None:
        shown, now = found.shown(), self.clock()
        with self.db.transaction() as tx:
            tx("UPDATE reconciliations SET finished = ?, discrepancies = ?, missing = ?, drift_nano = ?, report = ? "
               "WHERE slot = ? AND part = ?",
               (now, found.total, found.missing, found.drift_nano, json.dumps(shown), slot, part))  # fmt: skip
            if found.total:
                told = {**shown, "listed": shown["listed"][:TOLD]}
                notices.put(tx, notices.OPERATOR, "reconciliation.failed", f"reconciliation/{slot}/{part}", told, now)


def last(db: Database) -> dict | None:
    """The newest finished run over the books, as `Found.shown` had it."""
    sql = "SELECT report, finished FROM reconciliations WHERE finished IS NOT NULL AND part = ? ORDER BY slot DESC LIMIT 1"
    rows = db.read(sql, (BOOKS,))
    return {**json.loads(rows[0][0]), "finished": rows[0][1]} if rows else None
