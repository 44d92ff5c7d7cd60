"""How long a customer's list of receipts and one look of the live stream take when the books are large.

    python -m benchmarks.receipts [--rows 400000]

Three quarters of the rows are one customer's, one in twenty was cut at its length and one in a thousand was left by its
client. Prints milliseconds, the median of 30, on SQLite and, where there is one, on PostgreSQL, with the statistics that
autovacuum would have taken a minute later.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable

from tidelock.service import receipts
from tidelock.service.books import USAGE_COLUMNS
from tidelock.service.db import Database
from tidelock.service.keys import KeyStore
from tidelock.service.local_postgres import local_postgres, missing

ROWS_PER_INSERT = 5000


def fill(db: Database, customer: str, key: str, rows: int) -> None:
    now = time.time()
    said = {
        "key_id": key,
        "model": "m",
        "price_version": "v1",
        "mode": "",
        "prompt_tokens": 100,
        "cached_tokens": 40,
        "cache_write_5m_tokens": 0,
        "cache_write_1h_tokens": 0,
        "completion_tokens": 20,
        "tools": "{}",
        "nano_usd": 1,
        "credit_nano": 0,
        "wait_ms": 1,
        "first_ms": 2,
        "total_ms": 3,
    }
    for start in range(0, rows, ROWS_PER_INSERT):
        batch = [
            {
                **said,
                "request_id": f"{customer}_{n}",
                "customer": customer,
                "created": now - (rows - n),
                "finish_reason": "abort" if n % 1000 == 1 else "stop" if n % 20 else "length",
            }
            for n in range(start, min(start + ROWS_PER_INSERT, rows))
        ]
        with db.transaction() as tx:
            tx.insert("usage", USAGE_COLUMNS, [tuple(row.get(column) for column in USAGE_COLUMNS) for row in batch])


def measure(db: Database, rows: int) -> None:
    keys = KeyStore(db, b"x" * 32)
    key, _ = keys.create("large")
    keys.create("other")
    fill(db, "large", key.id, rows * 3 // 4)
    fill(db, "other", key.id, rows // 4)
    with db.transaction() as tx:
        for table in ("usage", "keys"):
            tx(f"ANALYZE {table}")
    middle = f"large_{rows * 3 // 8}"
    since = time.time() - 5
    for what, work in (
        ("first page of 50", lambda: receipts.page(db, "large", {}, limit=50)),
        ("a page in the middle", lambda: receipts.page(db, "large", {}, limit=50, after=middle)),
        ("one outcome of twenty", lambda: receipts.page(db, "large", {"outcome": "length"}, limit=50)),
        ("one outcome of a thousand", lambda: receipts.page(db, "large", {"outcome": "abort"}, limit=50)),
        ("an outcome that there is not", lambda: receipts.page(db, "large", {"outcome": "lost"}, limit=50)),
        ("one look of the live stream", lambda: asyncio.run(receipts.since(db, key, since, 201))),
    ):
        print(f"{db.name:<9} {what:<30} {median_ms(work):8.2f} ms")


def median_ms(work: Callable[[], object]) -> float:
    took = []
    for _ in range(31):
        begun = time.perf_counter()
        work()
        took.append((time.perf_counter() - begun) * 1000)
    return statistics.median(took[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=400_000)
    rows = parser.parse_args().rows
    with tempfile.TemporaryDirectory() as directory:
        db = Database(f"{directory}/service.sqlite")
        measure(db, rows)
        db.close()
    if reason := missing():
        print(f"PostgreSQL: {reason}")
        return
    with local_postgres() as server:
        db = Database(server.database())
        measure(db, rows)
        db.close()


if __name__ == "__main__":
    main()
