"""`Idempotency-Key`: the same key with the same body is one request, however often it is sent.

The first to come runs; the same again gets the stored answer byte for byte; another body under the same key, or one that
comes while the first still runs, is a conflict. Keys belong to a customer and are forgotten after a day. If the server
died on the first, the key may run again only if nothing was charged for it: one key is never charged twice.
"""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass

from tidelock.service.db import Database, Transaction

LIFETIME_S = 86_400.0
LONGEST_KEY = 255


class KeyReused(Exception):
    """The key was used before with another body."""


class InFlight(Exception):
    """The first request with this key has not ended yet."""


class AnswerLost(Exception):
    """The first request was charged, and its answer was never whole: its client left, or its server died. Names its request
    id."""


@dataclass(frozen=True)
class Stored:
    request_id: str
    status: int
    content_type: str
    body: bytes


class Idempotency:
    def __init__(self, db: Database, worker: str, clock: Callable[[], float] = time.time) -> None:
        self._db, self._worker, self._clock = db, worker, clock

    async def begin(self, customer: str, key: str, request: bytes, request_id: str) -> Stored | None:
        """The stored answer, or None: then the key is ours until `finish` or `abandon`. `request`: what must be the same.
        Raises KeyReused, InFlight, AnswerLost or StorageDown."""
        digest = hashlib.sha256(request).hexdigest()
        return await self._db.run(lambda tx: self._begin(tx, customer, key, digest, request_id))

    def _begin(self, tx: Transaction, customer: str, key: str, digest: str, request_id: str) -> Stored | None:
        now = self._clock()
        tx("DELETE FROM idempotency WHERE customer = ? AND key = ? AND expires <= ?", (customer, key, now))
        taken = tx(
            "INSERT INTO idempotency (customer, key, digest, worker, request_id, status, response, expires) "
            "VALUES (?, ?, ?, ?, ?, NULL, NULL, ?) ON CONFLICT (customer, key) DO NOTHING",
            (customer, key, digest, self._worker, request_id, now + LIFETIME_S),
        )
        if taken.rowcount == 1:
            return None
        sql = f"SELECT digest, worker, request_id, status, response FROM idempotency WHERE customer = ? AND key = ?{tx.for_update}"
        theirs, worker, first, status, response = tx(sql, (customer, key)).fetchone()
        if theirs != digest:
            raise KeyReused(key)
        if status is not None:
            content_type, _, body = response.partition("\n")
            return Stored(first, status, content_type, base64.b64decode(body))
        if tx("SELECT 1 FROM workers WHERE id = ?", (worker,)).fetchone() is not None:
            raise InFlight(key)
        if tx("SELECT 1 FROM usage WHERE request_id = ? AND nano_usd > 0", (first,)).fetchone() is not None:
            raise AnswerLost(first)
        tx("UPDATE idempotency SET worker = ?, request_id = ? WHERE customer = ? AND key = ?",
           (self._worker, request_id, customer, key))  # fmt: skip
        return None

    async def finish(self, customer: str, key: str, answer: Stored) -> None:
        response = f"{answer.content_type}\n{base64.b64encode(answer.body).decode()}"
        sql = "UPDATE idempotency SET status = ?, response = ? WHERE customer = ? AND key = ? AND request_id = ?"
        await self._db.run(lambda tx: tx(sql, (answer.status, response, customer, key, answer.request_id)) and None)

    async def abandon(self, customer: str, key: str, request_id: str) -> None:
        """For a request without a whole answer. Where it cost nothing the key is free again, so that a retry can succeed;
        else it stays taken, and who tries again is told."""
        sql = ("DELETE FROM idempotency WHERE customer = ? AND key = ? AND request_id = ? AND status IS NULL AND NOT EXISTS "
               "(SELECT 1 FROM usage WHERE usage.request_id = idempotency.request_id AND nano_usd > 0)")  # fmt: skip
        nobody_s = "UPDATE idempotency SET worker = '' WHERE customer = ? AND key = ? AND request_id = ? AND status IS NULL"

        def give_up(tx: Transaction) -> None:
            if tx(sql, (customer, key, request_id)).rowcount == 0:
                tx(nobody_s, (customer, key, request_id))

        await self._db.run(give_up)

    def sweep(self) -> None:
        """Forgets what is older than a day."""
        with self._db.transaction() as tx:
            tx("DELETE FROM idempotency WHERE expires <= ?", (self._clock(),))
