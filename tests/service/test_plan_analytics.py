"""What plans do to the founder's numbers: the MRR bridge moves as the subscriptions did, and fees leave what is deferred."""

from __future__ import annotations

from fractions import Fraction

from tidelock.service.analytics.calendar import month
from tidelock.service.analytics.figures import figures, months_until
from tidelock.service.analytics.ratios import RATIOS
from tidelock.service.analytics.replay import replayed
from tidelock.service.ladder import Ladder, Limits
from tidelock.service.ledger import Ledger
from tidelock.service.plans import Plan, Plans
from tidelock.service.prices import Price, PriceBook
from tidelock.service.tiers import Tiers

USD, DAY = 10**9, 86400.0


def test_the_bridge_moves_as_subscriptions_do_and_fees_are_no_longer_deferred(db):
    now = [float(month("2026-01").starts)]
    ledger = Ledger(db, clock=lambda: now[0])
    plans = Plans(ledger)
    plans.define(Plan("small", 19 * USD, 5 * USD, None, None, 9))
    plans.define(Plan("large", 99 * USD, 40 * USD, None, None, 9))
    paid_in = {"ann": 400, "bob": 19 + 2, "cyd": 400}
    for customer, usd in paid_in.items():
        ledger.open_account(customer)
        ledger.topup(customer, usd * USD)
    now[0] += 9 * DAY
    for customer, plan in (("ann", "small"), ("bob", "small"), ("cyd", "large")):
        plans.subscribe(customer, plan)
    now[0] = month("2026-02").starts + 3 * DAY
    plans.change("ann", "large")  # up: at once
    plans.change("cyd", "small")  # down: with the next period
    for day in range(4, 80):
        now[0] = month("2026-02").starts + day * DAY + 30
        plans.turn()
        ledger.expire_pockets()
    plans.define(Plan("small", 29 * USD, 5 * USD, None, None, 9))  # what was sold keeps its price
    with db.snapshot() as read:
        found = figures(read, months_until(read, "2026-04"), "2026-01")
        again = replayed(read, "2026-04", "2026-01")
    assert {name: values for name, values in found.items() if values} == again
    mrr = {name: {part: nano // USD for (m, part), nano in found["mrr"].items() if m == name} for name in ("2026-01", "2026-02", "2026-03")}
    assert mrr["2026-01"] == {"new": 19 + 19 + 99, "end": 137}
    assert mrr["2026-02"] == {"start": 137, "expansion": 80, "contraction": 80, "churn": 19, "end": 118}  # bob could not pay
    assert mrr["2026-03"] == {"start": 118, "end": 118}
    assert found["payers.usage_or_plan"]["2026-02", ""] == 3 and found["payers.usage_or_plan"]["2026-03", ""] == 2
    cash = sum(ledger.balances(customer)["cash"] for customer in paid_in)
    assert found["deferred"]["2026-04", ""] == cash == sum(paid_in.values()) * USD - sum(found["plans.fees"].values())
    # every fee that was taken is earned in the end, month by month, and until then it is deferred
    billed = earned = 0
    for name in ("2026-01", "2026-02", "2026-03", "2026-04"):
        billed += sum(nano for (m, _), nano in found["plans.fees"].items() if m == name)
        earned += sum(nano for (m, _), nano in found["plans.recognised"].items() if m == name)
        assert billed - earned == found["plans.deferred"].get((name, ""), 0) >= 0
    assert found["plans.recognised"]["2026-01", "large"] == 99 * USD * 22 // 31  # sold on the tenth for a month
    with db.snapshot() as read:
        later = figures(read, months_until(read, "2026-08"), "2026-01")
    assert sum(later["plans.recognised"].values()) == sum(later["plans.fees"].values())
    assert {key: value for key, value in later["plans.recognised"].items() if key[0] <= "2026-04"} == found["plans.recognised"]


def test_tiers_price_changes_and_capacity_are_told_alike_by_both_paths(db):
    """A hand-made quarter whose answers can be worked out on paper."""
    start = float(month("2026-01").starts)
    now = [start]
    ledger = Ledger(db, clock=lambda: now[0])
    Tiers(db).set_ladder(Ladder("three", ((USD, Limits()), (10 * USD, Limits()), (100 * USD, Limits()))))
    old, new = Price(1000, 1000, 1000), Price(500, 500, 500)
    for version, price, when in (("v1", old, 0.0), ("v2", new, month("2026-02").starts + 5 * DAY)):
        PriceBook(version, {"m": price}, effective=when).register(db)
    for customer in ("ann", "bob", "cyd"):
        ledger.open_account(customer)
    plans = Plans(ledger)
    plans.define(Plan("small", 5 * USD, 4_000_000, None, None, 9))

    def use(day, customer, price, tokens, name):
        now[0] = start + day * DAY
        hold = ledger.hold(customer, "k", name, model="m", price=price, price_version="v1", prompt_tokens=0, max_tokens=10**6, lifetime_s=60)
        ledger.settle(hold, cached_tokens=0, completion_tokens=tokens, finish_reason="stop")

    for day, customer, usd in ((1, "ann", 2), (3, "ann", 8), (11, "ann", 95), (2, "bob", 200), (20, "cyd", 6), (40, "cyd", 6)):
        now[0] = start + day * DAY
        ledger.topup(customer, usd * USD)
    ledger.refund("ann", 20 * USD, "back")
    now[0] = start + 21 * DAY
    plans.subscribe("cyd", "small")
    for day, customer, price, tokens in ((22, "cyd", old, 1000), (23, "ann", old, 2000), (60, "ann", new, 4500), (85, "bob", new, 9000)):
        use(day, customer, price, tokens, f"r{day}")
    with db.snapshot() as read:
        found = figures(read, months_until(read, "2026-03"), "2026-01")
        assert {name: values for name, values in found.items() if values} == replayed(read, "2026-03", "2026-01")
    assert found["tiers.customers"]["2026-01", "tier 2"] == 2 and found["tiers.customers"]["2026-01", "tier 0"] == 1
    assert {part: n for (m, part), n in found["tiers.customers"].items() if m == "2026-02"} == {"tier 1": 2, "tier 2": 1}
    assert {key[1]: n for key, n in found["tiers.reached"].items() if key[0] == "2026-01"} == {"tier 1": 2, "tier 2": 2}
    dwell = found["tiers.dwell_seconds"]
    assert dwell["2026-01", "tier 0"] == 2 * DAY and dwell["2026-01", "tier 1"] == 8 * DAY and dwell["2026-02", "tier 0"] == 40 * DAY
    sides = {what: found[f"price_change.{what}"]["2026-03", "m"] for what in ("tokens_before", "tokens_after", "list_before", "list_after")}
    assert sides == {"tokens_before": 3000, "tokens_after": 13500, "list_before": 3_000_000, "list_after": 6_750_000}
    elasticity = next(ratio for ratio in RATIOS if ratio.name == "price_elasticity").parts(found, "2026-03")
    assert elasticity == {"m": Fraction(10500, 16500) / Fraction(-1, 3)}
    assert found["capacity.sold"]["2026-01", "small"] == 4_000_000 and found["capacity.served"]["2026-01", "small"] == 1_000_000
