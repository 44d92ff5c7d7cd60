"""A suspended organisation: refused everywhere within a second, nothing of it charged, nothing of it lost, nobody else touched."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import anthropic
import httpx2 as httpx
import openai
import pytest
from test_charges import RULE
from test_files_and_batches import ask, lines, rows
from test_responses_socket import InvalidStatus, ask as ask_socket, socket

from tidelock.service import backup, budget_rules, charges, notices, receipts, suspension
from tidelock.service.accounts import SCOPES, Accounts, UnknownId
from tidelock.service.analytics.figures import figures, months_until
from tidelock.service.analytics.replay import replayed
from tidelock.service.db import Database
from tidelock.service.keys import KeyStore
from tidelock.service.ledger import Ledger
from tidelock.service.logs import AccessLog, Lines
from tidelock.service.plans import Plan, Plans
from tidelock.service.signature import sign
from tidelock.service.surfaces import operator
from tidelock.service.surfaces.routes import ROUTES
from tidelock.tokens.errors import UserError
from tidelock.tokens.message import Message

DAY, USD = 86_400.0, 10**9
NOON = 1_800_100_800.0  # 2027-01-16
ASK = {"model": "tide", "messages": [{"role": "user", "content": "hi"}]}


def within_a_second(condition) -> float:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() < began + 1.0, "it took more than a second"
        time.sleep(0.02)
    return time.monotonic() - began


def status(service, secret: str, path: str = "/models") -> int:
    return httpx.get(service.running.base_url + path, headers={"authorization": f"Bearer {secret}"}).status_code


# ---- the keys --------------------------------------------------------------------------------------------------------


def test_within_a_second_every_key_is_refused_on_the_other_server_and_taken_again_after(pair):
    first, second = pair
    secrets = [first.key("ann"), first.key("ann", scopes=SCOPES), first.key("ann", scopes=("usage",))]
    bob, house = first.key("bob"), first.key("house", role="admin")
    assert all(status(s, secret, "/organization") == 200 for s in pair for secret in (*secrets, bob))

    def told(what: str, **body) -> httpx.Response:
        url = first.running.base_url.removesuffix("/v1") + f"/admin/organizations/ann/{what}"
        return httpx.post(url, headers={"authorization": f"Bearer {house}"}, json=body)

    assert told("suspend", reason="card 7 was stolen").json()["suspended_for"] == "card 7 was stolen"
    assert [status(first, secret, "/organization") for secret in secrets] == [403] * 3  # at once
    within_a_second(lambda: all(status(second, secret, "/organization") == 403 for secret in secrets))
    assert all(status(s, bob, "/organization") == 200 for s in pair)
    assert told("resume").json()["suspended_at"] is None
    assert [status(first, secret, "/organization") for secret in secrets] == [200] * 3
    within_a_second(lambda: all(status(second, secret, "/organization") == 200 for secret in secrets))


def test_no_door_is_left_open_and_each_says_so_in_its_dialect(service):
    secret, boss = service.key("ann", scopes=SCOPES), service.key("ann", role="admin")
    suspension.suspend(service.state.ledger, "ann", "invoice 7 is overdue")
    service.state.keys.forget()
    url = service.running.base_url.removesuffix("/v1")
    doors = [(r.method, r.path, secret) for r in ROUTES]
    doors += [(next(iter(r.methods - {"HEAD"})), r.path, boss) for r in operator.routes(None)]
    for method, path, key in doors:
        path = path.replace("{id}", "x").replace("{model}", "tide").replace("{key}", "x")
        answer = httpx.request(method, url + path, headers={"authorization": f"Bearer {key}"})
        error = answer.json()["error"]
        assert answer.status_code == 403 and error["message"] == "your organization is suspended: invoice 7 is overdue", path
        assert answer.headers["x-should-retry"] == "false"
        if answer.json().get("type") == "error":
            assert error["type"] == "permission_error"
        else:
            assert (error["type"], error["code"]) == ("permission_denied_error", "organization_suspended")
    assert status(service, "sk-" + "x" * 43) == 401  # and a wrong key learns nothing of it


def test_the_official_clients_take_it_for_what_it_is_and_ask_once(service):
    secret = service.key("ann")
    suspension.suspend(service.state.ledger, "ann", "abuse")
    service.state.keys.forget()
    with pytest.raises(openai.PermissionDeniedError) as refused:
        service.client(secret).chat.completions.create(**ASK)
    assert refused.value.code == "organization_suspended"
    claude = anthropic.Anthropic(base_url=service.running.base_url.removesuffix("/v1"), api_key=secret)
    with pytest.raises(anthropic.PermissionDeniedError, match="suspended: abuse"):
        claude.messages.create(**ASK, max_tokens=9)
    metrics = httpx.get(service.running.base_url.removesuffix("/v1") + "/metrics").text
    refusals = [line for line in metrics.splitlines() if line.startswith("tidelock_http_responses_total") and 'status="403"' in line]
    assert [line.split()[-1] for line in refusals] == ["1.0", "1.0"], refusals


def test_a_stream_that_runs_is_finished_and_charged(service):
    secret = service.key("ann")
    service.policy.turns, service.policy.pause_s = [Message("assistant", "word " * 30)], 0.02
    stream = iter(service.client(secret).chat.completions.create(**ASK, stream=True, max_tokens=300))
    next(stream)
    suspension.suspend(service.state.ledger, "ann", "abuse")
    service.state.keys.forget()
    last = list(stream)[-1]
    assert last.choices[0].finish_reason == "stop"
    service.wait(lambda: service.state.ledger.db.read("SELECT 1 FROM usage"))
    assert service.state.ledger.balances("ann").get("held", 0) == 0
    with pytest.raises(openai.PermissionDeniedError):
        service.client(secret).chat.completions.create(**ASK)


def test_neither_a_stored_answer_nor_another_header_gets_round_it_and_a_payment_on_its_way_is_still_booked(service):
    state, secret = service.state, service.key("ann")
    url, again = service.running.base_url + "/chat/completions", {"idempotency-key": "once"}
    ways = [{"authorization": f"Bearer {secret}"}, {"authorization": f"bearer  {secret}"}, {"x-api-key": secret}]
    assert httpx.post(url, json=ASK, headers=ways[0] | again).status_code == 200
    suspension.suspend(state.ledger, "ann", "abuse")
    state.keys.forget()
    for way in ways:
        for more in ({}, again):
            answer = httpx.post(url, json=ASK, headers=way | more)
            assert answer.status_code == 403 and "choices" not in answer.json(), (way, more)
    assert len(service.policy.prompts) == 1
    (state.webhook_secrets).write_text("whsec_of_sixteen_or_more\n")
    intent = {"id": "pi_1", "currency": "usd", "amount_received": 500, "metadata": {"organization": "ann"}}
    body = json.dumps({"id": "evt_1", "type": "payment_intent.succeeded", "data": {"object": intent}}).encode()
    before, hook = state.ledger.balances("ann")["cash"], service.running.base_url.removesuffix("/v1") + "/webhooks/payments"
    for secret, status in (("another secret of sixteen", 400), ("whsec_of_sixteen_or_more", 200), ("whsec_of_sixteen_or_more", 200)):
        signed = {"tidelock-signature": sign(body, secret, int(time.time()))}
        assert httpx.post(hook, content=body, headers=signed).status_code == status
    assert state.ledger.balances("ann")["cash"] == before + 5 * USD


def test_a_socket_that_is_open_asks_for_nothing_more_and_none_is_opened(service):
    secret = service.key("ann")
    with socket(service, secret) as connection:
        assert ask_socket(connection)[-1]["type"] == "response.completed"
        suspension.suspend(service.state.ledger, "ann", "abuse")
        service.state.keys.forget()
        (refused,) = ask_socket(connection)
        assert (refused["status"], refused["error"]["code"]) == (403, "organization_suspended")
    with pytest.raises(InvalidStatus) as denied, socket(service, secret):
        pass
    assert denied.value.response.status_code == 403 and len(service.policy.prompts) == 1


def test_a_live_stream_of_receipts_ends(service, monkeypatch):
    from tidelock.service.surfaces import receipts as live

    monkeypatch.setattr(live, "POLL_S", 0.02)
    secret, ended = service.key("ann"), threading.Event()

    def watch() -> None:
        url = service.running.base_url + "/organization/receipts/stream"
        with httpx.stream("GET", url, headers={"authorization": f"Bearer {secret}"}) as answer:
            if "event: gone" in "".join(answer.iter_text()):
                ended.set()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    service.wait(lambda: live._streams["ann"])
    suspension.suspend(service.state.ledger, "ann", "abuse")
    assert ended.wait(3)
    thread.join(3)


def test_a_revoked_key_of_a_suspended_organisation_is_wrong_and_a_key_made_meanwhile_is_refused(service):
    state = service.state
    secret = service.key("ann")
    suspension.suspend(state.ledger, "ann", "abuse")
    fresh = state.keys.create("ann")[1]
    assert status(service, fresh) == 403
    state.keys.revoke(state.keys.list("ann")[0].id)
    assert status(service, secret) == 401


# ---- batches ---------------------------------------------------------------------------------------------------------


def test_a_batch_stops_between_two_lines_and_goes_on_afterwards_each_line_charged_once(service):
    state = service.state
    client, log = service.client(), io.StringIO()
    state.access_log = AccessLog(Lines(as_json=True), log, 0)
    service.policy.pause_s = 0.02
    file = client.files.create(file=("in.jsonl", lines(*(ask(f"{n}") for n in range(60)))), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    service.wait(lambda: client.batches.retrieve(batch.id).request_counts.completed > 0)
    suspension.suspend(state.ledger, "ann", "abuse")
    service.wait(lambda: state.ledger.db.read("SELECT 1 FROM batch_queue WHERE lease_us = 0"))  # given back
    asked = len(service.policy.prompts)
    told = [json.loads(line) for line in log.getvalue().splitlines()]
    waits = [line for line in told if line.get("error") == "organization_suspended"]
    assert waits and all((line["status"], line["route"], line["customer"]) == (403, "batch", "ann") for line in waits)
    assert all(line["status"] for line in told)
    time.sleep(0.3)
    assert len(service.policy.prompts) == asked < 60
    assert state.objects.get("batch", "ann", batch.id)["status"] == "in_progress"
    bob = service.client(service.key("bob"))  # whose batch overtakes it
    file = bob.files.create(file=("in.jsonl", lines(ask("bob's"))), purpose="batch")
    his = bob.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    service.wait(lambda: bob.batches.retrieve(his.id).status == "completed")
    suspension.resume(state.ledger, "ann")
    state.keys.forget()
    state.batch_news.set()  # sooner than the next look at the queue
    service.wait(lambda: client.batches.retrieve(batch.id).status == "completed")
    done = client.batches.retrieve(batch.id)
    assert [r["custom_id"] for r in rows(client, done.output_file_id)] == [f"r{n}" for n in range(60)]
    assert len(service.policy.prompts) == 61 == state.ledger.db.read("SELECT COUNT(*) FROM usage")[0][0]


# ---- what time does --------------------------------------------------------------------------------------------------


class Shop:
    def __init__(self, db) -> None:
        self.now, self.db = NOON, db
        self.ledger = Ledger(db, clock=lambda: self.now)
        self.plans = Plans(self.ledger)
        for customer in ("ann", "bob"):
            Accounts(db, lambda: self.now).ensure(customer)
            self.ledger.topup(customer, 100 * USD)
        self.plans.define(Plan("coder", 20 * USD, 30 * USD, None, None, 2))
        self.plans.define(Plan("year", 50 * USD, 30 * USD, None, None, 5, months=12))

    def balance(self, kind: str, customer: str = "ann") -> int:
        """With what is over and not booked as such."""
        sql = "SELECT CAST(COALESCE(SUM(balance_nano), 0) AS BIGINT) FROM accounts WHERE customer = ? AND kind = ?"
        return self.db.read(sql, (customer, kind))[0][0]

    def spendable(self, kind: str = "plan", customer: str = "ann") -> int:
        with self.ledger.books([customer]) as books:
            return sum(nano for (which, _), nano in books.pockets(customer) if which == kind)

    def days(self, count: int) -> None:
        for _ in range(count):
            self.now += DAY
            self.plans.turn()
            self.ledger.expire_pockets()


@pytest.fixture
def shop(db):
    shop = Shop(db)
    yield shop
    assert shop.ledger.audit().sound


def test_no_term_is_renewed_and_the_credits_that_were_left_are_there_for_as_long_as_they_would_have_been(shop):
    for customer in ("ann", "bob"):
        shop.plans.subscribe(customer, "coder")
    shop.days(10)
    suspension.suspend(shop.ledger, "ann", "abuse")
    shop.days(45)  # past the month and most of the next
    assert (shop.balance("fees"), shop.balance("fees", "bob")) == (20 * USD, 40 * USD)
    assert shop.plans.subscription("ann").state == "active" and shop.balance("plan") == 30 * USD and shop.spendable() == 0
    suspension.resume(shop.ledger, "ann")
    assert shop.spendable() == 30 * USD  # of the month that was paid
    assert shop.plans.turn() == 1 and shop.plans.turn() == 0
    sub = shop.plans.subscription("ann")
    assert shop.balance("fees") == 40 * USD and shop.spendable() == 60 * USD and sub.begins == shop.now  # a whole month more
    shop.days(20)  # of the first month's 31 days, 10 had passed
    assert shop.spendable() == 60 * USD
    shop.days(1)
    assert shop.spendable() == 30 * USD and shop.balance("fees") == 40 * USD
    shop.days(10)
    assert shop.balance("fees") == 60 * USD == shop.balance("fees", "bob") and shop.spendable() == 30 * USD
    with shop.db.snapshot() as read:
        found = figures(read, months_until(read, "2027-04"), "2027-01")
        assert {name: values for name, values in found.items() if values} == replayed(read, "2027-04", "2027-01")


def test_the_months_of_a_paid_year_come_and_none_is_lost(shop):
    shop.plans.subscribe("ann", "year")
    suspension.suspend(shop.ledger, "ann", "abuse")
    shop.days(100)
    assert shop.balance("fees") == 50 * USD and shop.spendable() == 30 * USD and shop.balance("plan") == 120 * USD
    suspension.resume(shop.ledger, "ann")
    assert shop.spendable() == 120 * USD  # of the month it was suspended in and the three since
    shop.days(1)
    assert shop.spendable() == 120 * USD and shop.plans.subscription("ann").period == 3


def test_a_year_that_ends_meanwhile_waits_and_lapses_if_the_cash_does_not_do(shop):
    shop.plans.subscribe("ann", "year")
    shop.days(360)
    suspension.suspend(shop.ledger, "ann", "abuse")
    shop.ledger.refund("ann", 40 * USD, "back")
    shop.days(40)
    assert shop.plans.subscription("ann").state == "active"
    suspension.resume(shop.ledger, "ann")
    shop.plans.turn()
    assert shop.plans.subscription("ann") is None and shop.balance("cash") == 10 * USD
    assert shop.spendable() == 30 * USD  # the last month's, which it could not spend


def test_vouchers_wait_too_and_those_that_were_over_stay_over(shop):
    for lot, expires in (("over", NOON - 1), ("soon", NOON + 5 * DAY), ("late", NOON + 90 * DAY), ("never", None)):
        for customer in ("ann", "bob"):
            assert shop.ledger.grant(customer, USD, lot=f"{lot}/{customer}", expires=expires)
    suspension.suspend(shop.ledger, "ann", "abuse")
    shop.days(30)
    assert shop.balance("voucher", "bob") == 2 * USD and shop.balance("voucher") == 4 * USD
    suspension.resume(shop.ledger, "ann")
    assert shop.spendable("voucher") == 3 * USD
    ends = dict(map(tuple, shop.db.read("SELECT substr(lot, 1, length(lot) - 4), expires FROM accounts WHERE customer = 'ann' AND kind = 'voucher'")))
    assert ends == {"over": NOON - 1, "soon": NOON + 35 * DAY, "late": NOON + 120 * DAY, "never": None}
    shop.days(6)
    assert shop.balance("voucher") == 2 * USD and shop.ledger.balances("ann")["breakage"] == 2 * USD


def test_who_waits_for_a_seat_keeps_the_place_and_is_not_charged(shop):
    shop.plans.define(Plan("rare", USD, USD, None, None, 0))
    assert shop.plans.wait("ann", "rare") == 1
    suspension.suspend(shop.ledger, "ann", "abuse")
    shop.plans.define(Plan("rare", USD, USD, None, None, 1))
    shop.days(1)
    assert shop.plans.waiting("rare") == ["ann"] and shop.balance("fees") == 0
    suspension.resume(shop.ledger, "ann")
    shop.days(1)
    assert shop.plans.subscription("ann").plan == "rare"


def test_no_automatic_top_up_is_made_and_one_that_is_under_way_is_booked(shop):
    class Bank:
        asked: list[str] = []

        def charge(self, charge, customer, method, cents, tax_cents):
            self.asked.append(customer)
            if len(self.asked) == 1:
                raise OSError("lost")
            return f"pi_{len(self.asked)}"

    bank = Bank()
    for customer in ("ann", "bob"):
        shop.ledger.refund(customer, 100 * USD, f"spent-{customer}")
    charges.set_rule(shop.ledger, "ann", RULE)
    assert charges.tick(shop.ledger, bank) == 1  # whether it was charged nobody knows: it stays due
    suspension.suspend(shop.ledger, "ann", "abuse")
    charges.set_rule(shop.ledger, "bob", RULE)
    shop.now += 3600
    assert charges.tick(shop.ledger, bank) == 1 and bank.asked == ["ann", "bob"]
    suspension.resume(shop.ledger, "ann")
    assert charges.tick(shop.ledger, bank) == 1 and bank.asked == ["ann", "bob", "ann"]
    suspension.suspend(shop.ledger, "bob", "abuse")
    shop.now += 3 * DAY
    for _ in range(2):  # what nobody heard of is given up; then a new one would be due
        charges.tick(shop.ledger, bank)
    assert bank.asked.count("bob") == 1
    assert [row[0] for row in shop.db.read("SELECT state FROM auto_charges WHERE customer = 'bob'")] == ["failed"]


# ---- the word itself -------------------------------------------------------------------------------------------------


def test_it_is_logged_and_told_once_each_and_nonsense_is_refused(db):
    now = [NOON]
    ledger = Ledger(db, clock=lambda: now[0])
    accounts = Accounts(db)
    accounts.ensure("ann")
    notices.set_webhook(db, "ann", "http://127.0.0.1:9/x")
    for reason in ("", "  ", "a\nb", "x" * 201, "\x1b[2J"):
        with pytest.raises(UserError, match="reason"):
            suspension.suspend(ledger, "ann", reason)
    for act in (lambda: suspension.suspend(ledger, "nobody", "x"), lambda: suspension.resume(ledger, "nobody")):
        with pytest.raises(UnknownId):
            act()
    with pytest.raises(UserError, match="not suspended"):
        suspension.resume(ledger, "ann")
    assert suspension.suspend(ledger, "ann", "first", "root")["suspended"] == NOON
    now[0] += 60
    assert suspension.suspend(ledger, "ann", "better said", "root")["suspended"] == NOON  # since when stays
    now[0] += 60
    assert suspension.resume(ledger, "ann", "root")["suspended_s"] == 120
    with pytest.raises(UserError, match="not suspended"):
        suspension.resume(ledger, "ann")
    log = [(e["action"], e["actor"], e["detail"]) for e in accounts.audit_log("ann")[0] if e["action"].startswith("organization.")]
    assert log[:3] == [
        ("organization.resumed", "root", {"suspended_s": 120, "reason": "better said"}),
        ("organization.suspended", "root", {"reason": "better said"}),
        ("organization.suspended", "root", {"reason": "first"}),
    ]
    assert [row[0] for row in db.read("SELECT kind FROM notices ORDER BY created")] == [
        "organization.suspended", "organization.suspended", "organization.resumed"]  # fmt: skip


def test_two_who_lift_it_at_once_give_the_time_back_once(db):
    ledger = Ledger(db)
    Accounts(db).ensure("ann")
    ledger.grant("ann", USD, lot="v", expires=time.time() + 100)
    suspension.suspend(ledger, "ann", "abuse")
    with db.transaction() as tx:
        tx("UPDATE organizations SET suspended = suspended - 1000")
    before = db.read("SELECT expires FROM accounts WHERE lot = 'v'")[0][0]
    done, refused = [], []

    def lift() -> None:
        try:
            done.append(suspension.resume(ledger, "ann"))
        except UserError:
            refused.append(1)

    threads = [threading.Thread(target=lift) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 1 and len(refused) == 5
    assert db.read("SELECT expires FROM accounts WHERE lot = 'v'")[0][0] == before + done[0]["suspended_s"]


LOCKED = "SELECT COUNT(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"


@pytest.mark.parametrize("other", ["resume", "suspend"])
def test_on_postgresql_whoever_comes_second_waits_for_the_first_to_commit(postgres, monkeypatch, other):
    """The first is held up in the middle of its transaction; the second must be seen waiting for a lock."""
    target = postgres.database()
    first, second, third = (Database(target) for _ in range(3))
    Accounts(first).ensure("ann")
    Ledger(first).grant("ann", USD, lot="v", expires=NOON + 100)
    suspension.suspend(Ledger(first, clock=lambda: NOON), "ann", "abuse")
    reached, go_on, outcome = threading.Event(), threading.Event(), {}

    def held_up(books, customer) -> None:
        if not reached.is_set():
            reached.set()
            assert go_on.wait(20)

    monkeypatch.setattr(suspension, "wait_until_now", held_up)

    def act(name, db, what) -> None:
        try:
            outcome[name] = what(Ledger(db, clock=lambda: NOON + 60), "ann")
        except UserError as error:
            outcome[name] = str(error)

    def suspend_again(ledger, customer):
        return suspension.suspend(ledger, customer, "again")

    then = suspension.resume if other == "resume" else suspend_again
    calls = (("first", first, suspension.resume), ("second", second, then))
    threads = [threading.Thread(target=act, args=call) for call in calls]
    threads[0].start()
    assert reached.wait(20)
    threads[1].start()
    within_a_second(lambda: third.read(LOCKED)[0][0] == 1)
    assert not outcome
    go_on.set()
    for thread in threads:
        thread.join(20)
    assert outcome["first"]["suspended_s"] == 60
    (since,) = third.read("SELECT suspended FROM organizations WHERE id = 'ann'")[0]
    if other == "resume":
        assert "is not suspended" in outcome["second"] and since is None
    else:  # it began anew, and not where the one that was lifted had begun
        assert outcome["second"]["suspended"] == since == NOON + 60
    assert third.read("SELECT expires FROM accounts WHERE lot = 'v'")[0][0] == NOON + 160  # given back once
    for db in (first, second, third):
        db.close()


def test_nobody_locks_themselves_out_by_the_api(service):
    house, url = service.key("house", role="admin"), service.running.base_url.removesuffix("/v1")
    answer = httpx.post(f"{url}/admin/organizations/house/suspend", json={"reason": "x"}, headers={"authorization": f"Bearer {house}"})
    assert answer.status_code == 409 and status(service, house) == 200


def test_the_receipts_and_budgets_of_who_is_suspended_are_still_the_operator_s_to_read(service):
    service.client(service.key("ann")).chat.completions.create(**ASK)
    suspension.suspend(service.state.ledger, "ann", "abuse")
    assert len(receipts.page(service.state.ledger.db, "ann", {})[0]) == 1
    assert budget_rules.listed(service.state.ledger.db, "ann", time.time()) == []
    assert KeyStore(service.state.ledger.db, b"p" * 64).list("ann")[0].suspended == "abuse"


def test_a_backup_takes_it_along(db, tmp_path):
    ledger, keys = Ledger(db), KeyStore(db, b"p" * 64)
    _, secret = keys.create("ann")
    suspension.suspend(ledger, "ann", "abuse")
    backup.backup(db, tmp_path / "books.gz")
    backup.restore(tmp_path / "books.gz", str(tmp_path / "restored.sqlite"))
    other = Database(tmp_path / "restored.sqlite")
    row = "SELECT suspended, suspended_for FROM organizations WHERE id = 'ann'"
    assert tuple(other.read(row)[0]) == tuple(db.read(row)[0]) and other.read(row)[0][1] == "abuse"
    assert KeyStore(other, b"p" * 64).authenticate(secret).suspended == "abuse"
    suspension.resume(Ledger(other), "ann")
    assert KeyStore(other, b"p" * 64).authenticate(secret).suspended == ""
    other.close()


TO_AND_FRO = """
import sys
from tidelock.service import suspension
from tidelock.service.db import Database
from tidelock.service.ledger import Ledger
now = [float(sys.argv[2])]
ledger = Ledger(Database(sys.argv[1]), clock=lambda: now[0])
print("begun", flush=True)
while True:
    now[0] += 7
    suspension.suspend(ledger, "ann", "abuse")
    now[0] += 5
    suspension.resume(ledger, "ann")
