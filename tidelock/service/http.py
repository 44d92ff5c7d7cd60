"""What every route shares on the wire: request ids, bounded bodies, JSON answers, errors in the client's dialect."""

from __future__ import annotations

import errno
import logging
import re
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from tidelock.service import errors, record, wire
from tidelock.service.accounts import UnknownId
from tidelock.service.auth import authenticate, look_up
from tidelock.service.db import StorageDown, Unstorable
from tidelock.service.errors import ApiError
from tidelock.service.replay import Recorder
from tidelock.service.state import ServiceState
from tidelock.service.wire import header
from tidelock.tokens.policy import PolicyError

log = logging.getLogger(__name__)

Handler = Callable[[ServiceState, Request], Awaitable[Any]]
JSON = "application/json"


def id_headers(request_id: str) -> dict[str, str]:
    """Under the name each client reads: OpenAI's, Anthropic's, Kimi's."""
    return {"x-request-id": request_id, "request-id": request_id, "msh-request-id": request_id}


def speaks_anthropic(request: Request) -> bool:
    path = request.url.path
    return path.startswith(("/anthropic/", "/v1/messages")) or "anthropic-version" in request.headers


def is_lenient(state: ServiceState, request: Request | None) -> bool:
    """As this request asks (`x-tidelock-profile: lenient` or `strict`), else as its key says, else as the server is set."""
    if request is None:
        return state.lenient
    key = request.scope.get("tidelock.key")
    asked = header(request.scope, b"x-tidelock-profile") or (key.profile if key else "")
    return asked == "lenient" if asked in ("lenient", "strict") else state.lenient


async def read_body(request: Request, limit: int) -> bytes:
    """Raises ApiError (413) before more than `limit` bytes are held."""
    return await received(request.scope, request.receive, limit)


async def received(scope: Scope, receive: Receive, limit: int) -> bytes:
    """As `read_body`. Raises ClientDisconnect too."""
    declared = header(scope, b"content-length")
    if declared.isdigit() and int(declared) > limit:
        raise errors.too_large(limit)
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        part, more = message.get("body", b""), message.get("more_body", False)
        size += len(part)
        if size > limit:
            raise errors.too_large(limit)
        parts.append(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def bounded(receive: Receive, limit: int) -> Receive:
    """The same, but it raises ApiError (413) once more than `limit` bytes came: for bodies that are read as a stream, which
    need not say how long they are."""
    size = 0

    async def counted() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > limit:
            raise errors.too_large(limit)
        return message

    return counted


def failure(error: ApiError, request_id: str, anthropic: bool) -> Response:
    headers = {**error.headers(), **id_headers(request_id)}
    status, body = error.anthropic(request_id) if anthropic else (error.status, error.body())
    return Response(wire.encode(body), status, headers, JSON)

STUBBORN = re.compile(r"ai-sdk/|^QwenCode/|^[\w$]{1,3}/JS ")


def for_client(error: ApiError, request: Request) -> ApiError:
    """Some programs try every 429 again and ask no header whether they should: what is made of the AI SDK (OpenCode), Qwen
    Code, and Continue, ten times (the last is known by the name that its packing left of OpenAI's client). Their users
    without money are told 402, which they do not try again; all others get Kimi's 429."""
    if error.kind == "exceeded_current_quota_error" and STUBBORN.search(request.headers.get("user-agent", "")):
        error.status = 402
    return error


def as_api_error(exception: Exception, request_id: str) -> ApiError:
    """What the client is told. Only the unexpected is logged, and never with what was asked or who asked."""
    error = _as_api_error(exception, request_id)
    if (now := record.current()) is not None:
        now.failed(error.code or error.kind)
    return error


def _as_api_error(exception: Exception, request_id: str) -> ApiError:
    if isinstance(exception, ApiError):
        return exception
    if isinstance(exception, PolicyError):
        return errors.policy_failed(str(exception), exception.status, exception.kind)
    if isinstance(exception, UnknownId):
        return errors.not_found(str(exception), "id")
    if isinstance(exception, Unstorable):
        return errors.invalid_request(str(exception))
    if isinstance(exception, StorageDown):
        log.warning("%s: %s", request_id, exception)
        return errors.storage_down()
    if isinstance(exception, OSError) and exception.errno in (errno.ENOSPC, errno.EDQUOT):
        log.error("%s: %s", request_id, exception.strerror)
        return errors.storage_down()
    log.error("%s failed", request_id, exc_info=exception)
    return errors.internal()


class Json:
    """An ASGI endpoint over a handler that returns what is to be encoded, or a Response of its own. `once`: what it does
    costs money, so an `Idempotency-Key` counts."""

    def __init__(self, state: ServiceState, handler: Handler, once: bool = False) -> None:
        self._state, self._handler, self._once = state, handler, once

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        name = header(scope, b"idempotency-key") if self._once else ""
        if not name:
            await self._answer(scope, receive, send, send)
            return
        request_id = record.request_id()
        request = Request(scope, receive)
        recorder: Recorder | None = None
        try:
            await look_up(self._state, scope)
            key = authenticate(self._state, request, "")
            body = await received(scope, receive, self._state.max_body_bytes)
            recorder = Recorder(self._state.idempotency, key.customer, name, request_id, send)
            if not await recorder.replay(scope["path"].encode() + b"\n" + body):
                await self._answer(scope, _again(body, receive), recorder, send)
        except ClientDisconnect:
            return
        except Exception as exception:
            failed = failure(as_api_error(exception, request_id), request_id, speaks_anthropic(request))
            await failed(scope, receive, send)
        finally:
            if recorder is not None:
                await recorder.end()

    async def _answer(self, scope: Scope, receive: Receive, send: Send, refuse: Send) -> None:
        """`refuse`: where a failure goes; none is remembered."""
        request_id = record.request_id()
        request = Request(scope, receive)
        try:
            await look_up(self._state, scope)
            answer = await self._handler(self._state, request)
            if isinstance(answer, Response):
                response = answer
                response.headers.update(id_headers(request_id))
            else:
                response = Response(wire.encode(answer), 200, id_headers(request_id), JSON)
        except ClientDisconnect:
            return
        except Exception as exception:
            response, send = failure(as_api_error(exception, request_id), request_id, speaks_anthropic(request)), refuse
        await response(scope, receive, send)


def _again(body: bytes, receive: Receive) -> Receive:
    """A body that was read already, and then what comes after it."""
    left: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def told() -> Message:
        return left.pop() if left else await receive()

    return told


async def unknown_route(request: Request, exception: HTTPException) -> Response:
    """The router's own 404 and 405, in the shape API clients parse."""
    kind = "resource_not_found_error" if exception.status_code == 404 else "invalid_request_error"
    error = as_api_error(ApiError(exception.status_code, kind, f"{exception.detail}: {request.method} {request.url.path}"), "")
    response = failure(error, record.request_id(), speaks_anthropic(request))
    response.headers.update(exception.headers or {})
    return response
