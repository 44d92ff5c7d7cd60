"""Budgets: a hard one is never exceeded by whatever runs beside whatever, a soft one tells once, months begin anew."""

from __future__ import annotations

import json
import random
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime

import httpx2 as httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidelock.cli.main import main
from tidelock.service import budget_rules, notices
from tidelock.service.accounts import SCOPES
from tidelock.service.books import Admission, Books, BudgetReached, InsufficientBalance, Metered
from tidelock.service.db import Database
from tidelock.service.keys import KeyStore
from tidelock.service.ledger import Ledger
from tidelock.service.prices import Counts, Price, PriceBook
from tidelock.tokens.errors import UserError
from tidelock.tokens.message import Message

PRICE = Price(0, 0, 10)
JANUARY = datetime(2027, 1, 20, tzinfo=UTC).timestamp()


class Shop:
    def __init__(self, target: str) -> None:
        self.now, self.n = JANUARY, 0
        self.db = Database(target)
        self.ledger = Ledger(self.db, clock=lambda: self.now)
        keys = KeyStore(self.db, b"p" * 32)
        self.keys = [keys.create("ann")[0] for _ in range(2)]
        self.project = self.keys[0].project
        PriceBook("v", {"m": PRICE}).register(self.db)
        self.ledger.topup("ann", 10**9)

    def budget(self, scope: str = "", soft: int | None = None, hard: int | None = None) -> None:
        budget_rules.set_budget(self.db, "ann", scope, soft, hard, self.now)

    def hold(self, tokens: int, key: int = 0):
        self.n += 1
        ask = Admission(f"r{self.n}", "ann", self.keys[key].id, "m", PRICE, "v", 0, tokens, 1e9, project=self.project, budgeted=True)
        with self.db.transaction() as tx:  # as the till does it: a refusal is an answer, what it wrote stays
            books = Books(tx, ["ann"], now=self.now)
            try:
                return books.hold(ask)
            except InsufficientBalance as refusal:
                return refusal
            finally:
                books.write()

    def settle(self, hold, tokens: int) -> int:
        with self.ledger.books(["ann"], [hold.request_id]) as books:
            return books.settle(hold.request_id, PRICE, Metered(Counts(0, completion=tokens), "stop"))

    def rows(self) -> dict[str, tuple[int, int]]:
        return {row[0]: (row[1], row[2]) for row in self.db.read("SELECT scope, spent_nano, held_nano FROM budgets")}


@pytest.fixture
def shop(target):
    shop = Shop(target)
    yield shop
    assert shop.ledger.audit().sound
    shop.db.close()


def test_a_hard_budget_is_where_the_money_ends(shop):
    shop.budget(hard=1000)
    first = shop.hold(60)
    second = shop.hold(60)
    assert (first.max_tokens, second.max_tokens) == (60, 40) and shop.rows() == {"": (0, 1000)}
    third = shop.hold(1)
    assert isinstance(third, BudgetReached)
    shop.settle(first, 10)
    assert shop.rows() == {"": (100, 400)}
    with shop.ledger.books(["ann"], [second.request_id]) as books:
        assert books.extend(second, 100) == 50
    shop.ledger.release(second.request_id)
    assert shop.rows() == {"": (100, 0)} and shop.hold(500).max_tokens == 90


def test_the_narrowest_budget_counts_and_others_are_not_touched(shop):
    shop.budget(hard=1000)
    shop.budget(shop.keys[0].id, hard=300)
    assert shop.hold(99).max_tokens == 30 and isinstance(shop.hold(1), BudgetReached)
    assert shop.hold(99, key=1).max_tokens == 70
    assert shop.rows() == {"": (0, 1000), shop.keys[0].id: (0, 300)}


def test_a_new_month_begins_at_nothing_and_what_runs_over_counts_in_the_new_one(shop):
    shop.budget(shop.project, soft=400, hard=1000)
    running = shop.hold(50)
    shop.settle(shop.hold(50), 50)
    assert isinstance(shop.hold(1), BudgetReached) and shop.rows()[shop.project] == (500, 500)
    shop.now = datetime(2027, 2, 1, tzinfo=UTC).timestamp()
    assert shop.hold(80).max_tokens == 50 and shop.rows()[shop.project] == (0, 1000)
    shop.settle(running, 20)
    assert shop.rows()[shop.project] == (200, 500)


