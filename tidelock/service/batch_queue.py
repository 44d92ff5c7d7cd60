"""Which batches wait to be worked on, and who has them. A worker that dies loses its lease, and the batch goes on
with another, or with the same one restarted."""

from __future__ import annotations

import time

from tidelock.service.db import Database, Transaction
from tidelock.service.ledger import ACTIVE


def add(tx: Transaction, batch_id: str, customer: str, key_id: str) -> None:
    """In the transaction that makes the batch: one that is not in the queue would be looked at by nobody."""
    tx("INSERT INTO batch_queue (id, customer, key_id, created_us, lease_us) VALUES (?, ?, ?, ?, 0)",
       (batch_id, customer, key_id, _now_us()))  # fmt: skip


def claim(db: Database, lease_s: float) -> tuple[str, str, str] | None:
    """(batch, customer, key) of the oldest batch nobody works on, of who is not suspended; it is ours for `lease_s`."""
    now = _now_us()
    for batch_id, customer, key_id in db.read(
        f"SELECT id, customer, key_id FROM batch_queue WHERE lease_us < ? AND {ACTIVE} ORDER BY created_us LIMIT 5", (now,)
    ):
        with db.transaction() as write:
            until = now + int(lease_s * 1e6)
            taken = write("UPDATE batch_queue SET lease_us = ? WHERE id = ? AND lease_us < ?", (until, batch_id, now))
            if taken.rowcount == 1:
                return batch_id, customer, key_id
    return None


def renew(db: Database, batch_id: str, lease_s: float) -> None:
    """`lease_s` 0 gives it back."""
    until = _now_us() + int(lease_s * 1e6) if lease_s else 0
    with db.transaction() as write:
        write("UPDATE batch_queue SET lease_us = ? WHERE id = ?", (until, batch_id))


def remove(db: Database, batch_id: str) -> None:
    with db.transaction() as write:
        write("DELETE FROM batch_queue WHERE id = ?", (batch_id,))


def _now_us() -> int:
    return time.time_ns() // 1000
