"""Re-rating: what settled requests would have cost under another version of the price book, booked as the difference.

Nothing is edited. A request that becomes cheaper gets money back (what was paid in cash first, then what vouchers paid);
one that becomes dearer is charged like any other, and what the pockets do not cover is owed (`receivable`) and taken
from the next payment.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from tidelock.service.books import RECEIVABLE, REVENUE, Books, take
from tidelock.service.db import Database
from tidelock.service.ledger import Ledger
from tidelock.service.prices import Counts, PriceBook, stored_book

ROWS_PER_COMMIT = 200
RETURNED_CREDIT = ("voucher", "rerate")  # a voucher that does not expire


@dataclass(frozen=True)
class Rerated:
    requests: int  # looked at
    changed: int
    charged_nano: int
    returned_nano: int
    owed_nano: int  # the part of `charged_nano` that nobody's pockets covered


def rerate(
    ledger: Ledger, since: float, until: float, version: str, *, model: str | None = None, dry_run: bool = False
) -> Rerated:
    """Brings every request settled in [since, until) to what `version` says. Doing it again changes nothing.

    Raises UserError, before anything is booked, if the version is unknown or lacks a model or mode that was used.
    """
    book = load_book(ledger.db, version)
    where, args = "created >= ? AND created < ?", [since, until]
    if model is not None:
        where, args = f"{where} AND model = ?", [*args, model]
    for used_model, mode in ledger.db.read(f"SELECT DISTINCT model, mode FROM usage WHERE {where}", args):
        book.price(used_model, mode)
    total = Rerated(0, 0, 0, 0, 0)
    for (customer,) in ledger.db.read(f"SELECT DISTINCT customer FROM usage WHERE {where} ORDER BY customer", args):
        rows = ledger.db.read(f"SELECT * FROM usage WHERE {where} AND customer = ? ORDER BY request_id", [*args, customer])
        for start in range(0, len(rows), ROWS_PER_COMMIT):
            part = _rerate(ledger, customer, rows[start : start + ROWS_PER_COMMIT], book, dry_run)
            total = Rerated(*(a + b for a, b in zip(total.__dict__.values(), part.__dict__.values(), strict=True)))
    return total


def load_book(db: Database, version: str) -> PriceBook:
    """Raises UserError for a version that was never registered."""
    return stored_book(db.read("SELECT version, effective, book FROM price_versions WHERE version = ?", (version,)), version)


def _rerate(ledger: Ledger, customer: str, rows: Sequence[Any], book: PriceBook, dry_run: bool) -> Rerated:
    out = Rerated(len(rows), 0, 0, 0, 0)
    with ledger.db.transaction() as tx:
        books = Books(tx, [customer], now=ledger.clock())
        marks = ", ".join("?" * len(rows))
        sql = f"SELECT request_id, price_version, nano_usd FROM adjustments WHERE request_id IN ({marks})"
        before = tx(sql, [row["request_id"] for row in rows]).fetchall()
        for row in rows:
            own = [(version, nano) for request_id, version, nano in before if request_id == row["request_id"]]
            if any(version == book.version for version, _ in own):
                continue
            difference = book.price(row["model"], row["mode"]).cost_nano(counts(row)) - row["nano_usd"]
            difference -= sum(nano for _, nano in own)
            if difference == 0:
                continue
            owed = 0 if dry_run else _adjust(books, row, book.version, difference)
            out = replace(
                out, changed=out.changed + 1, charged_nano=out.charged_nano + max(difference, 0),
                returned_nano=out.returned_nano + max(-difference, 0), owed_nano=out.owed_nano + owed,
            )  # fmt: skip
        if not dry_run:
            books.write()
    return out


def counts(row: Any) -> Counts:
    """Of a usage row."""
    return Counts(
        row["prompt_tokens"], row["cached_tokens"], row["cache_write_5m_tokens"], row["cache_write_1h_tokens"],
        row["completion_tokens"], json.loads(row["tools"]),
    )  # fmt: skip


def _adjust(books: Books, row: Any, version: str, difference: int) -> int:
    """Books the difference and its row; returns what is owed for it."""
    customer, owed = row["customer"], 0
    if difference > 0:
        parts = take(books.pockets(customer), difference)
        owed = difference - sum(nano for _, nano in parts)
        entries = [*((name, -nano) for name, nano in parts), (RECEIVABLE, -owed), (REVENUE, difference)]
    else:
        in_cash = min(-difference, row["nano_usd"] - row["credit_nano"])
        entries = [(REVENUE, difference), (("cash", ""), in_cash), (RETURNED_CREDIT, -difference - in_cash)]
    detail = f"{row['price_version']} -> {version}"
    books.post(customer, "rerate", f"{row['request_id']}/{version}", entries, detail)
    books.execute(
        "INSERT INTO adjustments (request_id, price_version, customer, nano_usd, created) VALUES (?, ?, ?, ?, ?)",
        (row["request_id"], version, customer, difference, books.now),
    )
    return owed
