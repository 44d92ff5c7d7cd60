"""Automatic top-ups against a provider that answers, forgets to, refuses and repeats itself: never charged twice, never beyond
what the rule says, and booked once."""

from __future__ import annotations

import json
import random
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidelock.cli.main import main
from tidelock.service import charges, notices
from tidelock.service.accounts import Accounts
from tidelock.service.charges import HttpProvider, Refused, Rule
from tidelock.service.db import Database
from tidelock.service.ledger import Ledger
from tidelock.service.payments import Payments
from tidelock.service.reconciliation.job import reconcile
from tidelock.tokens.errors import UserError

USD, CENT = 10**9, 10_000_000
NOON = 1_800_000_000.0  # 2027-01-15
RULE = Rule(5 * USD, 20 * USD, 2, 60 * USD, "cus_ann")


class Bank(BaseHTTPRequestHandler):
    """The usual provider: what it charged it charged once per idempotency key, whatever became of the answer."""

    def do_POST(self) -> None:
        body = dict(urllib.parse.parse_qsl(self.rfile.read(int(self.headers["content-length"])).decode()))
        key, mood, server = self.headers["idempotency-key"], self.server.moods.pop(0) if self.server.moods else "ok", self.server
        server.asked.append((key, body, self.headers["authorization"]))
        if mood in ("ok", "lost", "slow event") and key not in server.charged:
            server.charged[key] = {"id": f"pi_{len(server.charged)}", "amount_received": int(body["amount"]), "currency": "usd",
                                   "metadata": {name[9:-1]: value for name, value in body.items() if name.startswith("metadata[")}}
        if mood == "lost":
            self.connection.close()
            return
        status, answer = {"declined": (402, {"error": "card_declined"}), "broken": (500, {}), "junk": (200, [])}.get(
            mood, (200, {**server.charged.get(key, {}), "status": "processing"}))
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args) -> None:
        pass


class Town:
    """One organisation with a rule, its bank, and the books."""

    def __init__(self, target: str) -> None:
        self.now = NOON
        self.db = Database(target)
        self.ledger = Ledger(self.db, clock=lambda: self.now)
        self.payments = Payments(self.ledger)
        Accounts(self.db).ensure("ann")
        self.bank = ThreadingHTTPServer(("127.0.0.1", 0), Bank)
        self.bank.moods, self.bank.asked, self.bank.charged = [], [], {}
        threading.Thread(target=self.bank.serve_forever, args=(0.01,), daemon=True).start()
        self.provider = HttpProvider(f"http://127.0.0.1:{self.bank.server_port}", "sk_test", timeout_s=3)
        charges.set_rule(self.ledger, "ann", RULE)

    def close(self) -> None:
        self.bank.shutdown()
        self.bank.server_close()
        self.db.close()

    def tick(self, *moods: str) -> int:
        self.bank.moods[:] = moods
        return charges.tick(self.ledger, self.provider)

    def events(self) -> list[bytes]:
        return [json.dumps({"id": f"evt_{key}", "type": "payment_intent.succeeded", "data": {"object": intent}}).encode()
                for key, intent in self.bank.charged.items()]

    def hear(self) -> None:
        for event in self.events():
            self.payments.event(event)

    def cash(self) -> int:
        return self.ledger.balances("ann").get("cash", 0)

    def spend(self) -> None:
        if self.cash():
            self.ledger.refund("ann", self.cash(), f"spent {self.now} {random.random()}")

    def states(self) -> list[str]:
        return [row[0] for row in self.db.read("SELECT state FROM auto_charges ORDER BY created, id")]


@pytest.fixture
def town(target):
    town = Town(target)
    yield town
    assert town.ledger.audit().sound and reconcile(town.db, 0, 4e9)[0].total == 0
    town.close()


def test_low_cash_is_charged_once_and_credited_when_the_provider_says_so(town):
    town.ledger.topup("ann", 5 * USD)
    assert town.tick() == 0  # not below
    town.spend()
    assert town.tick() == 1 and town.tick() == 0 and town.states() == ["asked"] and town.cash() == 0
    (key, body, secret) = town.bank.asked[0]
    assert (body["amount"], body["customer"], body["off_session"], secret) == ("2000", "cus_ann", "true", "Bearer sk_test")
    assert body["metadata[organization]"] == "ann" and body["metadata[auto_topup]"] == key
    for _ in range(3):
        town.hear()
    assert town.cash() == 20 * USD and town.states() == ["paid"] and town.tick() == 0


def test_tax_is_charged_on_top(town):
    Accounts(town.db).set_tax("ann", 1900, "DE1", "root")
    town.tick()
    assert town.bank.asked[0][1]["amount"] == "2380" and town.bank.asked[0][1]["metadata[tax_cents]"] == "380"
    town.hear()
    assert town.cash() == 20 * USD


@pytest.mark.parametrize("mood", ["lost", "broken", "junk"])
def test_an_answer_that_got_lost_is_asked_for_again_under_the_same_name(town, mood):
    assert town.tick(mood) == 1 and town.states() == ["due"] and town.tick() == 0  # not before its time
    town.now += 11
    assert town.tick() == 1 and len({key for key, _, _ in town.bank.asked}) == 1 and len(town.bank.charged) == 1
    town.hear()
    assert town.cash() == 20 * USD and town.states() == ["paid"]


def test_the_event_may_come_before_the_answer(town):
    town.tick("lost")
    town.hear()
    assert town.states() == ["paid"] and town.cash() == 20 * USD
    town.now += 100
    assert town.tick() == 0


