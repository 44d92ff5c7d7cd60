"""Laws of the plans: never more seats than there are, never a cent that was not there, credits that last one period."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import httpx2 as httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidelock.service.books import Admission, InsufficientBalance, Metered
from tidelock.service.db import Database
from tidelock.service.ledger import Ledger
from tidelock.service.plans import Plan, Plans, SoldOut, prorated
from tidelock.service.prices import Counts, Price
from tidelock.service.windows import FIVE_HOURS, WEEK, anniversary, period
from tidelock.tokens.errors import UserError

PRICE = Price(1, 0, 1)
DAY = 86400.0


def moment(text: str) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


class Shop:
    def __init__(self, target: str, start: str = "2026-01-31T15:00") -> None:
        self.now, self.n = moment(start), 0
        self.db = Database(target)
        self.ledger = Ledger(self.db, clock=lambda: self.now)
        self.plans = Plans(self.ledger)
        self.plans.define(Plan("small", 1000, 6000, 300, 900, 2))
        self.plans.define(Plan("large", 5000, 50_000, None, 20_000, 1))
        for customer in ("ann", "bob", "cy"):
            self.ledger.open_account(customer)

    def hold(self, nano: int, customer: str = "ann"):
        self.n += 1
        with self.ledger.books([customer]) as books:
            return books.hold(Admission(f"r{self.n}", customer, "k", "m", PRICE, "v", nano - 1, 1, 9 * DAY))

    def settle(self, hold, used: int) -> None:
        with self.ledger.books([hold.customer], [hold.request_id]) as books:
            prompt = min(used, hold.prompt_tokens)
            books.settle(hold.request_id, PRICE, Metered(Counts(prompt, completion=used - prompt), "stop"))

    def spend(self, nano: int, customer: str = "ann") -> None:
        self.settle(self.hold(nano, customer), nano)

    def balances(self, customer: str = "ann") -> dict[str, int]:
        found = self.ledger.balances(customer)
        return {kind: found.get(kind, 0) for kind in ("cash", "voucher", "plan", "extra", "fees", "breakage")}

    def sold(self) -> dict[str, int]:
        return {plan["name"]: plan["sold"] for plan in self.plans.plans()}


@pytest.fixture
def shop(target):
    shop = Shop(target)
    shop.ledger.topup("ann", 20_000)
    yield shop
    assert shop.ledger.audit().sound
    shop.db.close()


# ---- time --------------------------------------------------------------------------------------------------------


def test_the_31st_is_the_last_day_of_shorter_months_and_comes_back():
    anchor = moment("2027-12-31T15:00:01")
    days = [datetime.fromtimestamp(anniversary(anchor, n), UTC) for n in range(5)]
    assert [(d.month, d.day) for d in days] == [(12, 31), (1, 31), (2, 29), (3, 31), (4, 30)]
    assert all((d.hour, d.second) == (15, 1) for d in days)


@given(anchor=st.integers(0, 2 * 10**9), after=st.integers(0, 10**9))
def test_every_moment_is_in_exactly_one_period(anchor, after):
    n = period(anchor, anchor + after)
    assert n >= 0 and anniversary(anchor, n) <= anchor + after < anniversary(anchor, n + 1)


# ---- credits -----------------------------------------------------------------------------------------------------


def test_credits_reset_at_the_anniversary_instant_and_do_not_roll_over(shop):
    shop.plans.subscribe("ann", "small")
    assert shop.balances() | {"voucher": 0} == shop.balances() and shop.balances()["cash"] == 19_000
    shop.spend(200)
    shop.now = moment("2026-02-28T14:59:59")
    assert shop.plans.turn() == 0 and shop.balances()["plan"] == 5800
    shop.now += 1
    assert shop.ledger.balance("ann") == 19_000  # nobody has looked yet, and they are over all the same
    assert shop.plans.turn() == 1 and shop.plans.turn() == 0
    left = shop.balances()
    assert (left["plan"], left["cash"], left["fees"], left["breakage"]) == (6000, 18_000, 2000, 5800)
    assert shop.plans.subscription("ann").ends == moment("2026-03-31T15:00")


def test_a_running_request_finishes_over_the_anniversary_and_what_it_brings_back_is_over(shop):
    shop.plans.subscribe("ann", "small")
    hold = shop.hold(250)
    shop.now = moment("2026-02-28T15:00")
    shop.plans.turn()
    shop.settle(hold, 100)
    assert shop.ledger.balance("ann") == 6000 + 18_000
    shop.now += 1
    shop.ledger.expire_pockets()
    assert shop.balances()["breakage"] == 5750 + 150


def test_a_period_nobody_looked_at_is_not_charged(shop):
    shop.plans.subscribe("ann", "small")
    shop.now = moment("2026-07-05T00:00")
    shop.plans.turn()
    assert shop.balances()["fees"] == 2000 and shop.plans.subscription("ann").begins == moment("2026-06-30T15:00")


def test_bonus_then_plan_then_extra_then_cash(shop):
    shop.ledger.grant("ann", 50, lot="bonus")
    shop.ledger.topup("ann", 100, "x", pocket="extra")
    shop.plans.subscribe("ann", "small")
    for spent, expected in ((60, (0, 5990, 100)), (290, (0, 5700, 100)), (40, (0, 5700, 60)), (80, (0, 5700, 0))):
        shop.spend(spent)  # the five-hour window closes at 300 of plan credits
        left = shop.balances()
        assert (left["voucher"], left["plan"], left["extra"]) == expected
    assert shop.balances()["cash"] == 19_000 - 20


def test_windows_close_and_open_when_they_should(shop):
    shop.plans.subscribe("ann", "small")
    begun = shop.now
    shop.ledger.refund("ann", 19_000, "out")
    for _ in range(3):
        shop.spend(300)
        with pytest.raises(InsufficientBalance):
            shop.hold(1 + 1)
        shop.now += FIVE_HOURS - 1
        with pytest.raises(InsufficientBalance):
            shop.hold(1 + 1)
        shop.now += 1
    with pytest.raises(InsufficientBalance):
        shop.hold(1 + 1)  # 900 this week
    shop.now = begun + WEEK - 1
    with pytest.raises(InsufficientBalance):
        shop.hold(1 + 1)
    shop.now += 1
    shop.spend(300)


def test_a_window_gets_back_what_a_request_did_not_use_and_only_its_own(shop):
    shop.plans.subscribe("ann", "small")
    shop.ledger.refund("ann", 19_000, "out")
    hold = shop.hold(300)
    shop.settle(hold, 100)
    hold = shop.hold(200)
    with pytest.raises(InsufficientBalance):
        shop.hold(2)
    shop.now += FIVE_HOURS
    shop.spend(250)
    shop.settle(hold, 0)  # began in the window before
    with pytest.raises(InsufficientBalance):
        shop.hold(51)
    shop.spend(50)


def test_the_extra_wallet_has_a_monthly_cap(shop):
    shop.ledger.topup("ann", 1000, "x", pocket="extra")
    shop.plans.cap_extra("ann", 100)
    shop.spend(150)
    assert (shop.balances()["extra"], shop.balances()["cash"]) == (900, 19_950)
    shop.plans.cap_extra("ann", 120)
    shop.spend(50)
    assert (shop.balances()["extra"], shop.balances()["cash"]) == (880, 19_920)
    shop.now = moment("2026-02-01T00:00")
    shop.spend(120)
    assert shop.balances()["extra"] == 760
    shop.plans.cap_extra("ann", None)
    shop.spend(500)
    assert (shop.balances()["extra"], shop.balances()["cash"]) == (260, 19_920)


# ---- buying and changing -----------------------------------------------------------------------------------------


def test_an_upgrade_is_prorated_and_brings_a_fresh_allocation_at_once(shop):
    shop.plans.subscribe("ann", "small")
    shop.spend(300)
    half = (anniversary(shop.now, 1) - shop.now) / 2
    shop.now += half
    shop.plans.change("ann", "large")
    left = shop.balances()
    assert (left["cash"], left["fees"]) == (19_000 - 4500, 1000 + 4500)  # 5000 less half of 1000
    assert (left["plan"], left["breakage"]) == (50_000, 5700)
    shop.spend(20_000)  # no five-hour window here, a wider week
    assert shop.balances()["plan"] == 30_000 and shop.sold() == {"small": 0, "large": 1}
    assert shop.plans.subscription("ann").ends == anniversary(shop.now, 1)


def test_an_upgrade_takes_off_no_more_than_the_credits_that_are_left(shop):
    shop.plans.define(Plan("small", 1000, 6000, None, None, 2))
    shop.plans.subscribe("ann", "small")
    shop.spend(4500)
    shop.plans.change("ann", "large")
    assert shop.balances()["fees"] == 1000 + 5000 - 250 and shop.balances()["plan"] == 50_000


def test_an_upgrade_in_the_last_hour_is_no_month_for_an_hour_s_price(shop):
    shop.plans.subscribe("ann", "small")
    shop.now = moment("2026-02-28T14:00")
    shop.plans.change("ann", "large")
    assert shop.balances()["fees"] >= 1000 + 4990
    shop.now = moment("2026-02-28T15:00")
    assert shop.plans.turn() == 0 and shop.balances()["plan"] == 50_000


def test_a_downgrade_waits_for_the_period_s_end_with_its_seat_taken(shop):
    shop.plans.subscribe("ann", "large")
    shop.plans.change("ann", "small")
    assert shop.plans.subscription("ann").plan == "large" and shop.sold() == {"small": 1, "large": 1}
    shop.now = moment("2026-02-28T15:00")
    shop.plans.turn()
    assert shop.plans.subscription("ann").plan == "small" and shop.sold() == {"small": 1, "large": 0}
    assert shop.balances()["plan"] == 6000 and shop.balances()["fees"] == 6000
    shop.plans.change("ann", "small")
    assert shop.sold() == {"small": 1, "large": 0}


def test_a_planned_change_can_be_taken_back_and_cancelling_ends_with_the_period(shop):
    shop.plans.subscribe("ann", "large")
    shop.plans.change("ann", "small")
    shop.plans.change("ann", "large")
    assert shop.sold() == {"small": 0, "large": 1}
    shop.plans.change("ann", "small")
    shop.plans.cancel("ann")
    assert shop.sold() == {"small": 0, "large": 1}
    shop.now = moment("2026-02-28T15:00")
    shop.plans.turn()
    assert shop.plans.subscription("ann") is None and shop.sold() == {"small": 0, "large": 0}
    assert shop.balances()["fees"] == 5000 and shop.balances()["plan"] == 0


def test_who_cannot_pay_the_next_period_lapses_and_frees_the_seat(shop):
    shop.ledger.topup("bob", 5000)
    shop.plans.subscribe("bob", "large")
    shop.now = moment("2026-02-28T15:00")
    shop.plans.turn()
    assert shop.plans.subscription("bob") is None and shop.sold()["large"] == 0


def test_without_the_price_in_cash_nothing_is_sold(shop):
    with pytest.raises(UserError, match="cash"):
        shop.plans.subscribe("bob", "small")
    assert shop.sold()["small"] == 0 and shop.plans.subscription("bob") is None
    with pytest.raises(UserError, match="seats"):
        shop.plans.define(Plan("odd", 1, 0, None, None, 1))


def test_a_full_plan_has_a_waiting_list_and_nobody_jumps_it(shop):
    shop.ledger.topup("bob", 50_000), shop.ledger.topup("cy", 50_000)
    shop.plans.subscribe("ann", "large")
    with pytest.raises(SoldOut):
        shop.plans.subscribe("bob", "large")
    assert shop.plans.wait("bob", "large") == 1 and shop.plans.wait("bob", "large") == 1
    shop.plans.cancel("ann")
    shop.now = moment("2026-02-28T15:00")
    with shop.ledger.books(["ann"]):
        pass
    assert shop.plans._turn("ann", shop.now)
    with pytest.raises(SoldOut):
        shop.plans.subscribe("cy", "large")  # the seat is free, and bob's
    shop.plans.turn()
    assert shop.plans.subscription("bob").plan == "large" and shop.plans.waiting("large") == []
    with pytest.raises(UserError, match="seats for all"):
        shop.plans.define(Plan("large", 5000, 50_000, None, 20_000, 0))


def test_prorating_rounds_for_the_customer_and_never_charges_more_than_the_month():
    assert [prorated(100, 0, 3, at) for at in (0, 1, 2, 3, 4, -1)] == [100, 66, 33, 0, 0, 100]


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["topup", "subscribe", "change", "cancel", "wait", "hold", "settle", "hours", "days", "turn"]),
        st.sampled_from(["ann", "bob", "cy"]), st.sampled_from(["small", "large"]), st.integers(1, 2000),
    ),
    max_size=40,
)  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(steps=STEPS)
def test_whatever_happens_the_sums_hold(steps):
    shop = Shop(":memory:")
    holds, paid = [], dict.fromkeys(("ann", "bob", "cy"), 0)
    for what, who, plan, n in steps:
        try:
            if what == "topup":
                shop.ledger.topup(who, n * 3)
                paid[who] += n * 3
            elif what == "hold":
                holds.append(shop.hold(n, who))
            elif what == "settle":
                hold = holds.pop(n % len(holds)) if holds else shop.hold(n + 1, who)
                shop.settle(hold, min(n, hold.nano_usd))
            elif what in ("hours", "days"):
                shop.now += (n % 30) * (3600 if what == "hours" else DAY)
            elif what == "turn":
                shop.plans.turn()
            elif what == "cancel":
                shop.plans.cancel(who)
            else:
                getattr(shop.plans, what)(who, plan)
        except (UserError, InsufficientBalance):
            pass
        active = shop.db.read("SELECT plan, next_plan FROM subscriptions WHERE state = 'active'")
        for name, sold in shop.sold().items():
            seats = {"small": 2, "large": 1}[name]
            assert sold == sum((p == name) + (q == name) for p, q in active) <= seats
        for used, span in shop.db.read("SELECT used_nano, span FROM allowances"):
            assert used <= {"5h": 300, "7d": 20_000}[span]
    assert shop.ledger.audit().sound
    for who in paid:
        left = {kind: shop.ledger.balances(who).get(kind, 0) for kind in ("cash", "fees", "breakage", "contra")}
        plan = sum(row[0] for row in shop.db.read("SELECT balance_nano FROM accounts WHERE customer = ? AND kind = 'plan'", (who,)))
        held = {"cash": 0, "plan": 0}
        for row in shop.db.read("SELECT parts FROM holds WHERE customer = ? AND state = 'open'", (who,)):
            for kind, _, nano in json.loads(row[0]):
                held[kind] += nano
        sums = "SELECT COALESCE(SUM(nano_usd - credit_nano), 0), COALESCE(SUM(credit_nano), 0) FROM usage WHERE customer = ?"
        spent, credited = shop.db.read(sums, (who,))[0]
        assert left["cash"] + left["fees"] + held["cash"] + spent == paid[who]
        assert plan + held["plan"] + credited + left["breakage"] == -left["contra"]
    shop.db.close()


# ---- what the customer sees --------------------------------------------------------------------------------------


def test_usages_shows_the_plan_s_windows_and_the_wallet_in_kimi_s_shape(service):
    secret = service.key("ann", nano_usd=10**9)
    plans, ledger = service.state.plans, service.state.ledger
    plans.define(Plan("coder", 10**8, 10**9, 10**7, 5 * 10**7, 3))
    plans.subscribe("ann", "coder")
    ledger.topup("ann", 50 * 10**9, "w", pocket="extra")
    plans.cap_extra("ann", 20 * 10**9)
    ask = {"model": "tide", "messages": [{"role": "user", "content": "hi"}]}
    cost = service.client(secret).chat.completions.create(**ask).usage.cost_nano_usd
    url = service.running.base_url + "/usages"
    seen = httpx.get(url, headers={"authorization": f"Bearer {secret}"}).json()
    week, five = seen["usage"], seen["limits"][0]
    assert five["window"] == {"duration": 300, "timeUnit": "TIME_UNIT_MINUTE"}
    assert (week["used"], week["limit"]) == (str(cost), str(5 * 10**7)) and five["detail"]["limit"] == str(10**7)
    assert five["detail"]["remaining"] == str(10**7 - cost)
    reset = datetime.fromisoformat(five["detail"]["resetTime"]).timestamp() - ledger.clock()
    assert FIVE_HOURS - 60 < reset <= FIVE_HOURS
    wallet = seen["boosterWallet"]
    assert wallet["balance"] == {"type": "BOOSTER", "amount": "5000000000", "amountLeft": "5000000000"}
    assert wallet["monthlyChargeLimitEnabled"] and wallet["monthlyChargeLimit"] == {"priceInCents": "2000", "currency": "USD"}
