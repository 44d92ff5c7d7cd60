"""Laws of the money, on both databases: sums are zero, nobody overspends, holds come back, history cannot be rewritten."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
from conftest import forced

from tidelock.service.books import Metered
from tidelock.service.db import Conflict, Database
from tidelock.service.ledger import Hold, InsufficientBalance, Ledger
from tidelock.service.prices import Counts, Price, PriceBook, format_usd
from tidelock.service.rating import rerate
from tidelock.service.workers import Worker
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


def usage(ledger: Ledger) -> list[dict]:
    return [dict(row) for row in ledger.db.read("SELECT * FROM usage ORDER BY created, request_id")]


@pytest.fixture
def now():
    return [1000.0]


@pytest.fixture
def ledger(db, now):
    ledger = Ledger(db, clock=lambda: now[0])
    PriceBook("v1", {"m": PRICE}).register(db)
    ledger.open_account("ann")
    yield ledger
    assert ledger.audit().held_nano == 0


def test_hold_shrinks_to_what_the_wallet_covers_and_refuses_below_one_token(ledger):
    ledger.topup("ann", 10 * 300 + 4 * 1500 + 1499)
    hold = place(ledger, "r1", prompt=10, most=100)
    assert (hold.max_tokens, ledger.balance("ann")) == (4, 1499)
    with pytest.raises(InsufficientBalance):
        place(ledger, "r2", prompt=0, most=1)


def test_a_customer_nobody_knows_has_nothing_to_spend(ledger):
    with pytest.raises(InsufficientBalance):
        place(ledger, "r1", prompt=0, most=1, customer="nobody")
    assert ledger.db.read("SELECT * FROM customers WHERE customer = 'nobody'") == []


def test_an_extension_covers_what_is_left_and_then_nothing(ledger):
    ledger.topup("ann", 10 * 300 + 100 * 1500)
    hold = place(ledger, "r1", prompt=10, most=60)
    assert [ledger.extend(hold, 30), ledger.extend(hold, 30), ledger.extend(hold, 30)] == [30, 10, 0]
    assert ledger.balance("ann") == 0
    assert use(ledger, hold, 10**6) == 10 * 300 + 100 * 1500
    assert ledger.audit().sound
    with pytest.raises(KeyError):
        ledger.extend(hold, 1)


def test_pockets_burn_in_order_and_what_is_not_used_goes_back_where_it_came_from(ledger, now):
    ledger.topup("ann", 10_000)
    ledger.topup("ann", 2_000, pocket="extra")
    ledger.grant("ann", 3_000, lot="late", expires=now[0] + 200)
    ledger.grant("ann", 2_000, lot="soon", expires=now[0] + 100)
    ledger.grant("ann", 1_500, kind="plan", lot="2026-11")
    hold = place(ledger, "r1", prompt=0, most=8)  # 12_000
    assert hold.nano_usd == 12_000 and ledger.balances("ann")["cash"] == 6_500
    assert use(ledger, hold, 4) == 6_000  # soon 2_000, late 3_000, plan 1_000
    kinds = {kind: nano for kind, nano in ledger.balances("ann").items() if nano}
    assert kinds == {"cash": 10_000, "extra": 2_000, "plan": 500, "revenue": 6_000, "outside": -12_000, "contra": -6_500}
    assert usage(ledger)[0]["credit_nano"] == 6_000
    assert ledger.audit().sound


def test_an_expired_voucher_is_breakage_and_cannot_be_spent(ledger, now):
    ledger.grant("ann", 3_000, lot="gift", expires=now[0] + 10)
    hold = place(ledger, "r1", prompt=0, most=1)
    now[0] += 11
    with pytest.raises(InsufficientBalance):
        place(ledger, "r2", prompt=0, most=1)
    assert ledger.expire_pockets() == 1 and ledger.balances("ann")["breakage"] == 1_500
    ledger.release(hold.request_id)  # comes back to a voucher that is no more
    assert ledger.balance("ann") == 0 and ledger.expire_pockets() == 1
    assert ledger.balances("ann")["breakage"] == 3_000 and ledger.audit().sound


def test_a_payment_a_grant_and_a_refund_are_booked_once(ledger):
    assert [ledger.topup("ann", 500, "pay_1"), ledger.topup("ann", 500, "pay_1")] == [True, False]
    assert [ledger.grant("ann", 70, lot="gift"), ledger.grant("ann", 70, lot="gift")] == [True, False]
    assert [ledger.refund("ann", 200, "back_1"), ledger.refund("ann", 200, "back_1")] == [True, False]
    with pytest.raises(UserError, match="does not have that much"):
        ledger.refund("ann", 301, "back_2")
    assert ledger.balance("ann") == 500 + 70 - 200 and ledger.audit().sound


def test_concurrent_holds_from_several_processes_worth_of_connections_never_exceed_the_wallet(ledger, target):
    ledger.topup("ann", 50 * 1500)
    granted: list[int] = []

    def spend(worker: int) -> None:
        other = Ledger(Database(target))
        for n in range(10):
            try:
                granted.append(place(other, f"r{worker}-{n}", prompt=0, most=3).max_tokens)
            except InsufficientBalance:
                pass
        other.db.close()

    workers = [threading.Thread(target=spend, args=(n,)) for n in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sum(granted) == 50
    assert ledger.balance("ann") == 0 and ledger.audit().sound


def test_entries_and_transactions_cannot_be_changed_or_removed(ledger):
    ledger.topup("ann", 5_000)
    use(ledger, place(ledger, "r1", prompt=0, most=1), tokens=0)
    for statement in ("UPDATE entries SET nano_usd = 7", "DELETE FROM entries", "UPDATE transactions SET kind = 'x'",
                      "UPDATE usage SET key_id = 'x'", "DELETE FROM usage"):  # fmt: skip
        with pytest.raises(Conflict, match="append-only"), ledger.db.transaction() as tx:
            tx(statement)


def test_the_database_itself_refuses_an_overdraft(ledger):
    ledger.topup("ann", 5)
    with pytest.raises(Conflict, match="balance_nano"), ledger.db.transaction() as tx:
        tx("UPDATE accounts SET balance_nano = balance_nano - 6 WHERE kind = 'cash'")


def test_books_written_from_a_stale_reading_are_refused(ledger):
    """The primary key of a transaction is its place in the chain: nothing can be booked on books that changed."""
    ledger.topup("ann", 5)
    with pytest.raises(Conflict), ledger.db.transaction() as tx:
        tx("INSERT INTO transactions VALUES ('ann', 1, 'topup', 'other', '', 0, 'hash')")


def test_audit_sees_a_forged_entry_and_a_forged_balance(ledger):
    ledger.topup("ann", 5)
    with ledger.db.transaction() as tx:
        tx("INSERT INTO entries VALUES ('ann', 1, 9, 'cash', '', 1)")
    audit = ledger.audit()
    assert (audit.sum_nano, audit.unbalanced, audit.broken_links, audit.sound) == (1, 1, 1, False)
    with ledger.db.transaction() as tx:
        tx("UPDATE accounts SET balance_nano = 99 WHERE kind = 'cash'")
    assert ledger.audit().wrong_balances == 1


def test_audit_sees_an_edited_or_lost_usage_row_and_a_cut_chain(ledger):
    ledger.topup("ann", 10_000_000)
    use(ledger, place(ledger, "r1", prompt=5, most=5), tokens=2)
    assert ledger.audit().sound
    for column, forged in (("completion_tokens", 1), ("created", 1e9), ("nano_usd", 7), ("model", "'x'"), ("mode", "'x'")):
        (before,) = ledger.db.read(f"SELECT {column} FROM usage")[0]
        forced(ledger.db, f"UPDATE usage SET {column} = {forged}")
        assert ledger.audit().unmetered >= 1, column
        with ledger.db.transaction() as tx:
            tx(f"UPDATE usage SET {column} = ?", (before,))
    assert ledger.audit().sound
    with ledger.db.transaction() as tx:
        tx("DELETE FROM usage")
    assert ledger.audit().unmetered == 2  # a settlement without its row, and revenue without its usage
    with ledger.db.transaction() as tx:
        tx("UPDATE customers SET seq = seq - 1")
    assert ledger.audit().broken_links == 1


def test_a_dead_servers_request_is_settled_for_what_was_sent_and_a_live_ones_is_not_touched(ledger, target):
    ledger.topup("ann", 1_000_000)
    here = Worker(ledger.db)
    script = f"""