def test_no_more_a_day_and_a_month_than_the_rule_says(town):
    days = []
    for hour in range(24 * 20):  # to the fourth of February
        town.now = NOON + hour * 3600
        town.spend()
        town.tick()
        if len(town.bank.charged) > len(days):
            days.append(town.now)
        town.hear()
    january = [day for day in days if day < 1_801_440_000]  # 2027-02-01
    assert len(january) == 3 and len(days) == 6  # 60 USD each
    assert all(c - a >= 86_400 for a, _, c in zip(days, days[1:], days[2:], strict=False))
    assert max(sum(a <= d < a + 86_400 for d in days) for a in days) == 2


def test_three_refusals_in_a_row_end_the_rule_and_everybody_is_told(town):
    for whose in ("ann", notices.OPERATOR):
        notices.set_webhook(town.db, whose, "http://127.0.0.1:9/x")
    for n in range(5):
        town.tick("declined")
        town.now += 86_400
    assert town.states() == ["failed"] * 3 and town.bank.charged == {} and len(town.bank.asked) == 3
    assert town.db.read("SELECT active, failures FROM auto_topups")[0][:] == (0, 3)
    told = town.db.read("SELECT customer, kind FROM notices ORDER BY customer")
    assert [tuple(row) for row in told] == [("", "auto_topup.failed")] * 3 + [("ann", "auto_topup.failed")] * 3
    charges.set_rule(town.ledger, "ann", RULE)
    assert town.tick() == 1


def test_a_decline_told_by_event_closes_the_charge_and_a_late_one_changes_nothing(town):
    town.tick()
    (intent,) = town.bank.charged.values()
    declined = {"id": "evt_no", "type": "payment_intent.payment_failed", "data": {"object": intent}}
    assert town.payments.event(json.dumps(declined).encode()) and town.states() == ["failed"] and town.cash() == 0
    assert not town.payments.event(json.dumps(declined).encode())  # heard before
    town.hear()  # the money came after all: it is booked, and the charge is paid
    assert town.states() == ["paid"] and town.cash() == 20 * USD
    town.payments.event(json.dumps({**declined, "id": "evt_late"}).encode())
    assert town.states() == ["paid"] and town.db.read("SELECT failures FROM auto_topups")[0][0] == 0


def test_two_workers_make_one_charge(town):
    other = Ledger(Database(town.db.target), clock=lambda: town.now)
    barrier, asked = threading.Barrier(2), []

    def work(ledger: Ledger) -> None:
        barrier.wait()
        asked.append(charges.tick(ledger, town.provider))

    threads = [threading.Thread(target=work, args=(ledger,)) for ledger in (town.ledger, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(asked) == 1 and len(town.bank.charged) == 1
    other.db.close()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["ok", "lost", "broken", "declined", "junk"]), st.sampled_from(["hear", "twice", "backwards", "not"]),
                          st.sampled_from([15, 4000, 90_000])), max_size=12))  # fmt: skip
def test_whatever_the_provider_does_what_it_charged_is_what_is_booked(steps):
    town = Town(":memory:")
    spent = 0
    for mood, hear, wait in steps:
        spent += town.cash()
        town.spend()
        town.tick(mood)
        events = town.events()[:: -1 if hear == "backwards" else 1] * {"not": 0, "twice": 2}.get(hear, 1)
        for event in events:
            town.payments.event(event)
        town.now += wait
    town.hear()
    assert town.cash() + spent == sum(intent["amount_received"] for intent in town.bank.charged.values()) * CENT
    rows = town.db.read("SELECT created, nano_usd FROM auto_charges WHERE state <> 'failed' ORDER BY created")
    for begun, _ in rows:
        assert sum(begun <= created < begun + 86_400 for created, _ in rows) <= RULE.per_day
    assert len(town.bank.charged) * RULE.charge_nano <= 2 * RULE.month_nano and town.ledger.audit().sound
    town.close()


def test_rules_that_make_no_sense_are_refused(town, tmp_path):
    bad = [Rule(0, USD, 1, USD, "c"), Rule(USD, 1, 1, USD, "c"), Rule(USD, 2 * USD, 1, USD, "c"), Rule(USD, USD, 0, USD, "c"), Rule(USD, USD, 1, USD, "")]
    for rule in bad:
        with pytest.raises(UserError):
            charges.set_rule(town.ledger, "ann", rule)
    with pytest.raises(UserError, match="no organization"):
        charges.set_rule(town.ledger, "nobody", RULE)
    assert town.db.read("SELECT charge_nano FROM auto_topups")[0][0] == RULE.charge_nano
    (tmp_path / "payment_provider").write_text("ftp://x\nsecret\n")
    with pytest.raises(UserError, match="two lines"):
        HttpProvider.read(tmp_path / "payment_provider")
    assert HttpProvider.read(tmp_path / "none") is None and charges.tick(town.ledger, None) == 0
    with pytest.raises(Refused):
        town.bank.moods[:] = ["declined"]
        town.provider.charge("c1", "ann", "cus", 5, 0)


def test_the_command_line_sets_a_rule(tmp_path, capsys):
    db = Database(tmp_path / "service.sqlite")
    Accounts(db).ensure("ann")
    argv = ["admin", "payments", "auto", "ann", "--dir", str(tmp_path), "--below"]
    assert main([*argv, "5", "--charge", "20", "--per-day", "2", "--month-cap", "60", "--method", "cus_ann"]) == 0
    assert db.read("SELECT below_nano, charge_nano, per_day, month_nano, method FROM auto_topups")[0][:] == tuple(RULE.__dict__.values())
    assert main([*argv, "none"]) == 0 and not db.read("SELECT 1 FROM auto_topups")
    db.close()


