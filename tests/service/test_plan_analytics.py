"""What plans do to the founder's numbers: the MRR bridge moves as the subscriptions did, and fees leave what is deferred."""

from __future__ import annotations

from tidelock.service.analytics.calendar import month
from tidelock.service.analytics.figures import figures, months_until
from tidelock.service.analytics.replay import replayed
from tidelock.service.ledger import Ledger
from tidelock.service.plans import Plan, Plans

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
