"""Plans of a year and plans of several seats: what is paid at once is earned and spent month by month, seat by seat."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidelock.cli.main import main
from tidelock.service.analytics.calendar import month
from tidelock.service.analytics.figures import figures, months_until
from tidelock.service.analytics.replay import replayed
from tidelock.service.db import Database
from tidelock.service.ledger import Ledger
from tidelock.service.plans import Plan, Plans, SoldOut
from tidelock.tokens.errors import UserError

DAY = 86400.0


class Shop:
    def __init__(self, target: str) -> None:
        self.now = month("2026-01").starts + 30 * DAY + 3600  # the 31st
        self.db = Database(target)
        self.ledger = Ledger(self.db, clock=lambda: self.now)
        self.plans = Plans(self.ledger)
        self.plans.define(Plan("small", 1000, 6000, None, None, 9))
        self.plans.define(Plan("year", 10_000, 6000, 500, None, 3, months=12, most=2))
        self.plans.define(Plan("team", 1500, 7000, None, 900, 6, least=2, most=5))
        for customer in ("ann", "bob", "cy"):
            self.ledger.open_account(customer)
            self.ledger.topup(customer, 100_000)

    def balance(self, kind: str, customer: str = "ann") -> int:
        return self.ledger.balances(customer).get(kind, 0)

    def sold(self, plan: str) -> int:
        return next(p["sold"] for p in self.plans.plans() if p["name"] == plan)

    def until(self, day: float) -> None:
        """Upkeep, every day."""
        while self.now < day:
            self.now += DAY
            self.plans.turn()
            self.ledger.expire_pockets()


@pytest.fixture
def shop(target):
    shop = Shop(target)
    yield shop
    shop.db.close()


def test_a_year_is_paid_once_and_its_credits_come_month_by_month(shop):
    sub = shop.plans.subscribe("ann", "year")
    begun = shop.now
    fees, granted = [], []
    for n in range(1, 14):
        fees.append(shop.balance("fees"))
        granted.append(shop.balance("plan"))
        shop.until(sub.month_ends if n == 1 else month(f"202{6 + n // 12}-{n % 12 + 1:02d}").starts + 31 * DAY)
    assert fees[:12] == [10_000] * 12 and granted == [6000] * 13 and shop.balance("fees") == 20_000
    now = shop.plans.subscription("ann")
    assert (now.begins, now.months, now.term) == (sub.ends, 12, 12) and sub.begins == begun
    assert shop.plans.allowances("ann")["plan", "5h"].limit_nano == 500 and shop.ledger.audit().sound
    with shop.db.snapshot() as read:
        found = figures(read, months_until(read, "2026-12"), "2026-01")
        assert {name: values for name, values in found.items() if values} == replayed(read, "2026-12", "2026-01")
    assert {n for (m, part), n in found["mrr"].items() if part == "end"} == {10_000 // 12}
    assert sum(found["plans.recognised"].values()) + found["plans.deferred"]["2026-12", ""] == 10_000
    assert all(760 <= n <= 860 for (m, _), n in found["plans.recognised"].items() if m > "2026-01")  # a twelfth, by the day
    assert found["capacity.sold"]["2026-06", "year"] == 6000


def test_months_nobody_looked_at_bring_no_credits_and_the_year_ends_when_it_ends(shop):
    sub = shop.plans.subscribe("ann", "year")
    shop.plans.cancel("ann")
    shop.now += 200 * DAY
    assert shop.plans.turn() == 1 and shop.plans.turn() == 0 and shop.balance("plan") == 6000
    assert shop.plans.subscription("ann").grants == 2 and shop.balance("breakage") == 6000
    shop.until(sub.ends - DAY)
    assert shop.plans.subscription("ann") is not None and shop.sold("year") == 1
    shop.until(sub.ends + DAY)
    assert shop.plans.subscription("ann") is None and shop.sold("year") == 0 and shop.balance("fees") == 10_000


def test_a_year_is_changed_up_at_once_for_what_is_left_of_it_and_down_at_its_end(shop):
    sub = shop.plans.subscribe("ann", "year")
    shop.until(shop.now + 100 * DAY)
    shop.plans.change("ann", "small")  # 1000 a month is more than 10000 a year
    now = shop.plans.subscription("ann")
    assert (now.plan, now.months, now.quantity) == ("small", 1, 1)
    left = 10_000 * (365 - 100) // 365
    assert shop.balance("fees") == 10_000 + 1000 - left and shop.balance("plan") == 6000
    shop.plans.change("ann", "year")
    assert shop.plans.subscription("ann").plan == "small" and shop.plans.subscription("ann").next_plan == "year"
    shop.until(now.ends + DAY)
    assert shop.plans.subscription("ann").months == 12 and sub.ends < shop.plans.subscription("ann").ends
    assert shop.sold("small") == 0 and shop.sold("year") == 1
    with shop.db.snapshot() as read:
        found = figures(read, months_until(read, "2027-12"), "2026-01")
        assert {name: values for name, values in found.items() if values} == replayed(read, "2027-12", "2026-01")
    assert sum(found["plans.recognised"].values()) == sum(found["plans.fees"].values()) == shop.balance("fees")


def test_two_changes_in_one_second_credit_each_term_once(shop):
    shop.plans.subscribe("ann", "year")
    shop.plans.change("ann", "small")
    shop.plans.change("ann", "team")
    terms = [tuple(row) for row in shop.db.read("SELECT plan, price_nano, credited_nano FROM plan_terms ORDER BY reference")]
    assert terms == [("year", 10_000, 10_000), ("small", 1000, 1000), ("team", 3000, 0)]
    with shop.db.snapshot() as read:
        found = figures(read, months_until(read, "2026-12"), "2026-01")
        assert {name: values for name, values in found.items() if values} == replayed(read, "2026-12", "2026-01")
    assert sum(found["plans.recognised"].values()) == shop.balance("fees") == 3000


def test_seats_are_paid_credited_and_counted_one_by_one(shop):
    with pytest.raises(UserError, match="2 to 5 seats, not 1"):
        shop.plans.subscribe("ann", "team", quantity=1)
    shop.plans.subscribe("ann", "team", quantity=3)
    assert (shop.balance("fees"), shop.balance("plan"), shop.sold("team")) == (4500, 21_000, 3)
    assert shop.plans.allowances("ann")["plan", "7d"].limit_nano == 2700
    with pytest.raises(SoldOut):
        shop.plans.subscribe("bob", "team", quantity=4)
    shop.plans.subscribe("bob", "team")
    assert shop.sold("team") == 5 and shop.balance("plan", "bob") == 14_000
    shop.now += 1
    shop.plans.change("ann", "team", quantity=4)  # at once, for what is left of the three
    assert shop.sold("team") == 6 and shop.balance("plan") == 28_000 and 6000 <= shop.balance("fees") <= 6002
    with pytest.raises(SoldOut):
        shop.plans.change("ann", "team", quantity=5)
    with pytest.raises(SoldOut):
        shop.plans.change("ann", "team", quantity=2)  # with the next term, and its seats must be free now
    assert shop.plans.subscription("ann").quantity == 4


def test_fewer_seats_take_their_place_at_once_and_count_from_the_next_term(shop):
    sub = shop.plans.subscribe("ann", "team", quantity=3)
    shop.plans.change("ann", "team", quantity=2)
    assert shop.sold("team") == 5 and shop.plans.subscription("ann").quantity == 3
    shop.plans.change("ann", "team", quantity=3)
    assert shop.sold("team") == 3
    shop.plans.change("ann", "team", quantity=2)
    shop.until(sub.ends + DAY)
    assert (shop.sold("team"), shop.plans.subscription("ann").quantity, shop.balance("plan")) == (2, 2, 14_000)


STEPS = st.lists(
    st.tuples(st.sampled_from(["subscribe", "change", "cancel", "month", "days", "hold", "turn"]), st.sampled_from(["ann", "bob", "cy"]),
              st.sampled_from(["small", "year", "team"]), st.integers(0, 5)), max_size=30,
)  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(STEPS)
def test_never_more_seats_than_there_are_and_every_fee_is_earned_in_the_end(steps):
    shop = Shop(":memory:")
    for what, who, plan, n in steps:
        try:
            if what in ("subscribe", "change"):
                getattr(shop.plans, what)(who, plan, quantity=n or None)
            elif what == "cancel":
                shop.plans.cancel(who)
            elif what in ("month", "days"):
                shop.now += (31 if what == "month" else n) * DAY + 7
            elif what == "turn":
                shop.plans.turn()
        except UserError:
            pass
        rows = shop.db.read("SELECT plan, quantity, next_plan, next_quantity FROM subscriptions WHERE state = 'active'")
        for name, seats in (("small", 9), ("year", 3), ("team", 6)):
            assert shop.sold(name) == sum(q * (p == name) + nq * (np == name) for p, q, np, nq in rows) <= seats
    assert shop.ledger.audit().sound
    with shop.db.snapshot() as read:
        found = figures(read, months_until(read, "2031-12"), "2026-01")
        assert {name: values for name, values in found.items() if values} == replayed(read, "2031-12", "2026-01")
        billed = {name: sum(v for (m, _), v in found["plans.fees"].items() if m <= name) for name in ("2026-02", "2026-06", "2031-12")}
        for name, nano in billed.items():
            earned = sum(v for (m, _), v in found["plans.recognised"].items() if m <= name)
            assert nano == earned + found["plans.deferred"].get((name, ""), 0)
    shop.db.close()


def test_the_command_line_sells_years_and_seats(tmp_path, capsys):
    where = ["--dir", str(tmp_path)]
    Database(tmp_path / "service.sqlite").close()
    assert main(["admin", "plans", "define", "team", "--usd", "30", "--credits", "20", "--seats", "9", "--months", "12", "--least", "2",
                 "--most", "5", *where]) == 0  # fmt: skip
    ledger = Ledger(Database(tmp_path / "service.sqlite"))
    ledger.open_account("ann")
    ledger.topup("ann", 10**12)
    assert main(["admin", "plans", "subscribe", "ann", "team", "--quantity", "3", *where]) == 0
    assert main(["admin", "plans", "change", "ann", "team", "--quantity", "5", *where]) == 0
    shown = capsys.readouterr().out
    assert "a year" in shown and "5 seats" in shown and ledger.balances("ann")["fees"] > 149 * 10**9
    ledger.db.close()
