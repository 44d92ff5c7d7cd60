"""The ledger against the papers: invoices on usage against the debits of their month, payments against what was credited
and booked back for them, and the invoices that each of those must have."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

from tidelock.service.analytics.calendar import month
from tidelock.service.db import Reading
from tidelock.service.reconciliation.kinds import Discrepancy, Found


def check(read: Reading, found: Found) -> None:
    window, absent = (found.since, found.until), Counter[str]()
    for discrepancy in (*_invoices(read, found, window), *_payments(read, found, window, absent), *_gaps(read, absent)):
        found.add(discrepancy)
    sql = ("SELECT COUNT(*), COALESCE(SUM(-e.nano_usd), 0) FROM transactions t JOIN entries e ON e.customer = t.customer "
           "AND e.seq = t.seq AND e.kind = 'outside' LEFT JOIN payments p ON p.id = t.reference WHERE t.kind = 'topup' "
           "AND p.id IS NULL AND t.created >= ? AND t.created < ?")  # fmt: skip
    count, nano = read(sql, window)[0]
    found.unbacked.update({"topups": count, "nano_usd": int(nano)} if count else {})


def _invoices(read: Reading, found: Found, window: tuple[float, float]) -> Iterator[Discrepancy]:
    sql = ("SELECT id, customer, kind, reference, net_nano, lines FROM invoices WHERE created >= ? AND created < ? "
           "ORDER BY customer, number")  # fmt: skip
    for row in read.stream(sql, window):
        found.checked["invoices"] += 1
        summed = sum(line["nano_usd"] for line in json.loads(row["lines"]))
        if summed != row["net_nano"]:
            yield Discrepancy("invoice_lines", row["id"], row["customer"], summed, row["net_nano"], row["net_nano"] - summed,
                              row["reference"])  # fmt: skip
        elif row["kind"] == "usage":
            due = _debits(read, row["customer"], row["reference"].rpartition("/")[2])
            if due != row["net_nano"]:
                yield Discrepancy("invoice_wrong", row["id"], row["customer"], due, row["net_nano"], due - row["net_nano"],
                                  row["reference"])  # fmt: skip


def _debits(read: Reading, customer: str, name: str) -> int:
    """What the ledger took for usage in a month, re-rating included, less what credits paid: that part is in the hashed
    detail of each settlement, last."""
    sql = ("SELECT t.kind, t.detail, e.nano_usd FROM transactions t LEFT JOIN entries e ON e.customer = t.customer "
           "AND e.seq = t.seq AND e.kind = 'revenue' WHERE t.customer = ? AND t.created >= ? AND t.created < ? "
           "AND t.kind IN ('settle', 'rerate')")  # fmt: skip
    when, total = month(name), 0
    for kind, detail, nano in read.stream(sql, (customer, when.starts, when.ends)):
        total += (nano or 0) - (int(detail.rpartition("|")[2]) if kind == "settle" else 0)
    return total


def _payments(read: Reading, found: Found, window: tuple[float, float], absent: Counter[str]) -> Iterator[Discrepancy]:
    sql = ("SELECT p.id, p.customer, p.net_nano, p.tax_nano, p.taken_nano, p.steps, t.customer AS credited_to, "
           "e.nano_usd AS credited, i.id AS invoice, i.net_nano AS invoiced, i.tax_nano AS taxed FROM payments p "
           "LEFT JOIN transactions t ON t.kind = 'topup' AND t.reference = p.id "
           "LEFT JOIN entries e ON e.customer = t.customer AND e.seq = t.seq AND e.kind = 'outside' "
           "LEFT JOIN invoices i ON i.kind = 'topup' AND i.reference = p.id "
           "WHERE p.customer <> '' AND p.created >= ? AND p.created < ?")  # fmt: skip
    for row in read.stream(sql, window):
        found.checked["payments"] += 1
        payment, customer, net, credited = row["id"], row["customer"], row["net_nano"], -(row["credited"] or 0)
        if row["credited_to"] is None:
            yield Discrepancy("credit_missing", payment, customer, net, 0, -net)
            continue
        if (credited, row["credited_to"]) != (net, customer):
            yield Discrepancy("credit_wrong", payment, customer, net, credited, credited - net, f"credited to {row['credited_to']}")
        if row["invoice"] is None:
            absent[customer] += 1
            yield Discrepancy("invoice_missing", payment, customer, net, 0, 0, "of a payment")
        elif (row["invoiced"], row["taxed"]) != (net, row["tax_nano"]):
            yield Discrepancy("invoice_wrong", row["invoice"], customer, net, row["invoiced"], row["invoiced"] - net, "of a payment")
        yield from _paid_back(read, row, absent)


def _paid_back(read: Reading, row: Any, absent: Counter[str]) -> Iterator[Discrepancy]:
    """Step by step, as payments books it: reference ID/1, ID/2, …, each with its credit note."""
    payment, customer, total = row["id"], row["customer"], row["net_nano"] + row["tax_nano"]
    booked = 0
    for step in range(1, row["steps"] + 1):
        reference = f"{payment}/{step}"
        sql = ("SELECT e.nano_usd, i.net_nano FROM transactions t LEFT JOIN entries e ON e.customer = t.customer AND e.seq = t.seq "
               "AND e.kind = 'refunds' LEFT JOIN invoices i ON i.kind = 'credit' AND i.reference = t.reference "
               "WHERE t.kind = 'refund' AND t.reference = ?")  # fmt: skip
        for nano, noted in read(sql, (reference,)):
            booked += nano or 0
            if noted is None:
                absent[customer] += 1
                yield Discrepancy("invoice_missing", reference, customer, -(nano or 0), 0, 0, "a credit note")
            elif noted != -(nano or 0):
                yield Discrepancy("invoice_wrong", reference, customer, -(nano or 0), noted, 0, "a credit note")
    due = row["taken_nano"] * row["net_nano"] // total
    if booked != due:
        yield Discrepancy("payback_wrong", payment, customer, due, booked, booked - due)


def _gaps(read: Reading, absent: Counter[str]) -> Iterator[Discrepancy]:
    """Invoices are numbered without gaps; a gap that no payment accounts for is an invoice that is gone."""
    last: dict[str, int] = {}
    gaps: dict[str, list[int]] = {}
    for customer, number in read.stream("SELECT customer, number FROM invoices ORDER BY customer, number"):
        expected = last.get(customer, 0) + 1
        if number > expected:
            gaps.setdefault(customer, []).extend(range(expected, min(number, expected + 1000)))
        last = {customer: number}
    for customer, numbers in gaps.items():
        for number in numbers[: max(len(numbers) - absent[customer], 0)]:
            yield Discrepancy("invoice_missing", f"{customer}#{number}", customer, 0, 0, 0, "a number that is not there")
