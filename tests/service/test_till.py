"""Laws of the till: many operations share a commit, none is lost, a caller that goes away leaves no hold behind."""

from __future__ import annotations

import asyncio
import time
from contextlib import contextmanager

import pytest

from tidelock.service.books import Admission, InsufficientBalance, Metered
from tidelock.service.db import Database, StorageDown
from tidelock.service.ledger import Ledger
from tidelock.service.tab import opened
from tidelock.service.prices import Counts, Price, PriceBook
from tidelock.service.till import Till
from tidelock.service.workers import Worker

PRICE = Price(input_nano=300, cached_input_nano=30, output_nano=1500)


def ask(request_id: str, prompt: int = 10, most: int = 20, customer: str = "ann") -> Admission:
    return Admission(request_id, customer, "key_1", "m", PRICE, "v1", prompt, most, 60)


def used(tokens: int, prompt: int = 10) -> Metered:
    return Metered(Counts(prompt, completion=tokens), "stop")


@pytest.fixture
def ledger(db):
    ledger = Ledger(db)
    PriceBook("v1", {"m": PRICE}).register(db)
    for customer in ("ann", "bob"):
        ledger.open_account(customer)
    yield ledger
    audit = ledger.audit()
    assert audit.sound, audit


@pytest.fixture
def till(db, ledger):
    till = Till(db, patience_s=60.0)
    yield till
    till.close()


def open_holds(db: Database) -> int:
    return db.read("SELECT COUNT(*) FROM holds WHERE state = 'open'")[0][0]


def test_requests_at_the_same_time_share_commits_and_never_overspend(till, ledger):
    cost = 10 * 300 + 20 * 1500
    ledger.topup("ann", 40 * cost)
    ledger.topup("bob", 10**12)

    async def one(n: int) -> int:
        customer = ("ann", "bob")[n % 2]
        try:
            hold = await till.hold(ask(f"r{n}", customer=customer))
        except InsufficientBalance:
            return 0
        await asyncio.sleep(0.01)
        return await till.settle(hold, used(hold.max_tokens))

    async def burst() -> list[int]:
        return await asyncio.gather(*(one(n) for n in range(200)))

    charges = asyncio.run(burst())
    assert sum(charges[1::2]) == 100 * cost and sum(charges[0::2]) <= 40 * cost
    assert ledger.balance("ann") == 40 * cost - sum(charges[0::2])
    assert till.operations >= 300 and till.commits < till.operations / 3
    assert ledger.db.read("SELECT COUNT(*) FROM usage")[0][0] == sum(charge > 0 for charge in charges)


def test_an_operation_that_cannot_be_booked_spoils_no_other(till, ledger):
    ledger.topup("ann", 10**9)

    async def burst() -> list:
        return await asyncio.gather(*(till.hold(ask(f"r{n // 2}")) for n in range(20)), return_exceptions=True)

    results = asyncio.run(burst())
    refused = [result for result in results if isinstance(result, BaseException)]
    assert len(refused) == 10 and open_holds(ledger.db) == 10
    for n in range(10):
        assert ledger.release(f"r{n}")


def test_a_caller_that_is_cancelled_while_waiting_leaves_no_hold(till, ledger):
    ledger.topup("ann", 10**9)

    async def main() -> None:
        for n in range(30):
            task = asyncio.create_task(till.hold(ask(f"r{n}")))
            await asyncio.sleep(0.0005 * (n % 4))
            task.cancel()
            try:
                hold = await task
            except asyncio.CancelledError:
                continue
            await till.release(hold)
        for _ in range(100):
            await asyncio.sleep(0.01)
            if not open_holds(ledger.db):
                return

    asyncio.run(main())
    till.close()
    assert open_holds(ledger.db) == 0 and ledger.balance("ann") == 10**9


