"""The second path to the same numbers: every transaction is replayed in order, in plain Python, sharing nothing with the
SQL of `metrics` and `relations`.

What a request cost in money and in credits is followed through the entries of its hold, extensions and settlement; the
usage row's own split is not looked at. What is deferred is what the pockets and the open holds contain, not a difference
of totals. So agreement of the two says something about the books, not only about the queries.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

from tidelock.service.analytics.replay_selling import selling

MONEY, CREDIT = ("cash", "extra"), ("voucher", "plan")


def replayed(read: Callable[..., list[Any]], last: str, base: str) -> dict[str, dict[tuple[str, str], int]]:
    """As `figures.figures`, up to the month `last`; metrics without a number are left out."""
    names = _months(read, last)
    money = _Money(read, names)
    out: dict[str, Counter[tuple[str, str]]] = defaultdict(Counter)
    _payers(read, money, out, names)
    _revenue(read, money, out, names, base)
    _retention(money, out, names)
    _plans(read, out, names)
    _recognised(read, out, names)
    selling(read, out, list(zip(names, [_begin(name) for name in names], [_end(name) for name in names], strict=True)))
    _models(read, money, out, names)
    for name, totals in money.totals.items():
        out[name].update({(month, part): nano for (month, part), nano in totals.items() if month in names})
    kept = {name: {key: value for key, value in values.items() if value} for name, values in out.items()}
    return {name: values for name, values in kept.items() if values}


def _name(when: float) -> str:
    return datetime.fromtimestamp(when, UTC).strftime("%Y-%m")


def _end(name: str) -> float:
    year, month = int(name[:4]), int(name[5:])
    return datetime(year + month // 12, month % 12 + 1, 1, tzinfo=UTC).timestamp()


def _begin(name: str) -> float:
    return datetime(int(name[:4]), int(name[5:]), 1, tzinfo=UTC).timestamp()


def _months(read: Callable[..., list[Any]], last: str) -> list[str]:
    columns = (("transactions", "created"), ("plan_terms", "starts"), ("refusals", "hour"), ("compute", "hour"))
    times = [row[0] for table, column in columns for row in read(f"SELECT {column} FROM {table}")]
    name = min([_name(when) for when in times] + [last])
    names = [name]
    while name < last:
        name = _name(_end(name))
        names.append(name)
    return names


class _Money:
    """What the entries say. `paid` and `credit`: nano by (month, customer, model); `calls`: paid debits, likewise."""

    def __init__(self, read: Callable[..., list[Any]], names: list[str]) -> None:
        self.paid: Counter[tuple[str, str, str]] = Counter()
        self.credit: Counter[tuple[str, str, str]] = Counter()
        self.calls: Counter[tuple[str, str, str]] = Counter()
        self.first_call: dict[str, float] = {}
        self.topped_up: set[tuple[str, str]] = set()
        self.totals: dict[str, Counter[tuple[str, str]]] = defaultdict(Counter)
        self.models = {row[0]: row[1] for row in read("SELECT request_id, model FROM usage")}
        changes: Counter[str] = Counter()  # of what is prepaid and unused
        owed: Counter[str] = Counter()
        for customer, kind, reference, created, detail, entries, open_holds in _transactions(read):
            month = _name(created)
            prepaid = sum(nano for account, nano in entries if account in MONEY)
            if kind in ("hold", "extend"):
                request_id = reference if kind == "hold" else reference.rpartition("/")[0]
                taken = open_holds.setdefault(request_id, Counter())
                taken.update({account: -nano for account, nano in _pockets(entries)})
                prepaid = 0  # it only moved into the hold
            elif kind in ("settle", "release"):
                taken = open_holds.pop(reference, Counter())
                for account, nano in _pockets(entries):
                    taken[account] -= nano
                paid, credit = (sum(taken[account] for account in accounts) for accounts in (MONEY, CREDIT))
                if kind == "settle":
                    self._charge(created, customer, self.models[reference], paid, credit)
                prepaid = -paid
            elif kind == "rerate":
                revenue = sum(nano for account, nano in entries if account == "revenue")
                credit = -sum(nano for account, nano in entries if account in CREDIT)
                self._charge(created, customer, self.models[reference.rpartition("/")[0]], revenue - credit, credit)
            elif kind == "topup":
                self.topped_up.add((month, customer))
            changes[month] += prepaid
            for account, nano in entries:
                if account == "receivable":
                    owed[month] -= nano
                elif account == "outside":
                    self.totals["cash"][month, "in"] -= nano
                elif account == "fees":
                    self.totals["plans.fees"][month, detail] += nano
                elif account == "refunds":
                    self.totals["cash"][month, "refunded"] += nano
                elif account in CREDIT and kind.endswith("_grant"):
                    self.totals["credits.granted"][month, account] += nano
                elif account in CREDIT and kind == "expire":
                    self.totals["breakage"][month, account] -= nano
        for name, changed in (("deferred", changes), ("receivable", owed)):
            total = 0
            for month in names:
                total += changed[month]
                self.totals[name][month, ""] = total

    def _charge(self, created: float, customer: str, model: str, paid: int, credit: int) -> None:
        key = (_name(created), customer, model)
        self.paid[key] += paid
        self.credit[key] += credit
        if paid > 0:
            self.calls[key] += 1
            self.first_call[customer] = min(created, self.first_call.get(customer, created))

    def by_customer(self) -> dict[str, Counter[str]]:
        """month -> customer -> nano paid."""
        out: dict[str, Counter[str]] = defaultdict(Counter)
        for (month, customer, _), nano in self.paid.items():
            out[month][customer] += nano
        return out

    def payers(self) -> dict[str, set[str]]:
        out: dict[str, set[str]] = defaultdict(set)
        for month, customer, _ in self.calls:
            out[month].add(customer)
        return out


def _pockets(entries: list[Any]) -> list[Any]:
    return [entry for entry in entries if entry[0] in MONEY + CREDIT]


def _transactions(
    read: Callable[..., list[Any]],
) -> Iterator[tuple[str, str, str, float, str, list[Any], dict[str, Counter[str]]]]:
    """Each with its entries, summed by kind of account (two vouchers are one), and its customer's open holds."""
    entries: dict[tuple[str, int], Counter[str]] = defaultdict(Counter)
    for customer, seq, account, nano in read("SELECT customer, seq, kind, nano_usd FROM entries"):
        entries[customer, seq][account] += nano
    holds: dict[str, dict[str, Counter[str]]] = defaultdict(dict)
    for customer, seq, kind, reference, created, detail in read(
        "SELECT customer, seq, kind, reference, created, detail FROM transactions ORDER BY customer, seq"
    ):
        yield customer, kind, reference, created, detail, list(entries[customer, seq].items()), holds[customer]


