"""PostgreSQL finds rows by age without an entry for each: an index of block ranges, for tables that grow in time's order.

SQLite needs none: there the order of rows is the order of time, and what reads a window of it reads the table.
"""

from __future__ import annotations

from typing import Any


def up(tx: Any, backend: Any) -> None:
    if backend.name == "postgres":
        for table in ("holds", "usage", "transactions"):
            tx(f"CREATE INDEX {table}_by_age ON {table} USING brin (created)")
