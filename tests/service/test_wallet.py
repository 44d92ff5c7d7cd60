"""What a customer has and may buy: shown as the ledger has it, previewed as it will be charged."""

from __future__ import annotations

import httpx2 as httpx
import pytest

from tidelock.service.accounts import SCOPES
from tidelock.service.gauges import gauges
from tidelock.service.ladder import KIMI, Limits
from tidelock.service.ledger import Ledger
from tidelock.service.plans import Plan, Plans

USD = 10**9


def call(service, method, path, secret, status=200, **options):
    answer = httpx.request(
        method, service.running.base_url + path, headers={"authorization": f"Bearer {secret}"}, **options
    )
    assert answer.status_code == status, answer.text
    return answer


def test_the_balance_is_the_ledger_s_by_pocket_and_lot(service):
    secret = service.key("ann", nano_usd=5 * USD)
    ledger = service.state.ledger
    ledger.grant("ann", 3 * USD, lot="spring")
    ledger.grant("ann", 2 * USD, lot="over", expires=1.0)
    ledger.topup("ann", 7 * USD, pocket="extra")
    b = call(service, "GET", "/organization/balance", secret).json()
    assert (b["cash_nano_usd"], b["voucher_nano_usd"], b["extra_nano_usd"], b["plan_nano_usd"]) == (
        5 * USD,
        3 * USD,
        7 * USD,
        0,
    )
    assert b["available_nano_usd"] == ledger.balance("ann") and b["lots"] == [
        {"kind": "voucher", "lot": "spring", "nano_usd": 3 * USD, "expires_at": None}]  # fmt: skip
    assert call(service, "GET", "/organization", secret).json()["id"] == "ann"


def test_who_asks_is_told_to_every_key_and_bills_only_to_those_that_may(service):
    viewer = service.key("ann", scopes=("usage",))
    me = call(service, "GET", "/organization", viewer).json()
    assert me["api_key"]["scopes"] == ["usage"] and me["operator"] is False
    for path in ("/organization/payments", "/organization/plans"):
        call(service, "GET", path, viewer, 403)


@pytest.fixture
def plans(service):
    for plan in (
        Plan("small", 10 * USD, 20 * USD, 2 * USD, 5 * USD, 5),
        Plan("large", 50 * USD, 90 * USD, None, None, 1),
    ):
        service.state.plans.define(plan)
    return service.state.plans


def test_a_preview_is_what_the_change_then_costs(service, plans):
    owner = service.key("ann", nano_usd=200 * USD, scopes=SCOPES)
    steps = [("small", "subscribe"), ("large", "upgrade"), ("large", "keep"), ("small", "downgrade")]
    for plan, kind in steps:
        said = call(service, "GET", f"/organization/plans/{plan}/preview", owner).json()
        before = service.state.ledger.balances("ann")["cash"]
        sub = call(service, "POST", "/organization/subscription", owner, json={"plan": plan}).json()
        paid = before - service.state.ledger.balances("ann")["cash"]
        assert said["kind"] == kind and abs(paid - said["charge_nano_usd"]) <= 50 * USD // 2_000_000, (
            kind,
            paid,
            said,
        )  # a second's worth
        assert kind in ("subscribe", "keep") or (said["unused_nano_usd"] > 0) == (kind == "upgrade")
    assert sub["plan"] == "large" and sub["next_plan"] == "small" and sub["credits_left_nano_usd"] == 90 * USD
    ended = call(service, "DELETE", "/organization/subscription", owner).json()
    assert ended["next_plan"] is None
    assert service.state.ledger.audit().sound


def test_seats_and_years_are_previewed_bought_and_shown_as_they_are_charged(service, plans):
    plans.define(Plan("team", 60 * USD, 10 * USD, None, 4 * USD, 9, months=12, least=2, most=5))
    owner = service.key("ann", nano_usd=1000 * USD, scopes=SCOPES)
    cash = lambda: service.state.ledger.balances("ann")["cash"]  # noqa: E731
    (team,) = [p for p in call(service, "GET", "/organization/plans", owner).json()["data"] if p["id"] == "team"]
    assert (team["months"], team["least_quantity"], team["most_quantity"], team["price_nano_usd"]) == (12, 2, 5, 60 * USD)
    for wrong in ("6", "1", "0", "-1", "x", "1e3", "9" * 30):
        call(service, "GET", "/organization/plans/team/preview", owner, 400, params={"quantity": wrong})
    for wrong in (0, 6, 1.5, "3", True, 10**30):
        call(service, "POST", "/organization/subscription", owner, 400, json={"plan": "team", "quantity": wrong})
    assert cash() == 1000 * USD
    said = call(service, "GET", "/organization/plans/team/preview", owner, params={"quantity": 3}).json()
    assert (said["kind"], said["charge_nano_usd"], said["quantity"]) == ("subscribe", 180 * USD, 3)
    sub = call(service, "POST", "/organization/subscription", owner, json={"plan": "team", "quantity": 3}).json()
    assert cash() == 820 * USD and abs(sub["current_period_end"] - said["ends_at"]) <= 1
    assert (sub["quantity"], sub["months"], sub["seat_price_nano_usd"], sub["price_nano_usd"]) == (3, 12, 60 * USD, 180 * USD)
    assert sub["credits_nano_usd"] == 30 * USD == sub["credits_left_nano_usd"] == sub["next_credits_nano_usd"]
    assert sub["next_credits_at"] < sub["current_period_end"] and sub["renewal_nano_usd"] == 180 * USD
    said = call(service, "GET", "/organization/plans/team/preview", owner, params={"quantity": 5}).json()
    assert said["kind"] == "upgrade" and said["charge_nano_usd"] + said["unused_nano_usd"] == 300 * USD
    sub = call(service, "POST", "/organization/subscription", owner, json={"plan": "team", "quantity": 5}).json()
    assert abs(820 * USD - cash() - said["charge_nano_usd"]) <= 1000 and sub["quantity"] == 5
    said = call(service, "GET", "/organization/plans/team/preview", owner, params={"quantity": 2}).json()
    assert (said["kind"], said["charge_nano_usd"], said["effective_at"]) == ("downgrade", 0, sub["current_period_end"])
    assert said["ends_at"] - said["effective_at"] in (365 * 86400, 366 * 86400)
    sub = call(service, "POST", "/organization/subscription", owner, json={"plan": "team", "quantity": 2}).json()
    assert (sub["quantity"], sub["next_quantity"], sub["renewal_nano_usd"]) == (5, 2, 120 * USD)
    assert sub["next_credits_nano_usd"] == 50 * USD  # of the year that is paid
    sub = call(service, "DELETE", "/organization/subscription", owner).json()
    assert (sub["next_plan"], sub["next_quantity"], sub["renewal_nano_usd"]) == (None, None, None)
    assert service.state.ledger.audit().sound


