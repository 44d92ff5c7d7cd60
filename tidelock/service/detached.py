"""Answers that go on without their client: begun once they are admitted, then polled, followed and cancelled by id.

The worker that took the request runs it. Whatever another worker must be able to say of it is in the database: the
document, whether somebody wants it stopped, and, of one that is streamed, its events. The document that ends it is
written by the transaction that charges for it, so what is told and what was billed are one; a worker that dies in between
leaves neither, and `recover` says so in its stead.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from functools import partial
from typing import Any, Protocol

from tidelock.service import access, errors, run, wire
from tidelock.service.answer import Bill, Event
from tidelock.service.db import Database, StorageDown
from tidelock.service.errors import ApiError
from tidelock.service.http import as_api_error
from tidelock.service.keys import Key
from tidelock.service.objects import Objects
from tidelock.service.run import Turn
from tidelock.service.state import ServiceState

log = logging.getLogger(__name__)

FLUSH_S = 0.1  # events are written down at most this often
POLL_S = 0.1  # who follows looks for more this often
LOOK_S = 0.2  # a worker looks this often whether something it runs is to be stopped
PATIENCE_S = 5.0  # a cancellation is waited for
TRACED_S = 1.0
KEPT_S = 3600.0  # events, after their end
STOPPED = "the server was stopped before the end of this response"
DIED = "the server that ran this response died before its end; nothing runs any more"


class Answer(Protocol):
    """One that can be detached, in the words of its surface."""

    kind: str  # of the stored object

    def begun(self) -> tuple[dict[str, Any], bytes]:
        """The document while it runs, and the events that open it."""

    def more(self, events: list[Event]) -> tuple[int, bytes]:
        """(the first one's number, events) of some more of the answer."""

    def ended(self, events: list[Event], failed: ApiError | None, cancelled: bool) -> tuple[dict[str, Any], str, int, bytes]:
        """(the response, its node, the first event's number, the events that end it). May be asked more than once."""

    def failed(self, failed: ApiError, cancelled: bool) -> tuple[dict[str, Any], int, bytes]:
        """The same of one that nothing came of."""


class Running:
    """One answer on its way."""

    def __init__(self, state: ServiceState, name: str, answer: Answer, turn: Turn) -> None:
        self._state, self.id, self._answer, self._turn = state, name, answer, turn
        self._db: Database = state.ledger.db
        self._left = asyncio.Event()
        self.cancelled = False
        self.admitted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.task = asyncio.create_task(self._work())

    async def cancel(self) -> None:
        """May be called again: a policy that did not know of the request yet is told once more."""
        self.cancelled = True
        self._left.set()
        for choice_id in self._turn.choice_ids:
            await self._state.policy.abort(choice_id)

    async def _work(self) -> None:
        key: Key = self._turn.key
        with access.background(self._state, "background", key.customer, key.id, self._turn.request_id) as record:
            try:
                await (self._stream() if self._turn.ask.stream else run.whole(
                    self._state, self._turn, self._left, self._conclude, self._begin))  # fmt: skip
                record.status = 200
            except asyncio.CancelledError:  # the server stops
                await self._fail(errors.policy_failed(STOPPED, 503, "engine_overloaded_error"))
                raise
            except Exception as exception:
                error = as_api_error(exception, self._turn.request_id)
                record.status = 499 if self.cancelled else error.status
                if not self.admitted.done():
                    self.admitted.set_exception(exception)
                    self.admitted.exception()  # its client may have left
                    return
                if isinstance(exception, StorageDown) and await self._ended_later():
                    return
                await self._fail(error)
            finally:
                self._state.detached.pop(self.id, None)

    async def _begin(self) -> None:
        doc, events = self._answer.begun()
        turn = self._turn

        def begin(tx: Any) -> None:
            Objects.put_in(tx, self._answer.kind, turn.key.customer, doc)
            tx("INSERT INTO background (id, customer, request_id, worker, streamed, cancelled) VALUES (?, ?, ?, ?, ?, 0)",
               (self.id, turn.key.customer, turn.request_id, self._state.worker.id, int(turn.ask.stream)))  # fmt: skip
            if turn.ask.stream:
                _write(tx, self.id, 0, events)

        await self._db.run(begin)
        if not self.admitted.done():
            self.admitted.set_result(None)

    async def _stream(self) -> None:
        answering = run.stream(self._state, self._turn, self._left, self._conclude, self._begin, FLUSH_S)
        async with aclosing(answering) as batches:
            async for events in batches:
                if events and not isinstance(events[-1], Bill):  # which was written with the charge
                    first, said = self._answer.more(events)
                    await self._db.run(partial(_write, name=self.id, first=first, events=said))

    def _conclude(self, execute: Any, events: list[Event], failed: ApiError | None) -> None:
        response, node, first, said = self._answer.ended(events, failed, self.cancelled)
        _end(execute, self.id, {"response": response, "node": node}, first, said)

    async def _fail(self, error: ApiError) -> None:
        """For an answer that nothing is charged for; one that was charged has its end already."""
        response, first, said = self._answer.failed(error, self.cancelled)
        try:
            await self._db.run(lambda tx: _end(tx, self.id, {"response": response}, first, said))
        except StorageDown:
            pass  # `recover` will find that nobody runs it

    async def _ended_later(self) -> bool:
        """Whether its bill, and with it its end, is written once the database is back."""
        for _ in range(60):
            await asyncio.sleep(1.0)
            try:
                return bool(await self._db.fetch("SELECT 1 FROM background WHERE id = ? AND ended IS NOT NULL", (self.id,)))
            except StorageDown:
                pass
        return False


def start(state: ServiceState, name: str, answer: Answer, turn: Turn) -> Running:
    """Its `admitted` is set when it is stored and runs, or raises what refused it."""
    running = state.detached[name] = Running(state, name, answer, turn)
    if state.stopper is None or state.stopper.done():
        state.stopper = asyncio.create_task(_watch(state))
    return running


async def _watch(state: ServiceState) -> None:
    """Stops what its client does not want any more, whichever worker that was told to."""
    sql = "SELECT id FROM background WHERE worker = ? AND ended IS NULL AND cancelled = 1"
    while state.detached:
        await asyncio.sleep(LOOK_S)
        try:
            for (name,) in await state.ledger.db.fetch(sql, (state.worker.id,)):
                if (running := state.detached.get(name)) is not None:
                    await running.cancel()
        except StorageDown:
            pass


async def stop(state: ServiceState) -> None:
    """The server ends: what still runs fails, and says so."""
    tasks = [running.task for running in state.detached.values()]
    if state.stopper is not None:
        tasks.append(state.stopper)
    for task in tasks:
        task.cancel()
    for ended in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(ended, Exception):
            log.error("a response in the background could not be ended", exc_info=ended)


async def cancel(state: ServiceState, name: str) -> None:
    """Returns when it has ended, or after a while."""
    db = state.ledger.db
    await db.run(lambda tx: tx("UPDATE background SET cancelled = 1 WHERE id = ? AND ended IS NULL", (name,)) and None)
    if (running := state.detached.get(name)) is not None:
        await running.cancel()
    until = time.monotonic() + PATIENCE_S
    while await db.fetch("SELECT 1 FROM background WHERE id = ? AND ended IS NULL", (name,)) and time.monotonic() < until:
        await asyncio.sleep(0.02)
    await traced(state, name)


async def traced(state: ServiceState, name: str) -> None:
    """Waits until who is told of an end can go on from it: its trace is written right after it, or, in a crash, never."""
    rows = await state.ledger.db.fetch("SELECT body FROM objects WHERE id = ?", (name,))
    node, until = json.loads(rows[0][0])["node"] if rows else None, time.monotonic() + TRACED_S
    while node is not None and state.traces.get(node) is None and time.monotonic() < until:
        await asyncio.sleep(0.01)


async def forget(state: ServiceState, name: str) -> None:
    """Stops it, and removes its events."""
    await cancel(state, name)
    await state.ledger.db.run(lambda tx: tx("DELETE FROM background_events WHERE id = ?", (name,)) and None)


async def streamed(state: ServiceState, name: str) -> bool:
    """Whether its events were, and still are, kept."""
    return bool(await state.ledger.db.fetch("SELECT 1 FROM background WHERE id = ? AND streamed = 1", (name,)))


async def follow(state: ServiceState, name: str, after: int = -1) -> AsyncIterator[bytes]:
    """Its events behind the one with the number `after`, as they come, until its end."""
    db, at, said = state.ledger.db, after + 1, time.monotonic()
    while True:
        try:
            runs = await db.fetch("SELECT 1 FROM background WHERE id = ? AND ended IS NULL", (name,))
            rows = await db.fetch("SELECT first, events, body FROM background_events WHERE id = ? AND first + events > ? "
                                  "ORDER BY first", (name, at))  # fmt: skip
        except StorageDown:
            runs, rows = True, []
        if not runs:
            await traced(state, name)
        for first, events, body in rows:
            yield b"".join(part.encode() + b"\n\n" for part in body.split("\n\n")[max(at - first, 0) : events])
            at, said = first + events, time.monotonic()
        if not runs:
            yield wire.DONE
            return
        if time.monotonic() - said > state.keep_alive_s:
            yield wire.COMMENT
            said = time.monotonic()
        await asyncio.sleep(POLL_S)


def recover(state: ServiceState, dead: list[str]) -> None:
    """Ends what nobody runs any more: its worker is dead or gone, or is this one and has no memory of it."""
    db: Database = state.ledger.db
    rows = db.read("SELECT id, request_id, worker, streamed FROM background WHERE ended IS NULL")
    if not rows:
        return
    alive = {row[0] for row in db.read("SELECT id FROM workers")} - set(dead)
    for name, request_id, worker, _ in rows:
        if worker not in alive or worker == state.worker.id and name not in state.detached:
            with db.transaction() as tx:
                _lose(tx, name, request_id)
            log.warning("%s ended with the server that ran it", name)


def _lose(tx: Any, name: str, request_id: str) -> None:
    row = tx("SELECT body FROM objects WHERE id = ?", (name,)).fetchone()
    response = json.loads(row[0])["response"] if row else {}
    sql = "SELECT prompt_tokens, completion_tokens, nano_usd FROM usage WHERE request_id = ? AND nano_usd > 0"
    if (charged := tx(sql, (request_id,)).fetchone()) is not None:
        prompt, completion, nano_usd = charged
        response["usage"] = {
            "input_tokens": prompt, "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": completion, "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": prompt + completion, "cost_nano_usd": nano_usd,
        }  # fmt: skip
    response |= {"status": "failed", "error": {"code": "server_error", "message": DIED}}
    last = tx("SELECT max(first + events) FROM background_events WHERE id = ?", (name,)).fetchone()[0]
    event = {"type": "response.failed", "sequence_number": last or 0, "response": response}
    _end(tx, name, {"response": response}, last or 0, wire.named_event(event))


def sweep(db: Database, now: float) -> None:
    """Forgets events a while after their end."""
    with db.transaction() as tx:
        old = "(SELECT id FROM background WHERE ended < ?)"
        tx(f"DELETE FROM background_events WHERE id IN {old}", (now - KEPT_S,))
        tx("DELETE FROM background WHERE ended < ?", (now - KEPT_S,))


def _end(tx: Any, name: str, change: dict[str, Any], first: int, events: bytes) -> None:
    """Once: what has ended, or was deleted, stays as it is."""
    if tx("UPDATE background SET ended = ? WHERE id = ? AND ended IS NULL", (time.time(), name)).rowcount == 0:
        return
    row = tx(f"SELECT body FROM objects WHERE id = ?{tx.for_update}", (name,)).fetchone()
    if row is not None:
        tx("UPDATE objects SET body = ? WHERE id = ?", (json.dumps(json.loads(row[0]) | change), name))
        if tx("SELECT streamed FROM background WHERE id = ?", (name,)).fetchone()[0]:
            _write(tx, name, first, events)


def _write(tx: Any, name: str, first: int, events: bytes) -> None:
    if events:
        row = (name, first, events.count(b"\n\n"), events.decode())
        tx("INSERT INTO background_events (id, first, events, body) VALUES (?, ?, ?, ?)", row)