def test_a_hold_that_arrives_just_as_its_caller_is_cancelled_is_given_back(till, ledger):
    ledger.topup("ann", 10**9)

    async def main() -> None:
        task = asyncio.create_task(till.hold(ask("r1")))
        await asyncio.sleep(0)
        while not open_holds(ledger.db):
            time.sleep(0.01)  # the loop is held up on purpose: the answer is queued, not taken
        time.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    till.close()
    assert open_holds(ledger.db) == 0 and ledger.balance("ann") == 10**9


def test_in_an_outage_holds_fail_at_once_and_a_bill_is_written_when_it_is_over(till, ledger, monkeypatch):
    ledger.topup("ann", 10**9)
    works, down = ledger.db.transaction, True

    @contextmanager
    def flaky(durable=True):
        if down:
            raise StorageDown("pulled the plug")
        with works(durable) as tx:
            yield tx

    async def main() -> int:
        nonlocal down
        down = False
        hold = await till.hold(ask("r1"))
        down = True
        with pytest.raises(StorageDown):
            await till.hold(ask("r2"))
        till._patience_s = 0.3
        with pytest.raises(StorageDown, match="will be written"):
            await till.settle(hold, used(7))
        down, till._patience_s = False, 60.0
        return await till.settle(hold, used(7))  # whoever comes first writes it

    monkeypatch.setattr(ledger.db, "transaction", flaky)
    asyncio.run(main())
    till.close()
    (row,) = ledger.db.read("SELECT * FROM usage")
    assert (row["completion_tokens"], row["nano_usd"]) == (7, 10 * 300 + 7 * 1500) and open_holds(ledger.db) == 0


async def answered(till: Till, request: Admission, tokens: int, per_chunk: int, streaming: bool = True) -> tuple[int, int]:
    """(tokens handed on, charge) of an answer of `tokens` tokens."""
    handed_on = 0
    async with opened(till, request, streaming) as tab:
        for start in range(0, tokens, per_chunk):
            chunk = min(per_chunk, tokens - start)
            allowed = await tab.take(chunk)
            handed_on += allowed
            if allowed < chunk:
                assert tab.exhausted
                break
        return handed_on, await tab.settle(Metered(tab.counts(), "stop"))


def test_a_long_answer_extends_its_hold_and_stops_exactly_where_the_money_ends(till, ledger):
    ledger.topup("ann", 10 * 300 + 1111 * 1500 + 7)
    assert asyncio.run(answered(till, ask("r1", most=5000), 3000, 7)) == (1111, 10 * 300 + 1111 * 1500)
    assert ledger.balance("ann") == 7


def test_many_streams_on_one_small_balance_use_it_up_and_not_a_token_more(till, ledger):
    ledger.topup("ann", 5_000_000)

    async def burst() -> list:
        asked = [answered(till, ask(f"r{n}", most=2000), 700, 9) for n in range(20)]
        return await asyncio.gather(*asked, return_exceptions=True)

    results = asyncio.run(burst())
    served = [result for result in results if isinstance(result, tuple)]
    assert served and all(isinstance(r, tuple | InsufficientBalance) for r in results)
    assert all(charge == 10 * 300 + tokens * 1500 for tokens, charge in served)
    assert sum(charge for _, charge in served) == 5_000_000 - ledger.balance("ann")


@pytest.mark.parametrize(("streaming", "delivered"), [(True, True), (True, False), (False, False)])
def test_a_tab_that_is_left_without_a_bill_charges_what_was_sent_and_nothing_else(till, ledger, streaming, delivered):
    ledger.topup("ann", 10**9)

    async def main() -> None:
        with pytest.raises(RuntimeError):
            async with opened(till, ask("r1", most=4000), streaming) as tab:
                await tab.take(100)
                tab.delivered = delivered
                raise RuntimeError

    asyncio.run(main())
    till.close()
    charged = (10 * 300 + 100 * 1500) * delivered
    assert ledger.balance("ann") == 10**9 - charged and open_holds(ledger.db) == 0
    assert ledger.db.read("SELECT COUNT(*) FROM usage")[0][0] == delivered