def test_a_plan_of_several_seats_is_available_while_the_least_fits(service, plans):
    plans.define(Plan("team", 60 * USD, 10 * USD, None, None, 5, least=2, most=5))
    owner = service.key("ann", nano_usd=1000 * USD, scopes=SCOPES)
    available = []
    for quantity in (3, 4):
        call(service, "POST", "/organization/subscription", owner, json={"plan": "team", "quantity": quantity})
        available.append([p["available"] for p in call(service, "GET", "/organization/plans", owner).json()["data"] if p["id"] == "team"])
    assert available == [[True], [False]]


def test_a_preview_books_nothing_on_either_database(db):
    ledger = Ledger(db)
    plans = Plans(ledger)
    for plan in (Plan("small", 10 * USD, 20 * USD, None, None, 5), Plan("large", 50 * USD, 90 * USD, None, None, 1)):
        plans.define(plan)
    ledger.open_account("ann")
    ledger.topup("ann", 20 * USD)
    plans.subscribe("ann", "small")
    before = db.read("SELECT seq, hash FROM customers")[0]
    preview = plans.preview("ann", "large")
    assert preview.kind == "upgrade" and preview.charge_nano + preview.unused_nano == 50 * USD
    assert tuple(db.read("SELECT seq, hash FROM customers")[0]) == tuple(before)


def test_a_usual_key_reads_plans_and_changes_none(service, plans):
    secret = service.key("ann", nano_usd=100 * USD)
    shown = call(service, "GET", "/organization/plans", secret).json()
    assert [p["id"] for p in shown["data"]] == ["small", "large"] and shown["subscribed"] is None
    call(service, "POST", "/organization/subscription", secret, 403, json={"plan": "small"})
    call(service, "DELETE", "/organization/subscription", secret, 403)
    owner = service.key("ann", nano_usd=0, scopes=SCOPES)
    call(service, "POST", "/organization/subscription", owner, 404, json={"plan": "none"})
    rich = service.key("bob", nano_usd=100 * USD, scopes=SCOPES)
    call(service, "POST", "/organization/subscription", rich, json={"plan": "large"})
    assert not call(service, "GET", "/organization/plans", secret).json()["data"][1]["available"]
    call(service, "POST", "/organization/subscription", owner, 400, json={"plan": "large"})  # sold out


def test_gauges_are_what_the_headers_of_an_answer_say(service):
    service.state.tiers.set_ladder(KIMI)
    secret = service.key("ann", nano_usd=20 * USD)
    key = service.state.keys.list("ann")[0]
    service.state.tiers.set_caps("ann", Limits(requests=7), key.id)
    body = {"model": "tide", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 100}
    headers = call(service, "POST", "/chat/completions", secret, json=body).headers
    limits = call(service, "GET", "/organization/limits", secret).json()
    assert limits["tier"] == 2 and [t["tier"] for t in limits["ladder"]["tiers"]] == list(range(6))
    now = limits["now"][key.id]["requests"]
    assert (
        now["limit"] == 7
        and now["limit"] - now["used"] == int(headers["x-ratelimit-remaining-requests"])
        and 0 < now["reset_ms"] <= 9000
    )
    assert limits["now"][""]["concurrency"] == {"limit": 100, "used": 0, "reset_ms": None}
    drained = gauges(service.state.ledger.db, "ann", {key.id: Limits(requests=7)}, service.state.ledger.clock() + 60)
    assert drained[key.id]["requests"] == {"limit": 7, "used": 0, "reset_ms": 0}


def test_running_requests_are_counted_where_they_run(service):
    secret = service.key("ann", nano_usd=20 * USD)
    service.policy.pause_s = 0.1
    service.state.tiers.set_caps("ann", Limits(concurrency=3))
    stream = service.client(secret).chat.completions.create(
        model="tide", messages=[{"role": "user", "content": "hi"}], stream=True
    )
    next(iter(stream))
    assert call(service, "GET", "/organization/limits", secret).json()["now"][""]["concurrency"]["used"] == 1
    stream.close()
    service.wait(
        lambda: call(service, "GET", "/organization/limits", secret).json()["now"][""]["concurrency"]["used"] == 0
    )
