"""The Responses API over a WebSocket, at the path of the HTTP API: one connection, one response at a time.

A client's `response.create` is the body of `POST /v1/responses` with a type. It is sent through the whole application as
such a request, streamed, so that a turn is authenticated, limited, charged, counted and logged like any other; only its
events come back as messages. A response that is not to be stored can be continued on the connection that made it. One with
`generate: false` is charged nothing, stores nothing and says nothing; what it was given can be gone on with like the rest.

Format: OpenResponses specification, "WebSocket Transport"; `generate`: OpenAI's guide "WebSocket mode".
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping
from typing import Any

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect

from tidelock.service import errors, record, wire
from tidelock.service.auth import authenticate, look_up
from tidelock.service.errors import ApiError
from tidelock.service.http import as_api_error, failure
from tidelock.service.state import ServiceState
from tidelock.service.surfaces.responses_request import HERE, Here

PATH = "/v1/responses"
LONGEST_S = 3600.0  # of a connection
WAITING = 8  # messages sent ahead of their turn
# of the handshake: they say nothing about a turn
HOP = (b"connection", b"upgrade", b"content-length", b"content-type", b"idempotency-key", b"transfer-encoding")
ENDS = tuple(b"event: response." + how for how in (b"completed", b"incomplete", b"failed"))
TOLD = ("retry-after", "x-should-retry", "x-request-id")  # of a refusal
_decoder = msgspec.json.Decoder(dict[str, Any])


def beside(app: ASGIApp, state: ServiceState) -> ASGIApp:
    """`app`, and the socket next to it."""

    def either(scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        if scope["type"] == "websocket" and scope["path"] == PATH:
            return _connection(app, state, scope, receive, send)
        return app(scope, receive, send)

    return either


async def _connection(app: ASGIApp, state: ServiceState, scope: Scope, receive: Receive, send: Send) -> None:
    socket = WebSocket(scope, receive, send)
    try:
        await look_up(state, scope)
        authenticate(state, socket)
    except Exception as exception:
        request_id = record.new_id()
        await socket.send_denial_response(failure(as_api_error(exception, request_id), request_id, anthropic=False))
        return
    await socket.accept()
    asked: asyncio.Queue[str | None] = asyncio.Queue(WAITING)
    left = asyncio.Event()
    reader = asyncio.create_task(_read(socket, asked, left))
    try:
        await _turns(app, scope, socket, asked, left)
    except (WebSocketDisconnect, RuntimeError):  # it left while it was told something
        pass
    finally:
        reader.cancel()


async def _read(socket: WebSocket, asked: asyncio.Queue[str | None], left: asyncio.Event) -> None:
    """Reads ahead, to see the client leave in the middle of a turn."""
    while (message := await socket.receive())["type"] != "websocket.disconnect":
        await asked.put(message.get("text") or (message.get("bytes") or b"").decode("utf-8", "replace"))
    left.set()
    while asked.full():  # nobody waits for what it still asked
        asked.get_nowait()
    asked.put_nowait(None)


async def _turns(
    app: ASGIApp, scope: Scope, socket: WebSocket, asked: asyncio.Queue[str | None], left: asyncio.Event
) -> None:
    here: Here = {}
    loop = asyncio.get_running_loop()
    end = loop.time() + LONGEST_S
    while not left.is_set():
        try:
            async with asyncio.timeout_at(end):
                text = await asked.get()
        except TimeoutError:
            over = errors.invalid_request(f"a connection lasts {LONGEST_S:.0f} s; open another",
                                          code="websocket_connection_limit_reached")  # fmt: skip
            await socket.send_text(_envelope(over.status, over.body()))
            await socket.close()
            return
        if text is None:
            return
        turn = _Turn(socket, left)
        previous: Any = None
        try:
            body = _created(text)
            previous = body.get("previous_response_id")
            inner = _request(scope)
            token = HERE.set(here)
            try:
                await app(inner, turn.receive_of(wire.encode(body)), turn.send)
            finally:
                HERE.reset(token)
            await turn.end()
            if not turn.over:  # it has left, or does not read: a farewell would wait for it too
                return
        except ApiError as error:
            await socket.send_text(_envelope(error.status, error.body()))
            turn.failed = True
        if turn.failed and isinstance(previous, str):
            here.pop(previous, None)


def _created(text: str) -> dict[str, Any]:
    """The body for the HTTP API. Raises a 400."""
    given = wire.decode(text.encode(), _decoder)
    if given.get("type") != "response.create":
        raise errors.invalid_request("a message is an object whose type is response.create", "type")
    if given.get("background"):
        raise errors.invalid_request("a response on a connection is not one in the background", "background")
    return {k: v for k, v in given.items() if k not in ("type", "stream", "stream_options")} | {"stream": True}


def _request(scope: Scope) -> Scope:
    """A fresh HTTP request by the one who opened the connection."""
    headers = [(k, v) for k, v in scope["headers"] if k not in HOP and not k.startswith(b"sec-websocket")]
    return {
        "type": "http", "asgi": scope["asgi"], "http_version": "1.1", "method": "POST", "scheme": "http", "path": PATH,
        "raw_path": PATH.encode(), "query_string": b"", "root_path": scope.get("root_path", ""), "headers": headers,
        "client": scope.get("client"), "server": scope.get("server"), "state": scope.get("state", {}),
    }  # fmt: skip


class _Turn:
    """Both ends of the request within: its answer goes out as messages."""

    def __init__(self, socket: WebSocket, left: asyncio.Event) -> None:
        self._socket, self._left = socket, left
        self._status, self._headers = 0, {}
        self._held = b""
        self.failed = self.over = False  # over: its sender was told how it ended

    def receive_of(self, body: bytes) -> Receive:
        given: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            if given:
                return given.pop()
            await self._left.wait()
            return {"type": "http.disconnect"}

        return receive

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            self._headers = {k.decode(): v.decode() for k, v in message.get("headers", ())}
            self.failed = self._status >= 400
            return
        self._held += message.get("body", b"")
        while not self.failed and b"\n\n" in self._held:
            frame, _, self._held = self._held.partition(b"\n\n")
            await self._say(frame)

    async def _say(self, frame: bytes) -> None:
        """Only what has a name: no comments, no [DONE], no second telling of a failure."""
        name, _, data = frame.partition(b"\ndata: ")
        if name.startswith(b"event: "):
            self.failed |= name == b"event: response.failed"
            try:
                await self._socket.send_text(data.decode())
            except (WebSocketDisconnect, RuntimeError):  # it has left; as over HTTP, that is for `receive` to tell
                self._left.set()
            self.over |= name in ENDS
            if self.failed:
                self._held = b""

    async def end(self) -> None:
        """Tells of a request that was refused."""
        if self._status >= 400:
            await self._socket.send_text(_envelope(self._status, msgspec.json.decode(self._held), self._headers))
            self.over = True


def _envelope(status: int, body: dict[str, Any], headers: Mapping[str, str] | None = None) -> str:
    error = body["error"]
    told = {name: value for name, value in (headers or {}).items() if name in TOLD}
    error = error | {"code": error.get("code") or error["type"]}
    return wire.to_json({"type": "error", "status": status, "error": error, "headers": told})