import os, signal
from tidelock.service.db import Database
from tidelock.service.ledger import Ledger
from tidelock.service.prices import Price
from tidelock.service.workers import Worker
db = Database({target!r})
ledger = Ledger(db, worker=Worker(db).id)
for name in ("streamed", "silent"):
    hold = ledger.hold("ann", "key_1", name, model="m", price=Price(300, 30, 1500), price_version="v1",
                       prompt_tokens=10, max_tokens=100, lifetime_s=3600)
    if name == "streamed":
        ledger.extend(hold, 50, progress=40)
os.kill(os.getpid(), signal.SIGKILL)
"""
    mine = Ledger(ledger.db, worker=here.id)
    alive = place(mine, "mine", prompt=0, most=10)
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    assert ledger.balance("ann") == 1_000_000 - 2 * (10 * 300 + 100 * 1500) - 50 * 1500 - 15_000
    ledger.recover(here.dead())
    cost = 10 * 300 + 40 * 1500
    assert ledger.balance("ann") == 1_000_000 - 15_000 - cost
    rows = {row["request_id"]: row for row in usage(ledger)}
    assert {name: (r["completion_tokens"], r["nano_usd"], r["finish_reason"]) for name, r in rows.items()} == {
        "streamed": (40, cost, "lost"), "silent": (0, 0, "lost")}  # fmt: skip
    assert use(mine, alive, 3) == 4500 and ledger.audit().sound


def test_a_worker_elsewhere_is_dead_when_its_heart_stands_still_and_not_after_an_outage(db):
    clock = [0.0]
    here = Worker(db, lease_s=10, monotonic=lambda: clock[0])
    there = Worker(db)
    with db.transaction() as tx:
        tx("UPDATE workers SET machine = 'elsewhere' WHERE id = ?", (there.id,))
    assert there.id not in here.dead()
    clock[0] = 9.0
    there.beat()
    assert there.id not in here.dead()
    clock[0] = 18.0
    assert there.id not in here.dead()
    here._seen.clear()  # what an outage of the database does: nobody could write a heartbeat
    clock[0] = 30.0
    assert there.id not in here.dead()
    clock[0] = 40.0
    assert there.id in here.dead()
    here.forget(here.dead())
    assert [row[0] for row in db.read("SELECT id FROM workers")] == [here.id]
    there.beat()  # it was only slow
    assert len(db.read("SELECT id FROM workers")) == 2 and there.id not in here.dead()


def test_an_expired_hold_is_swept_and_a_late_bill_changes_nothing(ledger, now):
    ledger.topup("ann", 1_000_000)
    hold = place(ledger, "r1", prompt=10, most=10, lifetime_s=60)
    now[0] += 59
    assert ledger.sweep() == 0
    now[0] += 1
    assert ledger.sweep() == 1
    assert use(ledger, hold, 5) == 0 and not ledger.release("r1")  # 0 is what the sweep charged
    assert ledger.balance("ann") == 1_000_000 and len(usage(ledger)) == 1 and ledger.audit().sound


def test_a_bill_written_twice_is_charged_once_and_says_the_same(ledger):
    ledger.topup("ann", 1_000_000)
    hold = place(ledger, "r1", prompt=10, most=10)
    assert use(ledger, hold, 5) == use(ledger, hold, 7) == 10 * 300 + 5 * 1500
    assert ledger.balance("ann") == 1_000_000 - 10_500 and len(usage(ledger)) == 1


def test_absurd_counts_are_no_refund_and_no_overdraft(ledger):
    ledger.topup("ann", 100 * 300 + 10 * 1500)
    place(ledger, "r1", prompt=100, most=10)
    counts = Counts(10**9, cached=10**9, cache_write_5m=-5, cache_write_1h=10**9, completion=-(10**9), tools={"x": 9})
    with ledger.books(["ann"], ["r1"]) as books:
        assert books.settle("r1", PRICE, Metered(counts, "stop")) == 100 * 30
    assert ledger.audit().sound


def test_topup_needs_a_positive_amount_and_a_known_customer(ledger):
    for customer, nano in (("ann", 0), ("ann", -1), ("ann", 2**62), ("nobody", 1)):
        with pytest.raises(UserError):
            ledger.topup(customer, nano)


def test_a_used_price_version_never_changes_its_numbers(ledger):
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


def test_closed_holds_go_after_a_while_and_nothing_that_counts_with_them(db, monkeypatch):
    price = Price(300, 30, 1500)
    PriceBook("v1", {"tide": price}).register(db)
    PriceBook("v2", {"tide": Price(300, 30, 1400)}).register(db)
    now = [1000.0]
    ledger = Ledger(db, clock=lambda: now[0])
    ledger.open_account("ann")
    ledger.topup("ann", 10**9)

    def hold(name):
        return ledger.hold("ann", "k", name, model="tide", price=price, price_version="v1", prompt_tokens=5, max_tokens=9, lifetime_s=1e9)

    for n in range(700):
        held = hold(f"r{n:03}")
        if n % 3:
            ledger.settle(held, cached_tokens=0, completion_tokens=4, finish_reason="stop")
        elif n % 2:
            ledger.release(held.request_id)
        now[0] += 1
    before, open_before = ledger.balances("ann"), db.read("SELECT COUNT(*) FROM holds WHERE state = 'open'")[0][0]
    assert ledger.prune(1e6) == 0
    monkeypatch.setattr("tidelock.service.ledger.PRUNED_AT_A_TIME", 200)
    assert ledger.prune(350.0, most=1) <= 200 and ledger.prune(350.0) > 0 and ledger.prune(350.0) == 0
    left = db.read("SELECT state, created FROM holds")
    assert sum(row["state"] == "open" for row in left) == open_before == 117
    assert all(row["created"] >= now[0] - 350 for row in left if row["state"] != "open")
    assert ledger.balances("ann") == before and ledger.audit().sound
    assert rerate(ledger, 0, 2000, "v2").changed == 466 and ledger.audit().sound
    assert ledger.settle(hold("new"), cached_tokens=0, completion_tokens=4, finish_reason="stop") > 0


def test_an_account_never_holds_more_than_a_column_can(ledger):
    for n in range(2):
        assert ledger.topup("ann", 2**62 - 1, f"pay_{n}")
    with pytest.raises(UserError, match="more than the books can hold in (outside|cash)"):
        ledger.topup("ann", 2**62 - 1, "pay_2")
    assert ledger.balance("ann") == 2**63 - 2 and ledger.audit().sound