def test_soft_and_hard_ones_are_told_of_once_a_month(shop):
    notices.set_webhook(shop.db, "ann", "https://hooks.example/x")
    shop.budget(soft=300, hard=600)

    def told():
        return [(row[0], json.loads(row[1])["data"]["spent_nano_usd"]) for row in shop.db.read("SELECT kind, body FROM notices ORDER BY created, kind")]

    shop.settle(shop.hold(29), 29)
    assert told() == []
    for _ in range(3):
        shop.now += 1
        shop.settle(shop.hold(1), 1)
    assert told() == [("budget.soft", 300)]
    shop.settle(shop.hold(99), 28)
    for _ in range(3):
        shop.now += 1
        assert isinstance(shop.hold(1), BudgetReached)
    assert told() == [("budget.soft", 300), ("budget.hard", 600)]
    shop.now = datetime(2027, 2, 2, tzinfo=UTC).timestamp()
    shop.settle(shop.hold(40), 40)
    assert told()[2:] == [("budget.soft", 400)]


def test_an_empty_purse_is_no_budget_s_fault(shop):
    shop.budget(hard=10**12)
    shop.ledger.refund("ann", 10**9, "all")
    refusal = shop.hold(1)
    assert isinstance(refusal, InsufficientBalance) and not isinstance(refusal, BudgetReached)


def test_what_the_month_has_used_counts_when_a_budget_is_set_and_nonsense_is_refused(shop):
    shop.settle(shop.hold(30), 30), shop.settle(shop.hold(20, key=1), 20)
    shop.budget(hard=1000), shop.budget(shop.keys[1].id, soft=1), shop.budget(shop.project, soft=5)
    assert shop.rows() == {"": (500, 0), shop.keys[1].id: (200, 0), shop.project: (500, 0)}
    shop.budget()
    assert "" not in shop.rows() and budget_rules.in_force(shop.db)
    for scope, soft, hard in (("proj_other", 1, 1), ("", -1, None), ("", 0, 5), ("", None, -5)):
        with pytest.raises(UserError):
            shop.budget(scope, soft, hard)
    with pytest.raises(UserError, match="no organization"):
        budget_rules.set_budget(shop.db, "nobody", "", 1, 1, shop.now)


def test_many_at_once_never_exceed_it(shop):
    shop.budget(hard=5000)
    spent, lock = [], threading.Lock()

    def work(seed: int) -> None:
        ledger, rng = Ledger(shop.db), random.Random(seed)
        for n in range(15):
            ask = Admission(f"w{seed}.{n}", "ann", shop.keys[0].id, "m", PRICE, "v", 0, rng.randint(1, 60), 60, project=shop.project, budgeted=True)
            try:
                with ledger.books(["ann"]) as books:
                    hold = books.hold(ask)
                with ledger.books(["ann"], [hold.request_id]) as books:
                    cost = books.settle(hold.request_id, PRICE, Metered(Counts(0, completion=rng.randint(0, hold.max_tokens)), "stop"))
                with lock:
                    spent.append(cost)
            except BudgetReached:
                pass

    shop.now = time.time()
    shop.budget(hard=5000)
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert shop.rows()[""] == (sum(spent), 0) and 4000 < sum(spent) <= 5000


STEPS = st.lists(st.tuples(st.sampled_from(["hold", "extend", "settle", "release", "lose", "month"]), st.integers(0, 80), st.integers(0, 1)), max_size=40)


@settings(max_examples=60, deadline=None)
@given(STEPS)
def test_held_and_spent_are_what_the_holds_and_usage_rows_say(steps):
    shop = Shop(":memory:")
    shop.budget(soft=200, hard=1500), shop.budget(shop.keys[0].id, hard=700)
    running = []
    for what, n, key in steps:
        if what == "hold":
            hold = shop.hold(n + 1, key)
            if not isinstance(hold, Exception):
                running.append(hold)
        elif what == "month":
            shop.now += 31 * 86_400
        elif running:
            hold = running[n % len(running)]
            with shop.ledger.books(["ann"], [hold.request_id]) as books:
                if what == "extend":
                    with suppress(BudgetReached):
                        books.extend(hold, n, progress=n)
                elif what == "settle":
                    books.settle(hold.request_id, PRICE, Metered(Counts(0, completion=n), "stop"))
                elif what == "lose":
                    books.lose(hold.request_id)
                else:
                    books.release(hold.request_id)
            if what != "extend":
                running.remove(hold)
        begun = datetime.fromtimestamp(shop.now, UTC).replace(day=1, hour=0, minute=0).timestamp()
        for scope, where in (("", "1 = 1"), (shop.keys[0].id, f"key_id = '{shop.keys[0].id}'")):
            held = shop.db.read(f"SELECT COALESCE(SUM(nano_usd), 0) FROM holds WHERE state = 'open' AND {where}")[0][0]
            spent = shop.db.read(f"SELECT COALESCE(SUM(nano_usd), 0) FROM usage WHERE created >= ? AND {where}", (begun,))[0][0]
            shown = next(b for b in budget_rules.listed(shop.db, "ann", shop.now) if (b["scope"] or "") == scope)
            assert (shown["spent_nano_usd"], shown["held_nano_usd"]) == (spent, held)
            assert spent + held <= shown["hard_nano_usd"]
    assert shop.ledger.audit().sound
    shop.db.close()


