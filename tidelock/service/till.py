"""Where running requests meet the ledger: many operations, one commit, and an event loop that never waits for a disk.

A writer thread takes whatever has queued up while the last commit was under way and books it as one transaction. A hold
that cannot be written fails at once: money fails closed. What is owed to the books, a settlement or a release, is tried
until the database is back; if the process dies before that, `Ledger.recover` settles from the hold's row.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tidelock.service.books import Admission, Books, Hold, InsufficientBalance, Metered
from tidelock.service.db import Database, StorageDown
from tidelock.service.limiter import RateLimited
from tidelock.tokens.errors import UserError

log = logging.getLogger(__name__)

Also = Callable[[Any, int], None]  # (execute, charge): rows to be written with a settlement or not at all
# (future, charge): takes over, in the writer's thread, when the charge is written; it resolves the future in the end
Then = Callable[[asyncio.Future[Any], int], None]
MOST_PER_COMMIT = 256
# A commit costs much and one more operation in it little. Where several came together last time, the next are waited for,
# unless there are enough already; one request alone never waits.
LINGER_S, ENOUGH = 0.002, 64
RETRY_S = (0.05, 0.1, 0.2, 0.5)  # between attempts to reach the database; the last one repeats


@dataclass
class _Operation:
    customer: str
    request_id: str
    touches_hold: bool  # reads an existing one
    apply: Callable[[Books], Any]
    owed: bool  # to the books: tried until it succeeds
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Any] = field(init=False)
    attempts: int = 0
    orphaned: Callable[[], Any] | None = None  # what to do with a result that nobody waits for any more
    then: Then | None = None

    def __post_init__(self) -> None:
        self.future = self.loop.create_future()


class Till:
    def __init__(
        self, db: Database, *, worker: str = "", clock: Callable[[], float] = time.time, patience_s: float = 10.0
    ) -> None:
        """`worker`: whose holds these are. `patience_s`: how long a settlement is waited for before its caller is told
        that the storage is down (it is still tried)."""
        self.db, self.worker = db, worker
        self._clock, self._patience_s = clock, patience_s
        self._queue: queue.SimpleQueue[_Operation | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._starting = threading.Lock()
        self._closing = threading.Event()
        self.running: set[str] = set()  # requests that have a tab here: their holds are not swept
        self._crowded = False  # many requests run: then a commit waits a moment for more of them
        self.commits = 0  # and how many operations they carried: the benchmark's group size
        self.operations = 0

    async def hold(self, ask: Admission) -> Hold:
        """Raises InsufficientBalance, RateLimited or StorageDown; a caller that is cancelled meanwhile leaves no hold behind."""
        operation = self._submit(ask.customer, ask.request_id, lambda books: books.hold(ask), new=True)
        operation.orphaned = lambda: self.give_back(ask.customer, ask.request_id)
        try:
            return await operation.future
        except StorageDown:  # perhaps it was written and only the answer got lost
            operation.orphaned()
            raise
        except asyncio.CancelledError:
            if not operation.future.cancelled():  # the hold came and nobody took it; otherwise it is yet to come
                operation.orphaned()
            raise

    async def extend(
        self, hold: Hold, tokens: int, *, progress: int = 0, tools: Mapping[str, int] | None = None
    ) -> int:
        """`Books.extend`. Raises InsufficientBalance, StorageDown, or KeyError for a hold that was swept."""
        apply = lambda books: books.extend(hold, tokens, progress=progress, tools=tools)  # noqa: E731
        return await self._submit(hold.customer, hold.request_id, apply).future

    async def settle(
        self, hold: Hold, metered: Metered, also: Also | None = None, then: Then | None = None, *, or_free: bool = False
    ) -> int:
        """`Books.settle`; returns the charge. `also(execute, charge)` runs in the same transaction, `then` after it: what has
        to be written next begins without a way through the event loop.

        Raises StorageDown if the database was not back within the patience; the settlement is then still pending. `or_free`:
        it is a release from then on, because the answer will not be given, and who was refused pays nothing.
        """
        refused = False

        def apply(books: Books) -> int:
            if refused:
                books.release(hold.request_id)
                return 0
            charge = books.settle(hold.request_id, hold.price, metered)
            if also is not None:
                also(books.execute, charge)
            return charge

        operation = self._submit(hold.customer, hold.request_id, apply, owed=True, then=then)
        try:
            return await self._owed(operation)
        except StorageDown:
            if or_free:
                refused, operation.then = True, None
            raise

    async def release(self, hold: Hold) -> bool:
        return await self._owed(self.give_back(hold.customer, hold.request_id))

    def give_back(self, customer: str, request_id: str) -> _Operation:
        """Releases a hold that may or may not exist, without waiting."""
        return self._submit(customer, request_id, lambda books: books.release(request_id), owed=True)

    async def _owed(self, operation: _Operation) -> Any:
        """Whoever stops waiting, or is cancelled, leaves the operation in the queue: it is booked all the same."""
        timer = operation.loop.call_later(self._patience_s, _give_up, operation.future)
        try:
            return await operation.future
        finally:
            timer.cancel()

    def _submit(
        self, customer: str, request_id: str, apply: Callable[[Books], Any], *, new: bool = False, owed: bool = False,
        then: Then | None = None,
    ) -> _Operation:  # fmt: skip
        operation = _Operation(customer, request_id, not new, apply, owed, asyncio.get_running_loop(), then=then)
        if not self._threads:
            self._start()
        self._queue.put(operation)
        return operation

    # ---- the writer threads ------------------------------------------------------------------------------------

    def _start(self) -> None:
        with self._starting:
            if self._threads:
                return
            self._threads = [
                threading.Thread(target=self._write, name=f"till-{n}", daemon=True) for n in range(self.db.writers)
            ]
            for thread in self._threads:
                thread.start()

    def close(self) -> None:
        """Writes what is queued and stops. What cannot be written now is left to recovery."""
        self._closing.set()
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()
        self._threads = []

    def _write(self) -> None:
        while True:
            batch, stop = self._take()
            self._crowded = len(batch) > 2
            if batch:
                self._book(batch)
            if stop:
                return

    def _take(self) -> tuple[list[_Operation], bool]:
        """Waits for one operation and takes those behind it."""
        batch: list[_Operation] = []
        operation = self._queue.get()
        if self._crowded and self._queue.qsize() < ENOUGH:
            time.sleep(LINGER_S)
        while operation is not None:
            batch.append(operation)
            if len(batch) == MOST_PER_COMMIT:
                return batch, False
            try:
                operation = self._queue.get_nowait()
            except queue.Empty:
                return batch, False
        return batch, True

    def _book(self, batch: list[_Operation]) -> None:
        try:
            results = self._commit(batch)
        except StorageDown as error:
            self._down(batch, error)
        except Exception as error:
            if len(batch) > 1:  # one of them spoils it for all: find out which
                for operation in batch:
                    self._book([operation])
                return
            if not isinstance(error, UserError):
                log.exception("%s could not be booked", batch[0].request_id)
            _resolve([(batch[0], error)])
        else:
            for operation in _resolve(results):  # their loop has closed: a hold that came too late goes back at once
                if operation.orphaned is not None:
                    release = lambda books, held=operation.request_id: books.release(held)  # noqa: E731
                    self._book([_Operation(operation.customer, operation.request_id, True, release, True, operation.loop)])

    def _commit(self, batch: list[_Operation]) -> list[tuple[_Operation, Any]]:
        customers = [operation.customer for operation in batch]
        requests = [operation.request_id for operation in batch if operation.touches_hold]
        results = []
        # A hold need not outlive a power cut, because its request does not; what is owed must. The next settlement takes all
        # before it to the disk.
        with self.db.transaction(durable=any(operation.owed for operation in batch)) as tx:
            books = Books(tx, customers, requests, now=self._clock(), worker=self.worker)
            for operation in batch:
                try:
                    results.append((operation, operation.apply(books)))
                except (InsufficientBalance, RateLimited, KeyError) as refusal:
                    results.append((operation, refusal))
            books.write()
        self.commits += 1
        self.operations += len(batch)
        return results

    def _down(self, batch: list[_Operation], error: StorageDown) -> None:
        log.warning("the database is down: %s", error)
        _resolve([(operation, error) for operation in batch if not operation.owed])
        owed = [operation for operation in batch if operation.owed]
        if not owed:
            return
        for operation in owed:
            operation.attempts += 1
        pause = RETRY_S[min(max(operation.attempts for operation in owed), len(RETRY_S)) - 1]
        if self._closing.wait(pause):
            _resolve([(operation, error) for operation in owed])
            return
        for operation in owed:
            self._queue.put(operation)


def _give_up(future: asyncio.Future[Any]) -> None:
    if not future.done():
        future.set_exception(StorageDown("the database is down; the bill will be written when it is back"))


def _resolve(results: list[tuple[_Operation, Any]]) -> list[_Operation]:
    """Hands results to their waiters, one wake-up per event loop; returns those whose loop is closed."""
    stranded: list[_Operation] = []
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Operation, Any]]] = {}
    for operation, result in results:
        if operation.then is not None and not isinstance(result, BaseException):
            operation.then(operation.future, result)
        else:
            by_loop.setdefault(operation.loop, []).append((operation, result))
    for loop, own in by_loop.items():
        try:
            loop.call_soon_threadsafe(_deliver, own)
        except RuntimeError:  # the loop is closed
            stranded += [operation for operation, _ in own]
    return stranded


def _deliver(results: list[tuple[_Operation, Any]]) -> None:
    for operation, result in results:
        if operation.future.done():  # cancelled
            if operation.orphaned is not None and not isinstance(result, InsufficientBalance):
                operation.orphaned()
            continue
        if isinstance(result, BaseException):
            operation.future.set_exception(result)
            operation.future.exception()  # a release nobody waits for must not be reported as never retrieved
        else:
            operation.future.set_result(result)
