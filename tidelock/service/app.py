"""The HTTP routes of the service. Its background life is in `upkeep`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from tidelock.service import batch_worker, console, detached, errors, openapi, tokens_api, upkeep, wire
from tidelock.service.access import watched
from tidelock.service.analytics.endpoint import analytics
from tidelock.service.auth import authenticate
from tidelock.service.http import Handler, Json, read_body, unknown_route
from tidelock.service.metrics import CONTENT_TYPE
from tidelock.service.reconciliation.endpoint import reconciliation
from tidelock.service.scrape import scrape
from tidelock.service.state import ServiceState
from tidelock.service.surfaces import billing, operator, responses_socket
from tidelock.service.surfaces.routes import ROUTES, routes
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
    """The ASGI application. Several may share a database: each settles only the holds of those that died."""
    app = Starlette(
        routes=every_route(state), exception_handlers={HTTPException: unknown_route}, lifespan=_lifespan(state)
    )
    return responses_socket.beside(watched(_hot(app, state), state), state)


def every_route(state: ServiceState) -> list[BaseRoute]:
    """The published ones and those that are not for customers' clients."""

    def get(path: str, handler: Handler) -> Route:
        return Route(path, Json(state, handler), methods=["GET"])

    def post(path: str, handler: Handler) -> Route:
        return Route(path, Json(state, handler), methods=["POST"])

    async def metrics(request: Request) -> Response:
        return Response(await scrape(state.metrics, state.member), media_type=CONTENT_TYPE)

    return [
        *routes(state),
        post("/v1/feedback", feedback),
        post("/admin/weights", swap_weights),
        post("/webhooks/payments", billing.webhook),
        get("/admin/analytics", analytics),
        get("/admin/reconciliation", reconciliation),
        get("/health", health),
        get("/openapi.json", published),
        *tokens_api.routes(state, get, post),
        Route("/metrics", metrics, methods=["GET"]),
        *operator.routes(state),
        *console.routes(),
    ]


def _hot(app: ASGIApp, state: ServiceState) -> ASGIApp:
    """Inference goes straight to its endpoint; everything else through Starlette's router and middleware."""
    endpoints = {route.path: route.endpoint(state) for route in ROUTES if isinstance(route.answers, type)}

    async def routed(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST" and (endpoint := endpoints.get(scope["path"])):
            scope["endpoint"] = endpoint
            await endpoint(scope, receive, send)
        else:
            await app(scope, receive, send)

    return routed


async def feedback(state: ServiceState, request: Request) -> dict[str, Any]:
    """Appends an outcome to an answer of the same key. The same feedback again changes nothing."""
    key = authenticate(state, request)
    given = wire.decode(await read_body(request, state.max_body_bytes), _feedback)
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
    weights = wire.decode(await read_body(request, state.max_body_bytes), _weights)
    if state.member is not None and state.member.size > 1:
        raise errors.invalid_request("this server has several workers, each with weights of its own: restart it instead")
    try:
        await state.policy.swap(weights.checkpoint, weights.version)
    except UserError as error:
        raise errors.invalid_request(str(error), "checkpoint") from error
    state.weights_version = weights.version
    return {"weights_version": weights.version}


async def health(state: ServiceState, request: Request) -> dict[str, Any]:
    numerics = getattr(state.policy, "exactness", None)  # what an engine's self-test found at its start
    routed = getattr(state.policy, "health", None)  # a pool's upstreams
    return {
        "status": "ok",
        "model": state.model,
        "weights_version": state.weights_version,
        "exact": state.policy.exact,
        **(asdict(numerics) if numerics else {}),
        **(routed() if routed else {}),
    }


async def published(state: ServiceState, request: Request) -> dict[str, Any]:
    return openapi.document(state.model, state.lenient)


def _lifespan(state: ServiceState) -> Callable[[Any], Any]:
    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        await asyncio.to_thread(upkeep.recover, state)
        sweeper = asyncio.create_task(upkeep.run(state))
        batches = asyncio.create_task(batch_worker.work(state))
        slowly = asyncio.create_task(upkeep.slowly(state))
        own = getattr(state.policy, "run", None)  # a pool looks after its upstreams
        watching = [asyncio.create_task(own())] if own else []
        try:
            yield
        finally:
            for task in (sweeper, batches, slowly, *watching):
                task.cancel()
            await asyncio.gather(batches, slowly, *watching, return_exceptions=True)
            await detached.stop(state)
            await asyncio.to_thread(upkeep.leave, state)

    return lifespan
