"""The HTTP routes and the service's background life: recover holds at start, sweep expired ones while running."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from tidelock.service import errors, tokens_api, wire
from tidelock.service.auth import authenticate
from tidelock.service.completions import ChatCompletions
from tidelock.service.errors import ApiError
from tidelock.service.metrics import CONTENT_TYPE, counting
from tidelock.service.prices import format_usd
from tidelock.service.state import ServiceState
from tidelock.tokens.errors import UserError
from tidelock.tokens.policy import PolicyError
from tidelock.tokens.trace import Outcome

log = logging.getLogger(__name__)


class Feedback(msgspec.Struct):
    node: str
    success: bool
    reward: float
    source: str
    request: str | None = None
    steps: tuple[str, ...] = ()


class Weights(msgspec.Struct):
    checkpoint: str
    version: int


_feedback = msgspec.json.Decoder(Feedback)
_weights = msgspec.json.Decoder(Weights)


def create_app(state: ServiceState) -> ASGIApp:
    """The ASGI application. Only one server may run on a directory: its start-up releases every open hold."""

    def get(path: str, handler: Callable[[ServiceState, Request], Awaitable[Any]]) -> Route:
        return Route(path, _json_endpoint(state, handler), methods=["GET"])

    def post(path: str, handler: Callable[[ServiceState, Request], Awaitable[Any]]) -> Route:
        return Route(path, _json_endpoint(state, handler), methods=["POST"])

    def metrics(request: Request) -> Response:
        return Response(state.metrics.text(), media_type=CONTENT_TYPE)

    app = Starlette(
        routes=[
            Route("/v1/chat/completions", ChatCompletions(state), methods=["POST"]),
            get("/v1/models", models),
            get("/v1/users/me/balance", balance),
            post("/v1/feedback", feedback),
            post("/admin/weights", swap_weights),
            get("/health", health),
            *tokens_api.routes(state, get, post),
            Route("/metrics", metrics, methods=["GET"]),
        ],
        exception_handlers={HTTPException: _http_exception},
        lifespan=_lifespan(state),
    )
    return counting(app, state.metrics)


async def models(state: ServiceState, request: Request) -> dict[str, Any]:
    authenticate(state, request)
    model = {
        "id": state.model,
        "object": "model",
        "created": 0,
        "owned_by": "tidelock",
        "context_length": state.context_length,
        "supports_reasoning": True,
    }
    return {"object": "list", "data": [model]}


async def balance(state: ServiceState, request: Request) -> dict[str, Any]:
    """Kimi's shape; the amounts are JSON numbers in USD with every nano digit written out."""
    key = authenticate(state, request)
    nano_usd = state.ledger.balance(key.customer)
    available = msgspec.Raw(format_usd(nano_usd).encode())
    data = {
        "available_balance": available,
        "voucher_balance": 0,
        "cash_balance": available,
        "available_nano_usd": nano_usd,
    }
    return {"code": 0, "scode": "0x0", "status": True, "data": data}


async def feedback(state: ServiceState, request: Request) -> dict[str, Any]:
    """Appends an outcome to an answer of the same key. The same feedback again changes nothing."""
    key = authenticate(state, request)
    given = wire.decode(await request.body(), _feedback)
    for named in (given.node, *([given.request] if given.request else []), *given.steps):
        node = state.traces.get(named)
        if node is None or not node.scope.startswith(f"{key.id}/"):
            raise errors.not_found(f"no answer {named!r} was given to this key", "node")
    outcome = Outcome(given.node, given.success, given.reward, given.source, given.request, given.steps)
    recorded = outcome not in state.traces.outcomes(given.node)
    if recorded:
        state.traces.add_outcome(outcome)
    return {"object": "feedback", "node": given.node, "recorded": recorded}


async def swap_weights(state: ServiceState, request: Request) -> dict[str, Any]:
    """Loads other weights under live traffic; on failure the old ones keep serving."""
    authenticate(state, request, role="admin")
    weights = wire.decode(await request.body(), _weights)
    try:
        await state.policy.swap(weights.checkpoint, weights.version)
    except UserError as error:
        raise errors.invalid_request(str(error), "checkpoint") from error
    state.weights_version = weights.version
    return {"weights_version": weights.version}


async def health(state: ServiceState, request: Request) -> dict[str, Any]:
    numerics = getattr(state.policy, "exactness", None)  # what an engine's self-test found at its start
    return {
        "status": "ok",
        "model": state.model,
        "weights_version": state.weights_version,
        "exact": state.policy.exact,
        **({"numerics": numerics.numerics, "max_abs_dlogp": numerics.max_abs_dlogp} if numerics else {}),
    }


def _json_endpoint(
    state: ServiceState, handler: Callable[[ServiceState, Request], Awaitable[Any]]
) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        request_id = f"req_{uuid.uuid4().hex}"
        headers = {"x-request-id": request_id, "request-id": request_id}
        try:
            return Response(wire.encode(await handler(state, request)), 200, headers, "application/json")
        except PolicyError as failure:
            error = errors.policy_failed(str(failure), failure.status, failure.kind)
        except ApiError as failure:
            error = failure
        except Exception:
            log.exception("%s failed", request_id)
            error = errors.internal()
        return Response(wire.encode(error.body()), error.status, {**error.headers(), **headers}, "application/json")

    return endpoint


async def _http_exception(request: Request, exception: HTTPException) -> Response:
    """Starlette's own 404 and 405, in the shape API clients parse."""
    reason = f"{exception.detail}: {request.method} {request.url.path}"
    kind = "resource_not_found_error" if exception.status_code == 404 else "invalid_request_error"
    error = ApiError(exception.status_code, kind, reason)
    return Response(wire.encode(error.body()), error.status, exception.headers, "application/json")


def _lifespan(state: ServiceState) -> Callable[[Any], Any]:
    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        released = state.ledger.recover()
        if released:
            log.warning("released %d holds of requests that died with the last server", released)
        sweeper = asyncio.create_task(_sweep(state))
        try:
            yield
        finally:
            sweeper.cancel()

    return lifespan


async def _sweep(state: ServiceState) -> None:
    while True:
        await asyncio.sleep(state.sweep_interval_s)
        try:
            state.ledger.sweep()
        except Exception:
            log.exception("the sweeper failed; it will try again")