"""


def test_kill_9_while_it_is_written_leaves_all_of_it_or_nothing(db, target):
    ledger = Ledger(db, clock=lambda: NOON)
    Accounts(db, lambda: NOON).ensure("ann")
    ledger.grant("ann", USD, lot="v", expires=2 * NOON)
    now, lifted = NOON, 0
    for n in range(6):
        child = subprocess.Popen([sys.executable, "-c", TO_AND_FRO, target, str(now)], stdout=subprocess.PIPE,
                                 env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])})  # fmt: skip
        assert child.stdout.readline() == b"begun\n"
        time.sleep(0.05 + 0.03 * n)
        child.kill()
        child.wait()
        log = db.read("SELECT action, detail, created FROM audit_log WHERE action LIKE 'organization.%ed' AND action <> "
                      "'organization.created' ORDER BY created")  # fmt: skip
        resumed = [json.loads(row["detail"])["suspended_s"] for row in log if row["action"] == "organization.resumed"]
        (suspended, expires), = (tuple(r) for r in db.read(
            "SELECT o.suspended, a.expires FROM organizations o JOIN accounts a ON a.customer = o.id AND a.lot = 'v'"))  # fmt: skip
        assert expires == 2 * NOON + sum(resumed)
        assert (suspended is not None) == (log[-1]["action"] == "organization.suspended")
        now, lifted = log[-1]["created"], len(resumed)
    assert lifted > 10
