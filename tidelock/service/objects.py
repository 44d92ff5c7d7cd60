"""What clients store with us: responses, files' metadata, batches. JSON documents by id, each owned by a customer.

An id of somebody else's is an id that does not exist.
"""

from __future__ import annotations

import json
import logging
import secrets
import time
from collections.abc import Callable
from typing import Any

from tidelock.service import errors
from tidelock.service.db import Database, StorageDown

log = logging.getLogger(__name__)


class Objects:
    def __init__(self, db: Database) -> None:
        self._db = db

    @staticmethod
    def new_id(prefix: str) -> str:
        return f"{prefix}{secrets.token_hex(16)}"

    def put(self, kind: str, customer: str, doc: dict[str, Any]) -> None:
        """Stores `doc` under its `id`."""
        with self._db.transaction() as write:
            self.put_in(write, kind, customer, doc)

    def keep(self, kind: str, customer: str, doc: dict[str, Any]) -> None:
        """`put` for an answer that is charged: it is given, though it cannot be stored."""
        try:
            self.put(kind, customer, doc)
        except StorageDown as error:
            log.error("%s is answered and charged, but could not be stored: %s", doc["id"], error)

    @staticmethod
    def put_in(write: Any, kind: str, customer: str, doc: dict[str, Any]) -> None:
        """`put` as part of a transaction; a document that is there already stays as it is."""
        write(
            "INSERT INTO objects (id, kind, customer, created_us, body) VALUES (?, ?, ?, ?, ?) ON CONFLICT (id) DO NOTHING",
            (doc["id"], kind, customer, time.time_ns() // 1000, json.dumps(doc)),
        )

    def change(
        self, kind: str, customer: str, object_id: str, change: Callable[[dict[str, Any]], None]
    ) -> dict[str, Any]:
        """Applies `change` to the document, alone; returns it as it is then. Raises a 404."""
        with self._db.transaction() as write:
            row = write(
                f"SELECT body FROM objects WHERE id = ? AND kind = ? AND customer = ?{write.for_update}",
                (object_id, kind, customer),
            ).fetchone()
            if row is None:
                raise errors.not_found(f"no {kind} {object_id!r}", "id")
            doc = json.loads(row[0])
            change(doc)
            write("UPDATE objects SET body = ? WHERE id = ?", (json.dumps(doc), object_id))
        return doc

    def get(self, kind: str, customer: str, object_id: str) -> dict[str, Any]:
        """Raises a 404."""
        rows = self._db.read(
            "SELECT body FROM objects WHERE id = ? AND kind = ? AND customer = ?", (object_id, kind, customer)
        )
        if not rows:
            raise errors.not_found(f"no {kind} {object_id!r}", "id")
        return json.loads(rows[0][0])

    def delete(self, kind: str, customer: str, object_id: str) -> None:
        """Raises a 404."""
        with self._db.transaction() as write:
            gone = write(
                "DELETE FROM objects WHERE id = ? AND kind = ? AND customer = ?", (object_id, kind, customer)
            )
            if gone.rowcount == 0:
                raise errors.not_found(f"no {kind} {object_id!r}", "id")

    def delete_under(self, kind: str, customer: str, parent: str) -> None:
        """Removes what `under` finds."""
        with self._db.transaction() as write:
            write("DELETE FROM objects WHERE kind = ? AND customer = ? AND id >= ? AND id < ?",
                  (kind, customer, f"{parent}/", f"{parent}0"))  # fmt: skip

    def page(
        self, kind: str, customer: str, *, after: str | None = None, limit: int = 20, newest_first: bool = True
    ) -> tuple[list[dict[str, Any]], bool]:
        """(documents, whether there are more), from the one behind `after` on; none behind one the customer has not."""
        where, args = "kind = ? AND customer = ?", [kind, customer]
        if after is not None:
            comparison = "<" if newest_first else ">"
            where += f" AND (created_us, id) {comparison} (SELECT created_us, id FROM objects WHERE id = ? AND customer = ?)"
            args += [after, customer]
        order = "DESC" if newest_first else "ASC"
        rows = self._db.read(
            f"SELECT body FROM objects WHERE {where} ORDER BY created_us {order}, id {order} LIMIT {limit + 1}", args
        )
        return [json.loads(row[0]) for row in rows[:limit]], len(rows) > limit

    def under(self, kind: str, customer: str, parent: str) -> list[dict[str, Any]]:
        """Those whose id begins with `parent/`."""
        rows = self._db.read(
            "SELECT body FROM objects WHERE kind = ? AND customer = ? AND id >= ? AND id < ?",
            (kind, customer, f"{parent}/", f"{parent}0"),  # 0 comes right after /
        )
        return [json.loads(row[0]) for row in rows]
