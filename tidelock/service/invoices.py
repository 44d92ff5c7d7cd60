"""Invoices: numbered without gaps per customer, append-only, in whole nano-USD; on what was paid in or on what was used."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from tidelock.service.accounts import UnknownId
from tidelock.service.books import Books
from tidelock.service.db import Database
from tidelock.service.ledger import Ledger
from tidelock.tokens.errors import UserError

COLUMNS = ("id", "customer", "number", "kind", "reference", "net_nano", "tax_nano", "total_nano", "currency", "billed_to",
           "tax_id", "lines", "created")  # fmt: skip


def tax(net_nano: int, bps: int) -> int:
    """Rounded half up, away from zero, once per invoice."""
    sign = -1 if net_nano < 0 else 1
    return sign * ((abs(net_nano) * bps + 5000) // 10_000)


def write(
    books: Books, customer: str, kind: str, reference: str, lines: Sequence[dict[str, Any]], tax_nano: int | None = None
) -> str:
    """In the books' own transaction, under the customer's lock, which is what keeps the numbers gapless. Its net is the
    sum of its lines. `tax_nano` None: by the organisation's rate."""
    billed = books.execute("SELECT name, tax_id, tax_bps FROM organizations WHERE id = ?", (customer,)).fetchone()
    name, tax_id, bps = billed or (customer, "", 0)
    number = books.execute("SELECT COALESCE(MAX(number), 0) + 1 FROM invoices WHERE customer = ?", (customer,)).fetchone()[0]
    net = sum(line["nano_usd"] for line in lines)
    taxed = tax(net, bps) if tax_nano is None else tax_nano
    invoice = f"inv_{secrets.token_hex(8)}"
    row = (invoice, customer, number, kind, reference, net, taxed, net + taxed, "USD", name, tax_id, json.dumps(list(lines)), books.now)
    books.execute(f"INSERT INTO invoices ({', '.join(COLUMNS)}) VALUES ({', '.join('?' * len(COLUMNS))})", row)
    return invoice


def bill_month(ledger: Ledger, customer: str, month: str) -> dict[str, Any]:
    """The invoice on what was used in a month ("2026-11", UTC) that is over and was not paid by credits; the same one again if
    it is there. Raises UserError."""
    try:
        first = datetime.strptime(month, "%Y-%m").replace(tzinfo=UTC)
    except ValueError:
        raise UserError(f"{month!r} is no month such as 2026-11") from None
    until = first.replace(year=first.year + first.month // 12, month=first.month % 12 + 1)
    if until.timestamp() > ledger.clock():
        raise UserError(f"{month} is not over yet")
    reference = f"{customer}/{month}"
    with ledger.books([customer]) as books:
        if not books.exists(customer):
            raise UnknownId(f"no organization {customer!r}")
        if books.execute("SELECT 1 FROM invoices WHERE kind = 'usage' AND reference = ?", (reference,)).fetchone() is None:
            write(books, customer, "usage", reference, _used(books, customer, first.timestamp(), until.timestamp()))
    return next(i for i in listed(ledger.db, customer) if (i["kind"], i["reference"]) == ("usage", reference))


def _used(books: Books, customer: str, since: float, until: float) -> list[dict[str, Any]]:
    within = "customer = ? AND created >= ? AND created < ?"
    rows = books.execute(
        "SELECT model, COUNT(*), SUM(prompt_tokens), SUM(completion_tokens), SUM(nano_usd), SUM(credit_nano) FROM usage "
        f"WHERE {within} GROUP BY model ORDER BY model", (customer, since, until),
    ).fetchall()  # fmt: skip
    lines = [
        {"text": model, "quantity": int(count), "prompt_tokens": int(prompt), "completion_tokens": int(answer), "nano_usd": int(nano)}
        for model, count, prompt, answer, nano, _ in rows
    ]
    credits = sum(int(row[5]) for row in rows)
    sql = f"SELECT COUNT(*), COALESCE(SUM(nano_usd), 0) FROM adjustments WHERE {within}"
    count, adjusted = books.execute(sql, (customer, since, until)).fetchone()
    if credits:
        lines.append({"text": "paid by credits", "quantity": 1, "nano_usd": -credits})
    if count:
        lines.append({"text": "re-rated requests", "quantity": int(count), "nano_usd": int(adjusted)})
    return lines


def listed(db: Database, customer: str) -> list[dict[str, Any]]:
    """Newest first."""
    sql = f"SELECT {', '.join(COLUMNS)} FROM invoices WHERE customer = ? ORDER BY number DESC"
    return [_shown(row) for row in db.read(sql, (customer,))]


def one(db: Database, customer: str, invoice: str) -> dict[str, Any]:
    """Raises UnknownId."""
    rows = db.read(f"SELECT {', '.join(COLUMNS)} FROM invoices WHERE customer = ? AND id = ?", (customer, invoice))
    if not rows:
        raise UnknownId(f"no invoice {invoice!r}")
    return _shown(rows[0])


def _shown(row: Any) -> dict[str, Any]:
    return {**{name: row[name] for name in COLUMNS}, "lines": json.loads(row["lines"])}
