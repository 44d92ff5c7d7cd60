"""Laws of the founder's numbers: two paths that agree to the nano, parts that sum to their whole, growth as defined."""

from __future__ import annotations

import random
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_ledger import PRICE

from tidelock.service.analytics import facts
from tidelock.service.analytics.calendar import month, month_of, shifted, span
from tidelock.service.analytics.figures import figures, months_until
from tidelock.service.analytics.growth import growth
from tidelock.service.analytics.metrics import METRICS
from tidelock.service.analytics.ratios import RATIOS, total
from tidelock.service.analytics.replay import replayed
from tidelock.service.books import Metered
from tidelock.service.db import Database
from tidelock.service.ledger import InsufficientBalance, Ledger
from tidelock.service.prices import Counts, Price, PriceBook
from tidelock.service.rating import rerate
from tidelock.service.tally import add
from tidelock.tokens.errors import UserError

START, MONTHS = month("2025-11").starts, 4
LAST, BASE = "2026-02", "2025-12"
DEARER = Price(PRICE.input_nano * 2, PRICE.cached_input_nano, PRICE.output_nano * 2)
CHEAPER = Price(PRICE.input_nano // 3, PRICE.cached_input_nano // 3, PRICE.output_nano // 3)
BOOKS = {
    "v1": {"m": PRICE, "n": Price(101, 11, 499)}, "dear": {"m": DEARER, "n": DEARER}, "cheap": {"m": CHEAPER, "n": CHEAPER},
}  # fmt: skip
CUSTOMERS = ("ann", "bob", "cyd")

who = st.sampled_from(CUSTOMERS)
nano = st.integers(1, 3_000_000)
operation = st.one_of(
    st.tuples(st.just("topup"), who, nano, st.sampled_from(("cash", "extra"))),
    st.tuples(st.just("grant"), who, nano, st.sampled_from(("voucher", "plan")), st.integers(1, 60)),
    st.tuples(st.just("refund"), who, nano),
    st.tuples(st.just("hold"), who, st.sampled_from("mn"), st.integers(0, 900), st.integers(1, 900)),
    st.tuples(st.just("extend"), st.integers(0, 3), st.integers(1, 500)),
    st.tuples(st.just("settle"), st.integers(0, 3), st.integers(0, 900), st.integers(0, 900), st.integers(0, 900)),
    st.tuples(st.just("release"), st.integers(0, 3)),
    st.tuples(st.just("rerate"), st.sampled_from(("dear", "cheap", "v1"))),
    st.tuples(st.just("term"), who, st.sampled_from((("small", 19), ("large", 99), ("free", 0))), st.sampled_from((1, 1, 12))),
    st.tuples(st.just("refuse"), st.sampled_from(("balance", "overloaded")), st.integers(1, 9)),
    st.tuples(st.just("compute"), st.sampled_from("mn"), st.integers(0, 10**7)),
)
life = st.lists(st.tuples(st.integers(0, 12 * 86400), operation), min_size=1, max_size=60)


class Play:
    """Drives the real ledger through a list of operations."""

    def __init__(self, db: Database) -> None:
        self.db, self.now, self.count = db, float(START), 0
        self.ledger = Ledger(db, clock=lambda: self.now)
        self.holds: list = []
        for version, prices in BOOKS.items():
            PriceBook(version, prices).register(db)
        rates = {(name, "CNY"): 137_000_000 + 1_000_001 * n for n, name in enumerate(("2025-11", "2025-12", "2026-01"))}
        for customer in CUSTOMERS:
            self.ledger.open_account(customer)
        own = {"bob": ("East", "CNY"), "cyd": ("West", "EUR")}
        facts.store(db, facts.Facts(own, rates, {("m", START): 1_100_001, ("m", START + 40 * 86400.0): 900_000}))

    def run(self, steps: list) -> None:
        for pause, (name, *args) in steps:
            self.now = self.now + pause if pause else month_of(self.now).ends  # 0: to the first instant of the next month
            self.now = min(float(self.now), month(LAST).ends - 0.25)
            self.count += 1
            self.ledger.expire_pockets()
            try:
                getattr(self, name)(*args)
            except (UserError, InsufficientBalance):
                pass

    def topup(self, customer, nano, pocket):
        self.ledger.topup(customer, nano, pocket=pocket)

    def grant(self, customer, nano, kind, days):
        self.ledger.grant(customer, nano, kind=kind, lot=f"lot{self.count}", expires=self.now + days * 86400)

    def refund(self, customer, nano):
        self.ledger.refund(customer, nano, f"back{self.count}")

    def hold(self, customer, model, prompt, most):
        price = BOOKS["v1"][model]
        self.holds.append(self.ledger.hold(
            customer, "k", f"r/{self.count}", model=model, price=price, price_version="v1", prompt_tokens=prompt,
            max_tokens=most, lifetime_s=1e9,
        ))  # fmt: skip

    def extend(self, n, tokens):
        if n < len(self.holds):
            self.ledger.extend(self.holds[n], tokens)

    def settle(self, n, cached, written, completion):
        if n < len(self.holds):
            hold = self.holds.pop(n)
            used = Metered(Counts(hold.prompt_tokens, cached, written, 0, completion), "stop")
            with self.ledger.books([hold.customer], [hold.request_id]) as books:
                books.settle(hold.request_id, hold.price, used)

    def release(self, n):
        if n < len(self.holds):
            self.ledger.release(self.holds.pop(n).request_id)

    def rerate(self, version):
        rerate(self.ledger, START, self.now, version)

    def term(self, customer, plan, months):
        with self.db.transaction() as tx:
            ends = month(shifted(month_of(self.now).name, months)).starts  # at a month's end, where it matters
            row = (f"t{self.count}", customer, plan[0], self.now, ends, months, plan[1] * 10**9)
            tx("INSERT INTO plan_terms VALUES (?, ?, ?, ?, ?, ?, ?)", row)

    def refuse(self, cause, times):
        with self.db.transaction() as tx:
            add(tx, {(int(self.now) // 3600 * 3600, "m", cause): times}, {})

    def compute(self, model, milliseconds):
        with self.db.transaction() as tx:
            add(tx, {}, {(int(self.now) // 3600 * 3600, model): milliseconds})


def both(db: Database) -> tuple[dict, dict]:
    with db.snapshot() as read:
        by_sql = figures(read, months_until(read, LAST), BASE)
        by_replay = replayed(read, LAST, BASE)
    return tuple({name: values for name, values in found.items() if values} for found in (by_sql, by_replay))


def check(db: Database) -> None:
    by_sql, by_replay = both(db)
    assert by_sql == by_replay
    found = {metric.name: by_sql.get(metric.name, {}) for metric in METRICS}
    with db.snapshot() as read:
        names = [m.name for m in months_until(read, LAST)]
        spent, pockets = read("SELECT COALESCE(SUM(nano_usd), 0), COALESCE(SUM(credit_nano), 0) FROM usage")[0]
    for name in names:
        sums = {metric: total(found, (metric, ()), name) for metric in found}
        assert sums["revenue.by_region"] == sums["revenue.by_model"] == sums["cohorts.revenue"] == sums["revenue.usage"]
        assert found["concentration"].get((name, "all"), 0) == sums["revenue.usage"]
        assert sums["cohorts.payers"] == sums["payers.by_region"] == sums["payers.usage"] <= sums["payers.usage_or_plan"]
        assert sums["margin"] == sums["revenue.by_model"] - sums["compute.cost"]
        step = Counter({part: value for (m, part), value in found["mrr"].items() if m == name})
        assert step["start"] + step["new"] + step["reactivation"] + step["expansion"] == (
            step["contraction"] + step["churn"] + step["end"]
        )
        assert step["start"] == found["mrr"].get((shifted(name, -1), "end"), 0)
        base, net, kept = (found["retention.1m"].get((name, part), 0) for part in ("base", "net", "kept"))
        assert kept <= min(base, net) and base == total(found, ("retention.1m", ("base",)), name)
    moved = sum(found["cash"].get((name, "in"), 0) - found["cash"].get((name, "refunded"), 0) for name in names)
    earned = sum(found["revenue.usage"].values())
    assert moved + found["receivable"].get((LAST, ""), 0) == earned + found["deferred"].get((LAST, ""), 0)
    if "rerate" not in {row[0] for row in db.read("SELECT DISTINCT kind FROM transactions")}:
        assert earned == spent - pockets and sum(found["credits.used"].values()) == pockets


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(life)
def test_two_independent_paths_agree_and_parts_sum_to_their_whole(steps):
    db = Database(":memory:")
    try:
        play = Play(db)
        play.run(steps)
        assert play.ledger.audit().sound
        check(db)
    finally:
        db.close()


def test_a_long_life_gives_the_same_on_sqlite_and_postgres(db):
    """The same SQL on both; a seeded life long enough to contain everything."""
    draw = random.Random(7)
    steps = []
    for step in range(400):
        customer, n = draw.choice(CUSTOMERS), draw.randrange(3)
        steps.append((0 if step in (150, 250, 350) else draw.randrange(1, 20_000), draw.choice((
            ("topup", customer, draw.randrange(1, 2_000_000), draw.choice(("cash", "extra"))),
            ("grant", customer, draw.randrange(1, 500_000), draw.choice(("voucher", "plan")), draw.randrange(1, 60)),
            ("refund", customer, draw.randrange(1, 200_000)),
            *[("hold", customer, draw.choice("mn"), draw.randrange(900), draw.randrange(1, 900))] * 4,
            ("extend", n, draw.randrange(1, 500)),
            *[("settle", n, draw.randrange(900), draw.randrange(900), draw.randrange(900))] * 4,
            ("release", n),
            ("term", customer, draw.choice((("small", 19), ("large", 99), ("free", 0))), draw.choice((1, 12))),
            ("refuse", draw.choice(("balance", "overloaded")), draw.randrange(1, 9)),
            ("compute", draw.choice("mn"), draw.randrange(10**7)),
            ("rerate", draw.choice(("dear", "cheap", "v1"))),
        ))))  # fmt: skip
    play = Play(db)
    play.run(steps)
    check(db)
    found, _ = both(db)
    assert set(found) == {metric.name for metric in METRICS} - {"retention.12m"}
