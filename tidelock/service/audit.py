"""What `tidelock doctor`, `tidelock admin verify` and the report say of the books: everything recomputed from the
entries, no projection believed, every hash chain followed from its start."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from tidelock.service import chain
from tidelock.service.books import USAGE_COLUMNS, usage_detail
from tidelock.service.db import Database, Reading


@dataclass(frozen=True)
class Audit:
    """A sound ledger has zeros everywhere but in the first two."""

    transactions: int
    entries: int
    sum_nano: int  # of all entries
    unbalanced: int  # transactions whose entries do not sum to zero
    wrong_balances: int  # accounts whose balance is not the sum of their entries
    overspend_nano: int  # charged beyond what was paid in or given, summed over customers
    unmetered: int  # settlements without their usage row as it was written, and customers whose revenue is not their usage
    held_nano: int  # promised to holds, minus the open holds themselves
    broken_links: int  # transactions whose hash does not follow from the one before, and chains without their end

    @property
    def sound(self) -> bool:
        faults = (self.sum_nano, self.unbalanced, self.wrong_balances, self.overspend_nano, self.unmetered)
        return not any((*faults, self.held_nano, self.broken_links))


def audit(db: Database) -> Audit:
    """Of the books as they stand at one moment; requests may go on meanwhile."""
    with db.snapshot() as read:
        return _audit(read)


def _audit(read: Reading) -> Audit:
    def one(sql: str) -> int:
        return read(sql)[0][0]

    return Audit(
        transactions=one("SELECT COUNT(*) FROM transactions"),
        entries=one("SELECT COUNT(*) FROM entries"),
        sum_nano=one("SELECT CAST(COALESCE(SUM(nano_usd), 0) AS BIGINT) FROM entries"),
        unbalanced=one(
            "SELECT COUNT(*) FROM (SELECT customer, seq FROM entries GROUP BY customer, seq HAVING SUM(nano_usd) <> 0) AS t"
        ),
        wrong_balances=one(
            "SELECT COUNT(*) FROM (SELECT 1 AS one FROM (SELECT customer, kind, lot, nano_usd AS nano FROM entries UNION ALL "
            "SELECT customer, kind, lot, -balance_nano FROM accounts) AS both_sides "
            "GROUP BY customer, kind, lot HAVING SUM(nano) <> 0) AS wrong"
        ),
        overspend_nano=one(
            "SELECT CAST(COALESCE(SUM(CASE WHEN nano < 0 THEN -nano ELSE 0 END), 0) AS BIGINT) FROM "
            "(SELECT SUM(nano_usd) AS nano FROM entries WHERE kind IN ('cash', 'extra', 'voucher', 'plan', 'held') "
            "GROUP BY customer) AS have"
        ),
        unmetered=_unmetered(read),
        held_nano=one(
            "SELECT CAST((SELECT COALESCE(SUM(nano_usd), 0) FROM entries WHERE kind = 'held') - "
            "(SELECT COALESCE(SUM(nano_usd), 0) FROM holds WHERE state = 'open') AS BIGINT)"
        ),
        broken_links=_broken_links(read),
    )


def _unmetered(read: Reading) -> int:
    """Settlements without their usage row or with other numbers in it, usage rows without a settlement, and customers
    whose revenue is not the sum of their usage and its adjustments."""
    columns = ", ".join(f"u.{name}" for name in USAGE_COLUMNS)
    settled = "transactions t ON t.kind = 'settle' AND t.reference = u.request_id"
    said = "t.detail AS detail, t.customer AS whose, t.created AS at"
    rows = read.stream(f"SELECT {columns}, {said} FROM usage u LEFT JOIN {settled}")
    wrong = sum(
        (row["detail"], row["whose"]) != (usage_detail(row), row["customer"])
        or abs(row["at"] - row["created"]) >= 1  # the first release looked at the clock twice
        for row in rows
    )
    without = read(
        "SELECT COUNT(*) FROM transactions t LEFT JOIN usage u ON u.request_id = t.reference "
        "WHERE t.kind = 'settle' AND u.request_id IS NULL"
    )[0][0]
    revenue = read(
        "SELECT COUNT(*) FROM (SELECT customer FROM (SELECT customer, nano_usd FROM usage UNION ALL "
        "SELECT customer, nano_usd FROM adjustments UNION ALL SELECT customer, -nano_usd FROM entries WHERE kind = 'revenue') "
        "AS sides GROUP BY customer HAVING SUM(nano_usd) <> 0) AS wrong"
    )[0][0]
    return wrong + without + revenue


def _broken_links(read: Reading) -> int:
    """Follows every customer's chain from its start to the head that `customers` names."""
    heads = {row[0]: (row[1], row[2]) for row in read("SELECT customer, seq, hash FROM customers")}
    broken, at = 0, {customer: (0, "") for customer in heads}
    for customer, t, entries in _transactions(read):
        seq, before = at.get(customer, (0, ""))
        fields = (t["kind"], t["reference"], t["detail"], t["created"])
        hashed = chain.link(before, customer, seq + 1, *fields, entries)
        broken += t["seq"] != seq + 1 or t["hash"] != hashed
        at[customer] = (t["seq"], t["hash"])
    return broken + sum(at[customer] != head for customer, head in heads.items()) + len(at.keys() - heads.keys())


