"""`POST /v1/chat/completions` as a raw ASGI endpoint, so that it sees the client leave and owns the order of writes.

A stream starts with the first sampled tokens, not before: whatever fails until then is a plain HTTP error. A failure
after that is an `error` event without `[DONE]`, so that a cut answer never looks like a finished one.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tidelock.service import chat, errors, wire
from tidelock.service.auth import authenticate
from tidelock.service.errors import ApiError
from tidelock.service.state import ServiceState
from tidelock.tokens.message import Message
from tidelock.tokens.template import Delta

log = logging.getLogger(__name__)


class ChatCompletions:
    def __init__(self, state: ServiceState) -> None:
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = f"req_{uuid.uuid4().hex}"
        request = Request(scope, receive)
        reply: Reply | None = None
        try:
            key = authenticate(self._state, request)
            turn = await chat.prepare(self._state, key, await request.body(), request_id)
            reply = (Stream if turn.request.stream else Whole)(turn, self._state.model, send)
            await self._answer(turn, reply, receive)
        except ClientDisconnect:
            log.info("%s: the client left before its request was read", request_id)
        except ApiError as error:
            await _fail(error, request_id, reply, scope, receive, send)
        except Exception:
            log.exception("%s failed", request_id)
            await _fail(errors.internal(), request_id, reply, scope, receive, send)

    async def _answer(self, turn: chat.Turn, reply: Reply, receive: Receive) -> None:
        state = self._state
        parser = state.template.parser(turn.calls_before)
        with chat.metered(state, turn) as meter:
            complete = False
            try:
                async with asyncio.timeout(state.request_timeout_s), _watching(receive, state, turn) as client_left:
                    async with aclosing(chat.sampled(state, turn, meter)) as chunks:
                        async for chunk in chunks:
                            if client_left.is_set():
                                break
                            meter.delivered = reply.streaming
                            await reply.progress(parser.feed(chunk.ids))
                complete = bool(meter.sample.ids) and meter.sample.finish_reason in ("stop", "length")
                if not complete:
                    raise errors.policy_failed("the answer was stopped before its end", 503, "engine_overloaded_error")
            except TimeoutError:
                raise errors.timed_out(state.request_timeout_s) from None
            finally:
                meter.delivered |= complete or client_left.is_set()
                if meter.delivered and meter.sample.ids:
                    message = parser.finish()
                    node = chat.record(state, turn, meter, message)
                    usage = meter.settle()
        await reply.finish(message, _finish_reason(message, meter.sample), usage, node)


class Whole:
    """The answer in one JSON body."""

    streaming = False
    started = False

    def __init__(self, turn: chat.Turn, model: str, send: Send) -> None:
        self._turn, self._model, self._send = turn, model, send

    async def progress(self, deltas: list[Delta]) -> None:
        pass

    async def finish(self, message: Message, finish_reason: str, usage: wire.Usage, node: str) -> None:
        choice = {"index": 0, "message": wire.answer(message), "logprobs": None, "finish_reason": finish_reason}
        body = {
            **_head(self._turn, self._model, "chat.completion"),
            "choices": [choice],
            "usage": usage.wire(),
            "trace": {"node": node},
        }
        await _start(self._send, 200, b"application/json", self._turn.request_id)
        await self._send({"type": "http.response.body", "body": wire.encode(body)})


class Stream:
    """The answer as server-sent events, one per policy chunk that says something."""

    streaming = True

    def __init__(self, turn: chat.Turn, model: str, send: Send) -> None:
        self._turn, self._send = turn, send
        self._head = _head(turn, model, "chat.completion.chunk")
        self._calls: list[int] = []  # call indices in order of appearance
        self.started = False

    async def progress(self, deltas: list[Delta]) -> None:
        if not self.started:
            self.started = True
            await _start(self._send, 200, b"text/event-stream", self._turn.request_id)
            await self._write(self._chunk({"role": "assistant", "content": ""}))
        delta = self._merge(deltas)
        if delta:
            await self._write(self._chunk(delta))

    async def finish(self, message: Message, finish_reason: str, usage: wire.Usage, node: str) -> None:
        last = self._chunk({}, finish_reason)
        last["choices"][0]["usage"] = usage.wire()  # where Kimi's own clients read it
        last["trace"] = {"node": node}
        events = wire.event(last)
        if self._turn.request.include_usage:
            events += wire.event({**self._head, "choices": [], "usage": usage.wire(), "trace": {"node": node}})
        await self._write_raw(events + wire.DONE, more=False)

    async def fail(self, error: ApiError) -> None:
        await self._write_raw(wire.error_event(error), more=False)

    def _merge(self, deltas: list[Delta]) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        calls: dict[int, dict[str, Any]] = {}
        for delta in deltas:
            if delta.kind in ("content", "reasoning"):
                field = "content" if delta.kind == "content" else "reasoning_content"
                merged[field] = merged.get(field, "") + delta.text
            elif delta.kind == "tool_name":
                self._calls.append(delta.call_index)
                index = len(self._calls) - 1
                call_id = f"functions.{delta.text}:{self._turn.calls_before + index}"
                function = {"name": delta.text, "arguments": ""}
                calls[index] = {"index": index, "id": call_id, "type": "function", "function": function}
            else:
                index = self._calls.index(delta.call_index)
                call = calls.setdefault(index, {"index": index, "function": {"arguments": ""}})
                call["function"]["arguments"] += delta.text
        return {**merged, "tool_calls": list(calls.values())} if calls else merged

    def _chunk(self, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        chunk = {**self._head, "choices": [choice]}
        return {**chunk, "usage": None} if self._turn.request.include_usage else chunk

    async def _write(self, chunk: dict[str, Any]) -> None:
        await self._write_raw(wire.event(chunk), more=True)

    async def _write_raw(self, data: bytes, *, more: bool) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": more})


Reply = Whole | Stream


def _head(turn: chat.Turn, model: str, kind: str) -> dict[str, Any]:
    completion_id = "chatcmpl-" + turn.request_id.removeprefix("req_")
    return {"id": completion_id, "object": kind, "created": int(time.time()), "model": model}


def _finish_reason(message: Message, sample: chat.Sample) -> str:
    return "tool_calls" if message.tool_calls and sample.finish_reason == "stop" else str(sample.finish_reason)


async def _start(send: Send, status: int, content_type: bytes, request_id: str) -> None:
    headers = [
        (b"content-type", content_type),
        (b"cache-control", b"no-store"),
        (b"x-request-id", request_id.encode()),
        (b"request-id", request_id.encode()),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})


async def _fail(
    error: ApiError, request_id: str, reply: Reply | None, scope: Scope, receive: Receive, send: Send
) -> None:
    if isinstance(reply, Stream) and reply.started:
        await reply.fail(error)
        return
    headers = {**error.headers(), "x-request-id": request_id, "request-id": request_id}
    response = Response(wire.encode(error.body()), error.status, headers, "application/json")
    await response(scope, receive, send)


@asynccontextmanager
async def _watching(receive: Receive, state: ServiceState, turn: chat.Turn) -> AsyncIterator[asyncio.Event]:
    """Yields the event "the client left", and stops the sampling as soon as it happens."""
    left = asyncio.Event()

    async def abort_on_disconnect() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        left.set()
        await state.policy.abort(turn.request_id)

    watcher = asyncio.create_task(abort_on_disconnect())
    try:
        yield left
    finally:
        watcher.cancel()