def _payers(read: Any, money: _Money, out: Any, names: list[str]) -> None:
    terms = [tuple(row) for row in read("SELECT customer, starts, ends FROM plan_terms WHERE price_nano > 0")]
    regions = _regions(read)
    payers = money.payers()
    cohort = {customer: min(m for m in payers if customer in payers[m]) for customer in money.first_call}
    created = {row[0]: row[1] for row in read("SELECT customer, created FROM customers")}
    starts = dict(zip(names, [0.0, *(_end(name) for name in names[:-1])], strict=True))
    waits: dict[str, list[float]] = defaultdict(list)
    for customer, first in money.first_call.items():
        if created[customer] > 0:
            waits[_name(first)].append(first - created[customer])
    for name in names:
        paying = payers.get(name, set())
        out["payers.usage"][name, ""] = len(paying)
        out["payers.usage_or_plan"][name, ""] = len(paying | {c for c, s, e in terms if s < _end(name) and e > starts[name]})
        last_month, ever = payers.get(_name(starts[name] - 1), set()) if name != names[0] else set(), set()
        for earlier in names[: names.index(name)]:
            ever |= payers.get(earlier, set())
        for part, who in (("new", paying - ever), ("kept", paying & last_month), ("returned", paying & ever - last_month),
                          ("lost", last_month - paying)):  # fmt: skip
            out["payers.moves"][name, part] = len(who)
        topped_up = {customer for month, customer in money.topped_up if month == name}
        out["payers.cash"][name, ""] = len(topped_up | {c for c, s, _ in terms if _name(s) == name})
        for customer in paying:
            out["payers.by_region"][name, regions[customer][0]] += 1
            out["cohorts.payers"][name, cohort[customer]] += 1
        if waits[name]:
            ordered = sorted(waits[name])
            out["first_call.seconds"][name, ""] = ordered[(len(ordered) - 1) // 2]
    for (month, customer, _), nano in money.paid.items():
        if month in starts and customer in cohort:
            out["cohorts.revenue"][month, cohort[customer]] += nano


def _regions(read: Any) -> dict[str, tuple[str, str]]:
    out = {row[0]: ("default USD", "USD") for row in read("SELECT customer FROM customers")}
    for customer, entity, currency in read("SELECT customer, entity, currency FROM billing"):
        out[customer] = (f"{entity} {currency}", currency)
    return out


def _revenue(read: Any, money: _Money, out: Any, names: list[str], base: str) -> None:
    regions = _regions(read)
    rates = {(row[0], row[1]): row[2] for row in read("SELECT month, currency, nano_usd FROM fx_rates")}
    totals: Counter[tuple[str, str, str]] = Counter()
    for (month, customer, _), nano in money.paid.items():
        if month in names:
            out["revenue.usage"][month, ""] += nano
            totals[month, *regions[customer]] += nano
    for (month, _, _), nano in money.credit.items():
        if month in names:
            out["credits.used"][month, ""] += nano
    for (month, region, currency), nano in totals.items():
        out["revenue.by_region"][month, region] = nano
        own, fixed = rates.get((month, currency)), rates.get((base, currency))
        if own and fixed:
            nano = abs(nano) * fixed // own * (1 if nano > 0 else -1)
        out["revenue.constant_currency"][month, region] = nano
    for month, customers in money.by_customer().items():
        if month in names:
            largest = sorted(customers.values(), reverse=True)
            for part, most in (("top 1", 1), ("top 10", 10), ("top 100", 100), ("all", len(largest))):
                out["concentration"][month, part] = sum(largest[:most])


def _retention(money: _Money, out: Any, names: list[str]) -> None:
    paid, payers = money.by_customer(), money.payers()
    for lag in (1, 12):
        for before, now in zip(names, names[lag:], strict=False):
            for customer in payers.get(before, ()):
                was, is_now = paid[before][customer], paid[now][customer] if now in paid else 0
                out[f"retention.{lag}m"][now, "base"] += was
                out[f"retention.{lag}m"][now, "net"] += is_now
                out[f"retention.{lag}m"][now, "kept"] += min(was, is_now)


def _plans(read: Any, out: Any, names: list[str]) -> None:
    terms = read("SELECT customer, plan, starts, ends, price_nano, months FROM plan_terms WHERE price_nano > 0")
    before: Counter[str] = Counter()
    seen: set[str] = set()
    for name in names:
        now: Counter[str] = Counter()
        for customer, plan, starts, ends, price, months in terms:
            if starts < _end(name) <= ends:
                now[customer] += price // months
                out["plans.active"][name, plan] += 1
        for customer in before.keys() | now.keys():
            was, has = before[customer], now[customer]
            out["mrr"][name, "start"] += was
            out["mrr"][name, "end"] += has
            if was == 0:
                out["mrr"][name, "reactivation" if customer in seen else "new"] += has
            elif has == 0:
                out["mrr"][name, "churn"] += was
            else:
                out["mrr"][name, "expansion" if has > was else "contraction"] += abs(has - was)
        seen |= {customer for customer, nano in now.items() if nano}
        before = now


def _in_order(term: Any) -> tuple[str, int]:
    """A subscription's terms, the first one first."""
    subscription, _, number = term["reference"].rpartition("/")
    return subscription, int(number) if number.isdecimal() else 0


def _recognised(read: Any, out: Any, names: list[str]) -> None:
    """What an upgrade credited is told by the ledger: the new plan's price less the fee that was taken for it."""
    fees: Counter[str] = Counter()
    booked: dict[str, float] = {}
    for reference, when, nano in read(
        "SELECT t.reference, t.created, e.nano_usd FROM transactions t LEFT JOIN entries e ON e.customer = t.customer AND e.seq = t.seq "
        "AND e.kind = 'fees' WHERE t.kind = 'plan_fee'"
    ):
        fees[reference] += nano or 0
        booked[reference] = when
    rows = read("SELECT reference, customer, plan, starts, ends, planned_s, price_nano FROM plan_terms WHERE price_nano > 0")
    credited, before = {}, None
    for row in sorted(rows, key=_in_order):
        subscription = row["reference"].rpartition("/")[0]
        if before is not None and before.rpartition("/")[0] == subscription and row["reference"] in fees:
            credited[before] = row["price_nano"] - fees[row["reference"]]
        before = row["reference"]
    for row in rows:
        begins = int(max(row["starts"], booked.get(row["reference"], 0)) // 1)
        ends, price = int(row["ends"] // 1), row["price_nano"]
        whole = price
        if ends < row["planned_s"]:
            whole -= credited.get(row["reference"], 0)
        before = 0
        for name in names:
            at = int(_end(name))
            if at >= ends:
                now = whole
            else:
                now = price * (at - begins) // (row["planned_s"] - begins) if at > begins else 0
            out["plans.recognised"][name, row["plan"]] += now - before
            if begins < at < ends:
                out["plans.deferred"][name, ""] += price - now
            before = now


def _models(read: Any, money: _Money, out: Any, names: list[str]) -> None:
    for row in read(
        "SELECT created, prompt_tokens, cached_tokens, cache_write_5m_tokens, cache_write_1h_tokens, completion_tokens FROM usage"
    ):
        created, prompt, cached, write_5m, write_1h, completion = row
        month = _name(created)
        if month in names:
            classes = {"fresh": prompt - cached - write_5m - write_1h, "cached": cached, "cache_write_5m": write_5m,
                       "cache_write_1h": write_1h, "output": completion}  # fmt: skip
            for part, tokens in classes.items():
                out["tokens"][month, part] += tokens
    for (month, _, model), nano in money.paid.items():
        if month in names:
            out["revenue.by_model"][month, model] += nano
            out["margin"][month, model] += nano
    prices: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for model, starts, nano in read("SELECT model, starts, nano_usd FROM compute_rates"):
        prices[model].append((starts, nano))
    for hour, model, milliseconds in read("SELECT hour, model, milliseconds FROM compute"):
        month = _name(hour)
        if month in names:
            _, price = max([rate for rate in prices[model] if rate[0] <= hour], default=(0.0, 0))
            cost = milliseconds * price // 1000
            out["compute.milliseconds"][month, model] += milliseconds
            out["compute.cost"][month, model] += cost
            out["margin"][month, model] -= cost
    asked: Counter[tuple[str, str]] = Counter()
    listed: Counter[tuple[str, str]] = Counter()
    for created, model, nano in read("SELECT created, model, nano_usd FROM usage"):
        asked[_name(created), model] += 1
        listed[_name(created), model] += nano
    for hour, model, cause, requests in read("SELECT hour, model, cause, requests FROM refusals"):
        month = _name(hour)
        if month in names:
            out["rejected"][month, cause] += requests
            if asked[month, model]:
                out["rejected.worth"][month, cause] += requests * (listed[month, model] // asked[month, model])
