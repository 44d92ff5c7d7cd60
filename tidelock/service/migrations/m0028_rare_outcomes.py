"""Receipts of requests that were cut short are few among many: looking for them need not read all the others. Only their
rows are in the index, so a settlement that ends as most do writes no more than before."""

from __future__ import annotations

from typing import Any

from tidelock.service.migrations import script

# As `receipts` asks, word for word: SQLite uses a partial index only where it finds a term of its condition in the query.
SCHEMA = """
CREATE INDEX usage_cut_short ON usage (customer, finish_reason, created)
WHERE finish_reason = 'abort' OR finish_reason = 'lost';
"""


def up(tx: Any, backend: Any) -> None:
    script(tx, SCHEMA)