def test_the_api_says_so_and_the_command_line_sets_it(service, capsys, tmp_path):
    secret = service.key()
    (key,) = service.state.keys.list("ann")
    assert main(["admin", "limits", "budget", "ann", "--scope", key.id, "--hard", "0.000030", "--soft", "0.00001", "--dir", str(tmp_path)]) == 0
    assert "hard 0.000030000" in capsys.readouterr().out
    service.policy.turns = [Message("assistant", "word " * 60)]
    client = service.client(secret, max_retries=0)
    first = client.chat.completions.create(model="tide", messages=[{"role": "user", "content": "hi"}], max_tokens=400)
    assert first.choices[0].finish_reason == "length" and first.usage.model_extra["cost_nano_usd"] <= 30_000
    with pytest.raises(openai.RateLimitError) as caught:
        client.chat.completions.create(model="tide", messages=[{"role": "user", "content": "hi"}])
    assert caught.value.code == "budget_reached" and caught.value.response.headers["x-should-retry"] == "false"


def test_a_stream_that_a_budget_ends_says_so_and_has_an_exact_bill(service):
    secret = service.key()
    (key,) = service.state.keys.list("ann")
    service.policy.turns = [Message("assistant", "word " * 200)]
    budget_rules.set_budget(service.state.ledger.db, "ann", key.project, None, 400_000, time.time())
    stream = service.client(secret, max_retries=0).chat.completions.create(
        model="tide", messages=[{"role": "user", "content": "hi"}], max_tokens=900, stream=True
    )
    with pytest.raises(openai.APIError) as caught:
        list(stream)
    assert caught.value.code == "budget_reached"
    service.wait(lambda: service.state.ledger.db.read("SELECT 1 FROM usage"))
    (row,) = service.state.ledger.db.read("SELECT nano_usd FROM usage")
    assert 400_000 - 1500 < row["nano_usd"] <= 400_000
    (budget,) = budget_rules.listed(service.state.ledger.db, "ann", time.time())
    assert (budget["spent_nano_usd"], budget["held_nano_usd"]) == (row["nano_usd"], 0)


def test_what_one_server_is_told_another_keeps_within_a_second(pair):
    """Also the very first budget of a service, before which no request looked for one: the heartbeat, five seconds apart, is
    not waited for."""
    first, second = pair
    boss, ours, bobs = first.key("ann", scopes=SCOPES), first.key("ann"), first.key("bob")
    client, bob = (second.client(secret, max_retries=0) for secret in (ours, bobs))

    def served(client) -> bool:
        try:
            client.chat.completions.create(model="tide", messages=[{"role": "user", "content": "hi"}])
            return True
        except openai.RateLimitError as error:
            assert error.code == "budget_reached"
            return False

    def limit(method: str, **body) -> None:
        url = first.running.base_url + "/organization/spend_limit"
        assert httpx.request(method, url, headers={"authorization": f"Bearer {boss}"}, json=body or None).status_code == 200

    assert served(client) and not second.state.budgeted
    limit("POST", threshold_amount=0, currency="USD", interval="month")
    began = time.monotonic()
    while served(client):
        assert time.monotonic() < began + 1.0
    assert served(bob)
    limit("DELETE")
    assert served(client)  # what it says is read with every request: only that there is one had to get about
    (key,) = [key for key in first.state.keys.list("ann") if "admin" not in key.scopes]
    budget_rules.set_budget(first.state.ledger.db, "ann", key.id, None, 0, time.time())
    began = time.monotonic()
    while served(client):
        assert time.monotonic() < began + 1.0
    assert served(second.client(boss, max_retries=0))
