"""What every route shares on the wire: request ids, bounded bodies, JSON answers, errors in the client's dialect."""

from __future__ import annotations

import logging
import re
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tidelock.service import errors, record, wire
from tidelock.service.accounts import UnknownId
from tidelock.service.auth import look_up
from tidelock.service.db import StorageDown
from tidelock.service.errors import ApiError
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
    if isinstance(exception, StorageDown):
        log.warning("%s: %s", request_id, exception)
        return errors.storage_down()
    log.error("%s failed", request_id, exc_info=exception)
    return errors.internal()


class Json:
    """An ASGI endpoint over a handler that returns what is to be encoded, or a Response of its own."""

    def __init__(self, state: ServiceState, handler: Handler) -> None:
        self._state, self._handler = state, handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
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
            response = failure(as_api_error(exception, request_id), request_id, speaks_anthropic(request))
        await response(scope, receive, send)


async def unknown_route(request: Request, exception: HTTPException) -> Response:
    """The router's own 404 and 405, in the shape API clients parse."""
    kind = "resource_not_found_error" if exception.status_code == 404 else "invalid_request_error"
    error = as_api_error(ApiError(exception.status_code, kind, f"{exception.detail}: {request.method} {request.url.path}"), "")
    response = failure(error, record.request_id(), speaks_anthropic(request))
    response.headers.update(exception.headers or {})
    return response