def test_a_hold_waits_for_no_flush_and_a_settlement_does(till, ledger, monkeypatch):
    ledger.topup("ann", 10**9)
    works, flushed = ledger.db.transaction, []

    @contextmanager
    def noted(durable=True):
        flushed.append(durable)
        with works(durable) as tx:
            yield tx

    monkeypatch.setattr(ledger.db, "transaction", noted)

    async def main() -> None:
        hold = await till.hold(ask("r1"))
        await till.extend(hold, 5, progress=3)
        await till.settle(hold, used(7))
        await till.release(await till.hold(ask("r2")))

    asyncio.run(main())
    assert flushed == [False, False, True, False, True]
    with works() as tx:  # and the database's own setting is the durable one again
        shown = tx("PRAGMA synchronous" if ledger.db.name == "sqlite" else "SHOW synchronous_commit").fetchone()[0]
    assert shown in (2, "on")


def test_a_machine_that_slept_does_not_sweep_its_own_streams_nor_those_of_a_worker_that_lives(db, ledger):
    """An hour of sleep, or a clock put forward, makes every hold look expired: whose request runs is charged what it gets."""
    now = [1_000.0]
    ours, sibling = Worker(db), Worker(db)
    till = Till(db, worker=ours.id, clock=lambda: now[0])
    own, other = (Ledger(db, clock=lambda: now[0], worker=worker.id) for worker in (ours, sibling))
    ledger.topup("ann", 10**9)

    async def main() -> int:
        async with opened(till, ask("r1", most=2000), True) as tab:
            await tab.take(60)
            await till.hold(ask("leaked"))  # whose request has gone without a word
            now[0] += 3600
            assert other.sweep() == 0  # of another worker, who lives
            assert own.sweep(till.running) == 1 and open_holds(db) == 1
            await tab.take(900)
            return await tab.settle(Metered(tab.counts(), "stop"))

    assert asyncio.run(main()) == 10 * 300 + 960 * 1500
    till.close()
    assert not till.running and own.sweep(till.running) == 0


def test_many_expired_holds_beside_many_that_run_are_all_swept(db, ledger):
    ledger.topup("bob", 10**12)
    now = [1_000.0]
    own = Ledger(db, clock=lambda: now[0])
    names = [f"r{n:04d}" for n in range(900)]
    with own.books(["bob"]) as books:
        for name in names:
            books.hold(ask(name, customer="bob"))
    now[0] += 100
    running = set(names[::2]) | set(names[:500])
    assert own.sweep(running) == 200 and open_holds(db) == 700
    assert own.sweep() == 700 and open_holds(db) == 0


@pytest.mark.parametrize("streaming", [True, False])
def test_after_a_long_outage_what_was_streamed_is_charged_and_what_nobody_saw_is_free(till, ledger, monkeypatch, streaming):
    """A client that was told 503 tries again: it paid for the answer that it never got, and then for the next."""
    ledger.topup("ann", 10**9)
    works, down = ledger.db.transaction, False

    @contextmanager
    def flaky(durable=True):
        if down:
            raise StorageDown("pulled the plug")
        with works(durable) as tx:
            yield tx

    async def main() -> None:
        nonlocal down
        async with opened(till, ask("r1"), streaming) as tab:
            await tab.take(7)
            down, till._patience_s = True, 0.3
            with pytest.raises(StorageDown):
                await tab.settle(Metered(tab.counts(), "stop"), lambda execute, charge: stored.append(charge))
        await asyncio.sleep(0.3)
        down = False
        async with asyncio.timeout(10):
            while open_holds(ledger.db):
                await asyncio.sleep(0.05)

    stored: list[int] = []
    monkeypatch.setattr(ledger.db, "transaction", flaky)
    asyncio.run(main())
    till.close()
    cost = 10 * 300 + 7 * 1500
    assert open_holds(ledger.db) == 0 and ledger.balance("ann") == 10**9 - (cost if streaming else 0)
    assert stored == ([cost] if streaming else []) and len(ledger.db.read("SELECT * FROM usage")) == streaming