def audit_and_root(read: Reading) -> tuple[Audit, str]:
    """The audit, and `chain.root`, of one snapshot."""
    return _audit(read), chain.root(map(tuple, read("SELECT customer, seq, hash FROM customers")))


def _transactions(read: Reading) -> Iterator[tuple[str, Any, list[tuple]]]:
    """(customer, transaction, its entries as (kind, lot, nano)) in chain order: two streams side by side, so that memory
    does not grow with the books. Entries without a transaction cannot be (the schema refuses them)."""
    moved = read.stream("SELECT customer, seq, kind, lot, nano_usd FROM entries ORDER BY customer, seq, n")
    groups = groupby(moved, key=lambda row: (row[0], row[1]))
    key, rows = next(groups, (None, ()))
    for t in read.stream("SELECT * FROM transactions ORDER BY customer, seq"):
        entries: list[tuple] = []
        if key == (t["customer"], t["seq"]):
            entries = [tuple(row)[2:] for row in rows]
            key, rows = next(groups, (None, ()))
        yield t["customer"], t, entries


def statement(db: Database) -> list[dict[str, Any]]:
    """Per customer: paid in, spent, held and free nano-USD, requests and tokens by class."""
    zero = {"free_nano": 0, "held_nano": 0, "requests": 0, "spent_nano": 0, "prompt_tokens": 0, "cached_tokens": 0,
            "completion_tokens": 0, "paid_nano": 0}  # fmt: skip
    sql = "SELECT customer FROM customers ORDER BY customer"
    lines = {row[0]: {"customer": row[0], **zero} for row in db.read(sql)}
    for customer, kind, nano in db.read(
        "SELECT customer, kind, CAST(SUM(balance_nano) AS BIGINT) FROM accounts GROUP BY customer, kind"
    ):
        line = lines[customer]
        if kind in ("cash", "extra", "voucher", "plan"):
            line["free_nano"] += nano
        elif kind == "held":
            line["held_nano"] = nano
        elif kind == "outside":
            line["paid_nano"] = -nano
    sums = ("nano_usd", "prompt_tokens", "cached_tokens", "completion_tokens")
    columns = ", ".join(f"CAST(SUM({name}) AS BIGINT)" for name in sums)
    for customer, requests, spent, *tokens in db.read(
        f"SELECT customer, COUNT(*), {columns} FROM usage GROUP BY customer"
    ):
        lines[customer] |= {"requests": requests, "spent_nano": spent, **dict(zip(sums[1:], tokens, strict=True))}
    return list(lines.values())
