"""The HTTP routes and the service's background life: recover holds at start, sweep expired ones while running."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.routing import Route
from starlette.types import ASGIApp

from tidelock.service import errors, wire
from tidelock.service.auth import authenticate
from tidelock.service.endpoint import Endpoint
from tidelock.service.http import Handler, Json, unknown_route
from tidelock.service.prices import format_usd
from tidelock.service.state import ServiceState
from tidelock.service.surfaces.chat import Chat
from tidelock.tokens.errors import UserError
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

    def get(path: str, handler: Handler) -> Route:
        return Route(path, Json(state, handler), methods=["GET"])

    def post(path: str, handler: Handler) -> Route:
        return Route(path, Json(state, handler), methods=["POST"])

    return Starlette(
        routes=[
            Route("/v1/chat/completions", Endpoint(state, Chat), methods=["POST"]),
            get("/v1/models", models),
            get("/v1/users/me/balance", balance),
            post("/v1/feedback", feedback),
            post("/admin/weights", swap_weights),
            get("/health", health),
        ],
        exception_handlers={HTTPException: unknown_route},
        lifespan=_lifespan(state),
    )


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
    return {
        "status": "ok",
        "model": state.model,
        "weights_version": state.weights_version,
        "exact": state.policy.exact,
    }


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
