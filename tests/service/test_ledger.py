"""Laws of the money: sums are zero, nobody overspends, holds come back, history cannot be rewritten."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tidelock.service.db import Database
from tidelock.service.ledger import Hold, InsufficientBalance, Ledger
from tidelock.service.prices import Price, PriceBook, format_usd
from tidelock.tokens.errors import UserError

PRICE = Price(input_nano=300, cached_input_nano=30, output_nano=1500)


def place(
    ledger: Ledger, request_id: str, prompt: int, most: int, customer: str = "ann", lifetime_s: float = 60
) -> Hold:
    return ledger.hold(
        customer,
        "key_1",
        request_id,
        model="m",
        price=PRICE,
        price_version="v1",
        prompt_tokens=prompt,
        max_tokens=most,
        lifetime_s=lifetime_s,
    )


def use(ledger: Ledger, hold: Hold, tokens: int, cached: int = 0) -> int:
    return ledger.settle(hold, cached_tokens=cached, completion_tokens=tokens, finish_reason="stop")


@pytest.fixture
def ledger(tmp_path):
    ledger = Ledger(Database(tmp_path / "service.sqlite"))
    ledger.open_account("ann")
    yield ledger
    ledger.db.close()


class LedgerMachine(RuleBasedStateMachine):
    """Random interleavings against a model that is one integer per customer and a dict of open holds."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.ledger = Ledger(Database(":memory:"), clock=lambda: self.now)
        self.free = {"ann": 0, "bob": 0}
        self.open: dict[str, tuple[Hold, float]] = {}
        self.closed: list[Hold] = []
        self.requests = 0
        self.spent = 0

    @initialize()
    def accounts(self) -> None:
        for customer in self.free:
            self.ledger.open_account(customer)

    @rule(customer=st.sampled_from(["ann", "bob"]), nano=st.integers(1, 5_000_000), payment=st.integers(0, 20))
    def topup(self, customer, nano, payment):
        booked = self.ledger.db.read("SELECT 1 FROM transactions WHERE reference = ?", (f"pay_{payment}",))
        assert self.ledger.topup(customer, nano, f"pay_{payment}") is (not booked)
        self.free[customer] += 0 if booked else nano

    @rule(
        customer=st.sampled_from(["ann", "bob"]),
        prompt=st.integers(0, 3000),
        most=st.integers(1, 3000),
        lifetime=st.integers(1, 50),
    )
    def hold(self, customer, prompt, most, lifetime):
        self.requests += 1
        covered = (self.free[customer] - 300 * prompt) // 1500
        if covered < 1:
            with pytest.raises(InsufficientBalance):
                place(self.ledger, f"r{self.requests}", prompt, most, customer, lifetime)
            return
        hold = place(self.ledger, f"r{self.requests}", prompt, most, customer, lifetime)
        assert hold.max_tokens == min(most, covered)
        self.free[customer] -= 300 * prompt + 1500 * hold.max_tokens
        self.open[hold.request_id] = (hold, self.now + lifetime)

    @rule(data=st.data(), tokens=st.integers(-5, 4000), cached=st.integers(-5, 4000))
    def settle(self, data, tokens, cached):
        if not self.open:
            return
        hold, _ = self.open.pop(data.draw(st.sampled_from(sorted(self.open))))
        cost = use(self.ledger, hold, tokens, cached)
        cached, tokens = min(max(cached, 0), hold.prompt_tokens), min(max(tokens, 0), hold.max_tokens)
        assert cost == (hold.prompt_tokens - cached) * 300 + cached * 30 + tokens * 1500
        self.free[hold.customer] += hold.nano_usd - cost
        self.spent += cost
        self.closed.append(hold)

    @rule(data=st.data())
    def release(self, data):
        if not self.open:
            return
        hold, _ = self.open.pop(data.draw(st.sampled_from(sorted(self.open))))
        assert self.ledger.release(hold.request_id)
        self.free[hold.customer] += hold.nano_usd
        self.closed.append(hold)

    @rule(data=st.data())
    def closing_again_does_nothing(self, data):
        if self.closed:
            hold = data.draw(st.sampled_from(self.closed))
            assert use(self.ledger, hold, 1) == 0
            assert not self.ledger.release(hold.request_id)

    @rule(seconds=st.integers(1, 30))
    def expire(self, seconds):
        self.now += seconds
        expired = [hold for hold, expires in self.open.values() if expires <= self.now]
        assert self.ledger.sweep() == len(expired)
        for hold in expired:
            del self.open[hold.request_id]
            self.free[hold.customer] += hold.nano_usd
            self.closed.append(hold)

    @invariant()
    def books_are_sound(self):
        audit = self.ledger.audit()
        assert audit.sound, audit
        assert {customer: self.ledger.balance(customer) for customer in self.free} == self.free
        assert sum(row["spent_nano"] for row in self.ledger.statement()) == self.spent

    def teardown(self):
        self.ledger.db.close()


LedgerMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
test_any_interleaving_keeps_the_books_sound = LedgerMachine.TestCase


def test_hold_shrinks_to_what_the_wallet_covers_and_refuses_below_one_token(ledger):
    ledger.topup("ann", 10 * 300 + 4 * 1500 + 1499)
    hold = place(ledger, "r1", prompt=10, most=100)
    assert (hold.max_tokens, ledger.balance("ann")) == (4, 1499)
    with pytest.raises(InsufficientBalance):
        place(ledger, "r2", prompt=0, most=1)


def test_concurrent_holds_from_several_connections_never_exceed_the_wallet(tmp_path):
    path = tmp_path / "service.sqlite"
    first = Ledger(Database(path))
    first.open_account("ann")
    first.topup("ann", 50 * 1500)
    granted: list[int] = []

    def spend(worker: int) -> None:
        ledger = Ledger(Database(path))
        for n in range(10):
            try:
                granted.append(place(ledger, f"r{worker}-{n}", prompt=0, most=3).max_tokens)
            except InsufficientBalance:
                pass
        ledger.db.close()

    workers = [threading.Thread(target=spend, args=(n,)) for n in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sum(granted) == 50
    assert first.balance("ann") == 0 and first.audit().sound


def test_entries_cannot_be_changed_or_removed(ledger):
    ledger.topup("ann", 5)
    for statement in ("UPDATE entries SET nano_usd = 7", "DELETE FROM entries"):
        with pytest.raises(sqlite3.IntegrityError, match="append-only"), ledger.db.transaction() as write:
            write(statement)


def test_the_database_itself_refuses_an_overdraft(ledger):
    ledger.topup("ann", 5)
    wallet = ledger.db.read("SELECT id FROM accounts WHERE kind = 'wallet'")[0][0]
    with pytest.raises(sqlite3.IntegrityError, match="balance_nano"), ledger.db.transaction() as write:
        write("INSERT INTO entries (transaction_id, account_id, nano_usd) VALUES (1, ?, -6)", (wallet,))


def test_audit_sees_a_forged_entry_and_a_forged_balance(ledger):
    ledger.topup("ann", 5)
    with ledger.db.transaction() as write:
        write("INSERT INTO entries (transaction_id, account_id, nano_usd) VALUES (1, 3, 1)")
    audit = ledger.audit()
    assert (audit.sum_nano, audit.unbalanced, audit.sound) == (1, 1, False)
    with ledger.db.transaction() as write:
        write("UPDATE accounts SET balance_nano = 99 WHERE id = 3")
    assert ledger.audit().wrong_balances == 1


def test_audit_sees_a_lost_usage_row(ledger):
    ledger.topup("ann", 10_000_000)
    use(ledger, place(ledger, "r1", prompt=5, most=5), tokens=2)
    with ledger.db.transaction() as write:
        write("DELETE FROM usage")
    assert ledger.audit().unmetered == 1


def test_a_killed_process_leaves_a_hold_that_recovery_releases(tmp_path):
    path = tmp_path / "service.sqlite"
    script = f"""
import os, signal
from tidelock.service.db import Database
from tidelock.service.ledger import Ledger
from tidelock.service.prices import Price
ledger = Ledger(Database({str(path)!r}))
ledger.open_account("ann")
ledger.topup("ann", 1_000_000)
ledger.hold("ann", "key_1", "r1", model="m", price=Price(300, 30, 1500), price_version="v1",
            prompt_tokens=10, max_tokens=100, lifetime_s=3600)
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    ledger = Ledger(Database(path))
    assert ledger.balance("ann") == 1_000_000 - 10 * 300 - 100 * 1500
    assert ledger.sweep() == 0, "the hold has not expired yet"
    assert ledger.recover() == 1
    assert ledger.balance("ann") == 1_000_000 and ledger.audit().sound


def test_topup_needs_a_positive_amount_and_a_known_customer(ledger):
    for customer, nano in (("ann", 0), ("ann", -1), ("ann", 2**62), ("nobody", 1)):
        with pytest.raises(UserError):
            ledger.topup(customer, nano)


def test_a_used_price_version_never_changes_its_numbers(ledger):
    PriceBook("v1", {"m": PRICE}).register(ledger.db)
    PriceBook("v1", {"m": PRICE}).register(ledger.db)
    with pytest.raises(UserError, match="already stands"):
        PriceBook("v1", {"m": Price(1, 1, 1)}).register(ledger.db)


def test_a_file_that_is_no_database_is_one_clear_line(tmp_path):
    path = tmp_path / "service.sqlite"
    path.write_bytes(b"not a database" * 200)
    with pytest.raises(UserError, match="cannot open the service database"):
        Database(path)


def test_usd_text_is_exact():
    assert format_usd(1_500_000_001) == "1.500000001"
    assert format_usd(-1) == "-0.000000001"
