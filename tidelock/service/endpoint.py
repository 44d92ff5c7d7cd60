"""The ASGI endpoint of the three surfaces: it sees the client leave and owns the order of writes.

A stream starts with the first sampled tokens, or with a keep-alive when those are slow to come: whatever fails until
then is a plain HTTP error. A failure after that is an error event and no end marker, so that a cut answer never looks
like a finished one. A client that stops reading stops being written to, and counts as gone after a while.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any, Protocol

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

from tidelock.service import record, run, wire
from tidelock.service.answer import Bill, Ended, Event
from tidelock.service.ask import Ask
from tidelock.service.auth import authenticate, look_up
from tidelock.service.deadline import within
from tidelock.service.errors import ApiError
from tidelock.service.http import as_api_error, failure, for_client, received
from tidelock.service.keys import Key
from tidelock.service.limiter import Standing
from tidelock.service.limits import limit_headers
from tidelock.service.replay import Recorder
from tidelock.service.run import Turn
from tidelock.service.state import ServiceState
from tidelock.service.wire import header

log = logging.getLogger(__name__)


class Translation(Protocol):
    """One request in the words of its surface. Made from the body (or the making raises ApiError)."""

    anthropic: bool  # which shape errors have
    keep_alive: bytes
    ask: Ask

    def __init__(self, state: ServiceState, key: Key, request: Request, body: bytes) -> None: ...

    def begin(self, turn: Turn) -> None:
        """Told once, before any of the below."""

    def whole(self, ended: Sequence[Ended], bill: Bill) -> Any:
        """The answer as one JSON body."""

    def say(self, events: Sequence[Event]) -> bytes:
        """Server-sent events for some more of the answer; the first call opens the stream, the bill closes it."""

    def fail(self, error: ApiError) -> bytes:
        """The event that tells of a failure mid-stream."""

    async def detach(self, turn: Turn, receive: Receive, out: Output) -> None:
        """Answers a request whose `ask` is `apart`: nothing of it runs in this call."""


class Endpoint:
    def __init__(self, state: ServiceState, surface: type[Translation]) -> None:
        self._state, self._surface = state, surface

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = record.request_id()
        request = Request(scope, receive)
        out = Output(send, request_id, self._state.stall_timeout_s)
        translation: Translation | None = None
        recorder: Recorder | None = None
        key: Key | None = None
        try:
            await look_up(self._state, scope)
            key = authenticate(self._state, request)
            body = await received(scope, receive, self._state.max_body_bytes)
            if name := header(scope, b"idempotency-key"):
                recorder = Recorder(self._state.idempotency, key.customer, name, request_id, send)
                if await recorder.replay(scope["path"].encode() + b"\n" + body):
                    return
                out = Output(recorder, request_id, self._state.stall_timeout_s)
            translation = self._surface(self._state, key, request, body)
            turn = await run.prepare(self._state, key, translation.ask, request_id)
            translation.begin(turn)
            out.limits = turn.standing, translation.anthropic
            if turn.ask.apart:
                await translation.detach(turn, receive, out)
                return
            watch = Watch(receive, self._state, turn)
            try:
                await self._answer(turn, translation, watch.left, out)
            finally:
                watch.close()
        except (ClientDisconnect, Stalled):
            log.info("%s: the client left", request_id)
            if (now := record.current()) is not None:
                now.failed("client_left")
        except Exception as exception:
            error = for_client(as_api_error(exception, request_id), request)
            self._state.tally.refused(self._state.model, error)
            if key is not None:
                self._state.refused.note(request_id, key, self._state.model, error)
            if out.started and translation is not None:
                await out.write(translation.fail(error), more=False)
            else:
                await failure(error, request_id, self._surface.anthropic)(scope, receive, send)
        finally:
            if recorder is not None:
                await recorder.end()

    async def _answer(self, turn: Turn, translation: Translation, left: asyncio.Event, out: Output) -> None:
        if not turn.ask.stream:
            ended, bill = await run.whole(self._state, turn, left)
            await out.json(translation.whole(ended, bill))
            return
        async with aclosing(run.stream(self._state, turn, left)) as batches:
            async for events in batches:
                last = bool(events) and isinstance(events[-1], Bill)
                await out.write(translation.say(events) if events else translation.keep_alive, more=not last)


class Stalled(Exception):
    """The client has stopped reading."""


class Output:
    def __init__(self, send: Send, request_id: str, patience_s: float) -> None:
        self._send, self._request_id, self._patience_s = send, request_id, patience_s
        self.started = False
        self.limits: tuple[list[Standing], bool] = ([], False)  # as they stand when the answer begins; in Anthropic's words

    async def json(self, body: Any) -> None:
        data = wire.encode(body)
        await self._start(b"application/json", (b"content-length", b"%d" % len(data)))
        await self._send({"type": "http.response.body", "body": data})

    async def write(self, data: bytes, *, more: bool) -> None:
        """Raises Stalled if the connection takes nothing for `patience_s`."""
        if not self.started:
            await self._start(b"text/event-stream; charset=utf-8")
        if data or not more:
            try:
                with within(self._patience_s):
                    await self._send({"type": "http.response.body", "body": data, "more_body": more})
            except TimeoutError:
                raise Stalled from None

    async def _start(self, content_type: bytes, *more: tuple[bytes, bytes]) -> None:
        self.started = True
        name = self._request_id.encode()
        headers = [(b"content-type", content_type), (b"cache-control", b"no-store"), *more]
        standing, anthropic = self.limits
        for one in standing:
            headers += [(k.encode(), v.encode()) for k, v in limit_headers(one, anthropic=anthropic).items()]
        headers += [(b"x-request-id", name), (b"request-id", name), (b"msh-request-id", name)]  # as `http.id_headers`
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})


class Watch:
    """Sets `left` and stops the sampling when the client leaves.

    The first look is after `PATIENCE_S`: most answers that take less never cost a task, and one that is already gone
    then is seen at once.
    """

    PATIENCE_S = 0.2

    def __init__(self, receive: Receive, state: ServiceState, turn: Turn) -> None:
        self._receive, self._state, self._turn = receive, state, turn
        self.left = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._timer = asyncio.get_running_loop().call_later(self.PATIENCE_S, self._begin)

    def close(self) -> None:
        self._timer.cancel()
        if self._task is not None:
            self._task.cancel()

    def _begin(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._look())

    async def _look(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.left.set()
        for choice_id in self._turn.choice_ids:
            await self._state.policy.abort(choice_id)
