"""Which server processes are alive, so that the holds of dead ones, and only those, are settled by others.

A worker's row counts its heartbeats. On one machine the process id says who is dead, at once and for certain, however
slow a live one may be; a worker elsewhere is taken for dead when we, reading the database all the while, saw its count stand still for `lease_s`. No clocks are compared,
and an outage of the database makes nobody dead: it interrupts the watching.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from tidelock.service.db import Database, StorageDown, Transaction


class Worker:
    """This process. `beat` is called a few times per `lease_s`."""

    def __init__(self, db: Database, lease_s: float = 15.0, monotonic: Callable[[], float] = time.monotonic) -> None:
        self.id = f"worker_{uuid.uuid4().hex[:16]}"
        self.lease_s = lease_s
        self._db, self._monotonic = db, monotonic
        self._seen: dict[str, tuple[int, float]] = {}  # worker -> (beats, since when it has stood there)
        with db.transaction() as tx:
            self._enter(tx)

    def _enter(self, tx: Transaction) -> None:
        row = (self.id, _machine(), _process(os.getpid()), time.time())
        tx("INSERT INTO workers (id, machine, process, beats, created) VALUES (?, ?, ?, 0, ?)", row)

    def beat(self) -> None:
        """Says that we live. Raises StorageDown."""
        try:
            with self._db.transaction() as tx:
                if tx("UPDATE workers SET beats = beats + 1 WHERE id = ?", (self.id,)).rowcount == 0:
                    self._enter(tx)  # we were away for so long that somebody took us for dead
        except StorageDown:
            self._seen.clear()
            raise

    def dead(self) -> list[str]:
        """The workers that are no more; "" stands for holds of the time before there were workers."""
        try:
            rows = self._db.read("SELECT id, machine, process, beats FROM workers WHERE id <> ?", (self.id,))
        except StorageDown:
            self._seen.clear()
            raise
        now, machine = self._monotonic(), _machine()
        self._seen = {
            worker: seen if (seen := self._seen.get(worker)) and seen[0] == beats else (beats, now)
            for worker, _, _, beats in rows
        }
        return [""] + [
            worker
            for worker, where, process, _ in rows
            if (
                _process(int(process.partition(" ")[0])) != process
                if where == machine
                else now - self._seen[worker][1] >= self.lease_s
            )
        ]

    def forget(self, workers: list[str]) -> None:
        """Removes rows of dead workers that hold nothing any more."""
        with self._db.transaction() as tx:
            for worker in workers:
                tx("DELETE FROM workers WHERE id = ? AND NOT EXISTS "
                   "(SELECT 1 FROM holds WHERE worker = ? AND state = 'open')", (worker, worker))  # fmt: skip

    def leave(self) -> None:
        """At an orderly end: we hold nothing and are gone."""
        self.forget([self.id])


def _machine() -> str:
    """This boot of this machine, and the process namespace we are in: where a process id means one process."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return uuid.uuid4().hex  # unknown: then only the heartbeat counts


def _process(pid: int) -> str:
    """The process id with its start time, because ids are used again; "" if there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    after_name = stat.rpartition(")")[2].split()
    state, started = after_name[0], after_name[19]
    return "" if state == "Z" else f"{pid} {started}"
