"""Usage rows against the ledger's debits, both ways, and against what upstreams said. Every row is rated again by the price
version it names; nothing is believed because it is written down twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from tidelock.service.books import USAGE_COLUMNS, usage_detail
from tidelock.service.db import Reading
from tidelock.service.prices import Counts, Price, PriceBook, stored_book
from tidelock.service.rating import counts
from tidelock.service.reconciliation.kinds import Discrepancy, Found
from tidelock.tokens.errors import UserError

WITHIN = "{0}.created >= ? AND {0}.created < ?"
REVENUE = "LEFT JOIN entries e ON e.customer = t.customer AND e.seq = t.seq AND e.kind = 'revenue'"


class Rater:
    """Prices by version, model and mode, each looked up once."""

    def __init__(self, read: Reading) -> None:
        self._read = read
        self._books: dict[str, PriceBook] = {}
        self._prices: dict[tuple[str, str, str], Price | None] = {}

    def price(self, version: str, model: str, mode: str) -> Price | None:
        """None if the books do not have it."""
        key = (version, model, mode)
        if key not in self._prices:
            try:
                if version not in self._books:
                    sql = "SELECT version, effective, book FROM price_versions WHERE version = ?"
                    self._books[version] = stored_book(self._read(sql, (version,)), version)
                self._prices[key] = self._books[version].price(model, mode)
            except UserError:
                self._prices[key] = None
        return self._prices[key]


def check(read: Reading, found: Found, inexact: Callable[[str], bool]) -> None:
    """`inexact(upstream)`: its tokens are not those we count (a text endpoint), so only sums of it are kept."""
    rater, window = Rater(read), (found.since, found.until)
    columns = ", ".join(f"u.{name}" for name in USAGE_COLUMNS)
    sql = (f"SELECT {columns}, t.detail AS detail, e.nano_usd AS debit FROM usage u "
           f"LEFT JOIN transactions t ON t.kind = 'settle' AND t.reference = u.request_id {REVENUE} "
           f"WHERE {WITHIN.format('u')}")  # fmt: skip
    for row in read.stream(sql, window):
        found.checked["usage"] += 1
        price = rater.price(row["price_version"], row["model"], row["mode"])
        for discrepancy in (_debit(row, price), *_upstream(row, price, found, inexact)):
            if discrepancy is not None:
                found.add(discrepancy)
    for discrepancy in (*_unused(read, window), *_adjustments(read, found, window, rater)):
        found.add(discrepancy)


def _debit(row: Any, price: Price | None) -> Discrepancy | None:
    charged, debit = row["nano_usd"], row["debit"] or 0
    rated = charged if price is None else price.cost_nano(counts(row))
    named = (row["request_id"], row["customer"])
    if row["detail"] is None:
        return Discrepancy("debit_missing", *named, charged, 0, charged)
    if rated != debit:
        return Discrepancy("debit_wrong", *named, rated, debit, rated - debit, f"{row['model']}, {row['price_version']}")
    if charged != debit:
        return Discrepancy("charge_wrong", *named, debit, charged, charged - debit)
    if usage_detail(row) != row["detail"]:
        return Discrepancy("usage_changed", *named, debit, debit, 0, f"settled as {row['detail']}")
    return None


def _upstream(row: Any, price: Price | None, found: Found, inexact: Callable[[str], bool]) -> Iterator[Discrepancy]:
    said = {kind: row[f"upstream_{kind}"] for kind in ("prompt", "completion", "cached")}
    billed = {"prompt": row["prompt_tokens"], "completion": row["completion_tokens"], "cached": row["cached_tokens"]}
    name = row["upstream"] or ""
    if all(value is None for value in said.values()):
        return
    sums = found.upstreams.setdefault(name, Counter())
    sums["requests"] += 1
    for kind, theirs in said.items():
        if theirs is None:
            continue
        sums[f"billed_{kind}"] += billed[kind]
        sums[f"reported_{kind}"] += theirs
        if theirs != billed[kind] and not inexact(name):
            worth = 0 if price is None else _worth(price, kind, theirs - billed[kind])
            yield Discrepancy(f"upstream_{kind}", row["request_id"], row["customer"], billed[kind], theirs, worth, name)


def _worth(price: Price, kind: str, tokens: int) -> int:
    """At our prices: cached tokens are worth what they save."""
    used = {"prompt": Counts(abs(tokens)), "completion": Counts(0, completion=abs(tokens)), "cached": Counts(abs(tokens))}[kind]
    nano = price.cost_nano(used) - (price.cost_nano(Counts(abs(tokens), abs(tokens))) if kind == "cached" else 0)
    return (nano if tokens > 0 else -nano) * (-1 if kind == "cached" else 1)


def _unused(read: Reading, window: tuple[float, float]) -> Iterator[Discrepancy]:
    sql = (f"SELECT t.reference, t.customer, e.nano_usd FROM transactions t LEFT JOIN usage u ON u.request_id = t.reference "
           f"{REVENUE} WHERE t.kind = 'settle' AND u.request_id IS NULL AND {WITHIN.format('t')}")  # fmt: skip
    for request_id, customer, debit in read.stream(sql, window):
        yield Discrepancy("usage_missing", request_id, customer, 0, debit or 0, debit or 0)


def _adjustments(read: Reading, found: Found, window: tuple[float, float], rater: Rater) -> Iterator[Discrepancy]:
    """Row against booking, and the last of a request's against what its version says the request costs."""
    sql = (f"SELECT a.request_id, a.price_version, a.customer, a.nano_usd, a.created, e.nano_usd AS booked FROM adjustments a "
           f"LEFT JOIN transactions t ON t.kind = 'rerate' AND t.reference = a.request_id || '/' || a.price_version {REVENUE} "
           f"WHERE {WITHIN.format('a')}")  # fmt: skip
    for row in read.stream(sql, window):
        found.checked["adjustments"] += 1
        name, nano, booked = f"{row['request_id']}/{row['price_version']}", row["nano_usd"], row["booked"] or 0
        if nano != booked:
            yield Discrepancy("adjustment_wrong", name, row["customer"], nano, booked, nano - booked)
        elif (due := _due(read, row, rater)) is not None and due != nano:
            yield Discrepancy("adjustment_wrong", name, row["customer"], due, nano, due - nano, row["price_version"])
    sql = (f"SELECT t.reference, t.customer, e.nano_usd FROM transactions t LEFT JOIN adjustments a "
           f"ON t.reference = a.request_id || '/' || a.price_version {REVENUE} "
           f"WHERE t.kind = 'rerate' AND a.request_id IS NULL AND {WITHIN.format('t')}")  # fmt: skip
    for reference, customer, booked in read.stream(sql, window):
        yield Discrepancy("adjustment_missing", reference, customer, 0, booked or 0, booked or 0)


def _due(read: Reading, row: Any, rater: Rater) -> int | None:
    """What this adjustment had to be, after the charge and the adjustments before it; None if that cannot be told."""
    used = read("SELECT * FROM usage WHERE request_id = ?", (row["request_id"],))
    price = rater.price(row["price_version"], used[0]["model"], used[0]["mode"]) if used else None
    if price is None:
        return None
    sql = "SELECT COALESCE(SUM(nano_usd), 0) FROM adjustments WHERE request_id = ? AND created < ?"
    before = int(read(sql, (row["request_id"], row["created"]))[0][0])
    return price.cost_nano(counts(used[0])) - used[0]["nano_usd"] - before
