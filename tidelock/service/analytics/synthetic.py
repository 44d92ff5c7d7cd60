"""A synthetic year of business, posted through the real ledger: what the analytics must find again from the raw rows.

Seeded. In the last three months paying users grow by +150 %, +200 % and +160 %: +170 % a month on average. In the last
four, usage revenue of the overseas entity grows to exactly four times what it was.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from tidelock.service.analytics.calendar import Month, month, month_of, shifted, span
from tidelock.service.analytics.facts import Facts, Term, sell, write
from tidelock.service.books import Books
from tidelock.service.db import Database
from tidelock.service.ledger import Ledger
from tidelock.service.prices import Price, PriceBook
from tidelock.service.tally import HOUR_S, add
from tidelock.tokens.errors import UserError

LAST, MONTHS = "2026-03", 12
GROWTH = (Fraction(5, 2), Fraction(3), Fraction(13, 5))  # of paying users, over the last three months
HOME, OVERSEAS = ("Tidelock Home", "CNY"), ("Tidelock International", "USD")
OVERSEAS_BASE, OVERSEAS_MULTIPLE = 7, 4  # the month (counted from 0) whose overseas revenue the last one's is four times
UNIT = 300  # nano-USD: all prices of the large model, and sums of the small one's, are multiples of it
USD = 10**9
PRICES = {"tide-small": Price(600, 100, 3000), "tide-large": Price(3000, 300, 15000)}
VERSION = "synthetic-1"
PLANS = {"small": 19 * USD, "medium": 39 * USD, "large": 99 * USD}
CAUSES = ("balance", "limit", "overloaded", "bad_request")
DAY_S = 86400


class DayLedger(Ledger):
    """The real ledger, with the operations of one day in one transaction."""

    def __init__(self, db: Database) -> None:
        super().__init__(db, clock=lambda: self.now)
        self.now = 0.0
        self.open: Books | None = None

    @contextmanager
    def day(self, customers: list[str]) -> Iterator[Books]:
        with super().books(customers) as books:
            self.open = books
            try:
                yield books
            finally:
                self.open = None

    @contextmanager
    def books(self, customers: Any, requests: Any = ()) -> Iterator[Books]:
        if self.open is None:
            with super().books(customers, requests) as books:
                yield books
        else:
            self.open.now = float(self.now)
            yield self.open


@dataclass
class Member:
    """A customer on a plan."""

    customer: str
    plan: str
    until: float = 0.0
    terms: int = 0


@dataclass
class Year:
    """The state of the business while it is being made up."""

    ledger: DayLedger
    draw: random.Random
    base: int  # paying users in the month before the growth
    signups: dict[int, list[tuple[str, tuple[str, str]]]] = field(default_factory=lambda: defaultdict(list))  # by day
    events: dict[int, list[tuple[float, str, Callable[[], None]]]] = field(default_factory=lambda: defaultdict(list))
    overseas: set[str] = field(default_factory=set)
    members: list[Member] = field(default_factory=list)
    lapsed: list[str] = field(default_factory=list)
    payers: list[str] = field(default_factory=list)
    spend: dict[int, int] = field(default_factory=dict)  # overseas revenue by month
    compute: dict[tuple[int, str], int] = field(default_factory=lambda: defaultdict(int))
    count: int = 0


def months() -> list[Month]:
    return span(shifted(LAST, 1 - MONTHS), LAST)


def payer_targets(base: int) -> list[int]:
    """Paying users of every month."""
    quiet = MONTHS - len(GROWTH)
    targets = [max(1, base * (3 * (quiet - 1) + 7 * n) // (10 * (quiet - 1))) for n in range(quiet)]
    for step in GROWTH:
        targets.append(int(targets[-1] * step))
    return targets


def make_year(db: Database, seed: int, base: int = 100) -> None:
    """Fills an empty database. `base`: paying users before the growth, an even number of at least 20.

    Raises UserError if the database is not empty."""
    if base < 20 or base % 2:
        raise UserError(f"the growth begins with an even number of paying users, at least 20, not {base}")
    if db.read("SELECT 1 FROM customers LIMIT 1"):
        raise UserError("the books are not empty; a synthetic year goes into new ones")
    PriceBook(VERSION, PRICES).register(db)
    year = Year(DayLedger(db), random.Random(seed), base)
    fx = {(m.name, "CNY"): 137_000_000 + 500_000 * n + year.draw.randrange(400_000) for n, m in enumerate(months())}
    begin = float(months()[0].starts)
    with db.transaction() as tx:
        write(tx, Facts({}, fx, {("tide-small", begin): 400_000, ("tide-large", begin): 900_000}))
    for n, (this, target) in enumerate(zip(months(), payer_targets(base), strict=True)):
        _plan_payers(year, n, this, target)
        _plan_members(year, this, max(1, target // 3))
        _plan_visitors(year, this, max(1, target // 5))
        for start in range(this.starts, this.ends, DAY_S):
            _post_day(year, start, target)


# ---- what will happen in a month -----------------------------------------------------------------------------------


def _plan_payers(year: Year, n: int, this: Month, target: int) -> None:
    """Nine of ten stay, some come back, the rest are new; each spends its budget to the nano."""
    draw = year.draw
    stay = [c for c in year.payers if draw.random() < 0.9][:target]
    back = [c for c in year.lapsed if draw.random() < 0.1][: target - len(stay)]
    year.lapsed = [c for c in (*year.lapsed, *year.payers) if c not in {*stay, *back}]
    new = [_new(year, "api") for _ in range(target - len(stay) - len(back))]
    joined = {customer: _sign_up(year, customer, this) for customer in new}
    year.payers = [*stay, *back, *new]
    abroad = [c for c in year.payers if c in year.overseas]
    at_home = [c for c in year.payers if c not in year.overseas]
    budgets = _budgets(draw, at_home, draw.randrange(1_500, 4_000) * len(at_home) * USD // 1000)
    budgets |= _budgets(draw, abroad, _overseas_total(year, n, len(abroad)))
    for customer, budget in budgets.items():
        gift = UNIT * draw.randrange(100_000, 800_000) if customer in joined and draw.random() < 0.3 else 0
        _plan_spending(year, customer, joined.get(customer, this.starts), this.ends, budget, gift)


def _overseas_total(year: Year, n: int, payers: int) -> int:
    """Free until the base month, then on the way to exactly four times its amount."""
    if n <= OVERSEAS_BASE:
        total = year.draw.randrange(2_000, 5_000) * payers * USD // 1000
    else:
        part = Fraction(n - OVERSEAS_BASE, MONTHS - 1 - OVERSEAS_BASE)
        total = year.spend[OVERSEAS_BASE] + int(year.spend[OVERSEAS_BASE] * (OVERSEAS_MULTIPLE - 1) * part)
    year.spend[n] = total - total % UNIT
    return year.spend[n]


def _budgets(draw: random.Random, customers: list[str], total: int) -> dict[str, int]:
    """`total`, split unevenly into multiples of UNIT."""
    weights = [draw.lognormvariate(0, 1) for _ in customers]
    budgets = {c: max(1, int(total / UNIT * w / sum(weights))) * UNIT for c, w in zip(customers, weights, strict=True)}
    if budgets:
        largest = max(budgets, key=lambda c: budgets[c])
        budgets[largest] += total - total % UNIT - sum(budgets.values())
    return budgets


def _plan_spending(year: Year, customer: str, since: float, until: float, budget: int, gift: int) -> None:
    draw, ledger = year.draw, year.ledger
    first = since + draw.uniform(600, max(1200.0, (until - since) / 3))
    if gift:
        year.count += 1
        lot = f"welcome-{year.count}"
        _at(year, first - 300, customer, lambda: _must(ledger.grant(customer, gift, lot=lot, expires=first + 90 * DAY_S)))
    wanted = 4 * (budget + gift) // (5 * USD) * 5 * USD + 5 * USD  # cached input is held at its full price
    _at(year, first - 200, customer, lambda: _top_up(year, customer, wanted))
    parts = draw.randrange(3, 13)
    cuts = sorted(draw.randrange(1, (budget + gift) // UNIT + 1) for _ in range(parts - 1))
    edges = [0, *cuts, (budget + gift) // UNIT]
    for low, high in zip(edges, edges[1:], strict=False):
        if high > low:
            when, nano = draw.uniform(first, until - 120), (high - low) * UNIT
            _at(year, when, customer, lambda nano=nano: _request(year, customer, nano))
    if draw.random() < 0.02:
        _at(year, until - 60, customer, lambda: _refund(year, customer))


def _plan_members(year: Year, this: Month, target: int) -> None:
    """Terms that end are renewed, changed or left; new members come, and some who left come back."""
    draw = year.draw
    current = [m for m in year.members if m.until > this.starts]
    gone = [m for m in year.members if m.until <= this.starts]
    for member in current:
        if member.until < this.ends and draw.random() < 0.9:
            if draw.random() < 0.15:
                member.plan = draw.choice(list(PLANS))
            _plan_term(year, member, member.until)
    for member in gone:
        if draw.random() < 0.1:
            _plan_term(year, member, this.starts + draw.uniform(1, 27) * DAY_S)
    for _ in range(target - len(current)):
        member = Member(_new(year, "plan"), draw.choice(list(PLANS)))
        year.members.append(member)
        _plan_term(year, member, _sign_up(year, member.customer, this) + draw.uniform(600, 7200))


def _plan_term(year: Year, member: Member, starts: float) -> None:
    draw, customer = year.draw, member.customer
    count = 12 if draw.random() < 0.05 else 1
    price = PLANS[member.plan] * (10 if count == 12 else 1)
    ends = starts + month(shifted(month_of(starts).name, count)).starts - month_of(starts).starts
    member.until, member.terms = ends, member.terms + 1
    term = Term(f"{customer}/{member.terms}", customer, member.plan, starts, ends, count, price)
    credits = PLANS[member.plan] // 100 // UNIT * UNIT

    def begin() -> None:
        sell(year.ledger.open.execute, term)
        _must(year.ledger.grant(customer, credits, kind="plan", lot=term.reference, expires=starts + 30 * DAY_S))

    _at(year, starts, customer, begin)
    for _ in range(draw.randrange(3)):
        when = starts + draw.uniform(1, 20) * DAY_S
        _at(year, when, customer, lambda: _request(year, customer, credits // 12 // UNIT * UNIT))


def _plan_visitors(year: Year, this: Month, target: int) -> None:
    """They try the service on a voucher and never pay."""
    for _ in range(target):
        customer = _new(year, "visitor")
        joined = _sign_up(year, customer, this)
        gift = UNIT * year.draw.randrange(50_000, 300_000)
        lot = f"trial-{customer}"
        _at(year, joined + 60, customer, lambda c=customer, g=gift, lot=lot, j=joined: _must(
            year.ledger.grant(c, g, lot=lot, expires=j + 14 * DAY_S)))  # fmt: skip
        _at(year, joined + 3600, customer, lambda c=customer, g=gift: _request(year, c, g // 8 // UNIT * UNIT))


def _new(year: Year, kind: str) -> str:
    year.count += 1
    customer = f"{kind}-{year.count:05d}"
    if year.draw.random() < 0.45:
        year.overseas.add(customer)
    return customer


def _sign_up(year: Year, customer: str, this: Month) -> float:
    """When: the first second of a day."""
    day = this.starts + DAY_S * year.draw.randrange((this.ends - this.starts) // DAY_S - 1)
    year.signups[day].append((customer, OVERSEAS if customer in year.overseas else HOME))
    return float(day)


def _at(year: Year, when: float, customer: str, what: Callable[[], None]) -> None:
    year.events[int(when) // DAY_S * DAY_S].append((when, customer, what))


# ---- what happens --------------------------------------------------------------------------------------------------


def _post_day(year: Year, start: int, payers: int) -> None:
    ledger = year.ledger
    ledger.now = float(start)
    ledger.expire_pockets()
    joined = year.signups.pop(start, [])
    with ledger.books([customer for customer, _ in joined]) as books:
        for customer, _ in joined:
            books.create(customer)
    events = sorted(year.events.pop(start, []), key=lambda event: event[:2])
    with ledger.day([customer for _, customer, _ in events]) as books:
        write(books.execute, Facts(dict(joined)))
        for when, _, happen in events:
            ledger.now = when
            happen()
        hour = start + 12 * HOUR_S
        refused = {(hour, "tide-large", cause): payers * year.draw.randrange(1, 9) // 10 + 1 for cause in CAUSES}
        add(books.execute, refused, year.compute)
    year.compute.clear()


def _request(year: Year, customer: str, nano_usd: int) -> None:
    """One that costs exactly `nano_usd`, a multiple of UNIT: some output, some cached input, the rest fresh."""
    draw, ledger = year.draw, year.ledger
    model = draw.choice(list(PRICES))
    price = PRICES[model]
    output = int(nano_usd * draw.uniform(0.2, 0.5)) // price.output_nano
    cached = int(nano_usd * draw.uniform(0, 0.3)) // price.cached_input_nano
    left = nano_usd - output * price.output_nano - cached * price.cached_input_nano
    fresh = left // price.input_nano
    cached += left % price.input_nano // price.cached_input_nano
    year.count += 1
    hold = ledger.hold(
        customer, f"key-{customer}", f"req-{year.count}", model=model, price=price, price_version=VERSION,
        prompt_tokens=fresh + cached, max_tokens=max(1, output), lifetime_s=600,
    )  # fmt: skip
    ledger.now += 2
    charged = ledger.settle(hold, cached_tokens=cached, completion_tokens=output, finish_reason="stop")
    if charged != nano_usd:
        raise AssertionError(f"a request of {customer} was to cost {nano_usd} nano-USD and cost {charged}")
    year.compute[int(ledger.now) // HOUR_S * HOUR_S, model] += fresh // 20 + 8 * output


def _top_up(year: Year, customer: str, wanted: int) -> None:
    """Unless there is enough from before."""
    with year.ledger.books([customer]) as books:
        have = books.balance(customer, ("cash", ""))
    if have < wanted:
        year.count += 1
        _must(year.ledger.topup(customer, wanted - have // USD * USD, f"pay-{year.count}"))


def _refund(year: Year, customer: str) -> None:
    with year.ledger.books([customer]) as books:
        have = books.balance(customer, ("cash", ""))
    if have:
        year.count += 1
        _must(year.ledger.refund(customer, have, f"back-{year.count}"))


def _must(booked: bool) -> None:
    if not booked:
        raise AssertionError("the ledger says that this was booked before")
