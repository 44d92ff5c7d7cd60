"""Token-level routes, vLLM's contract: ids in and out, and steering the engine while weights change.

They are for the operator and the trainer: only keys with role admin may call them, because raw ids can spell what a
template would never let a user say. For the same reason they are counted in the metrics but not billed and not traced.
Where the policy cannot be paused (another text endpoint, say) the steering routes answer 501.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from tidelock.service import errors, tokens_wire, wire
from tidelock.service.auth import authenticate
from tidelock.service.errors import ApiError
from tidelock.service.http import Handler, as_api_error, read_body
from tidelock.service.state import ServiceState
from tidelock.service.tokens_wire import Generate, Output
from tidelock.tokens.errors import UserError
from tidelock.tokens.policy import SamplingParams

log = logging.getLogger(__name__)

Routed = Callable[[str, Handler], Route]
Write = Callable[..., Awaitable[None]]
PREFIX = "generate-tokens-"  # vLLM puts it before the request id it was given


class AbortRequests(msgspec.Struct):
    request_ids: list[str] | None = None


class UpdateWeights(msgspec.Struct):
    update_info: dict[str, Any]


class FinishUpdate(msgspec.Struct):
    weight_version: str | int | None = None


_abort, _update, _finish = (msgspec.json.Decoder(t) for t in (AbortRequests, UpdateWeights, FinishUpdate))


def routes(state: ServiceState, get: Routed, post: Routed) -> list[Route]:
    """All of them; `get` and `post` make a route of a JSON handler."""
    tokens = Tokens(state)
    return [
        Route("/inference/v1/generate", tokens, methods=["POST"]),
        post("/inference/v1/abort_requests", tokens.abort),
        post("/abort_requests", tokens.abort),
        post("/pause", pause),
        post("/resume", resume),
        get("/is_paused", is_paused),
        *Update().routes(get, post),
    ]


class Tokens:
    """`POST /inference/v1/generate`, as a raw ASGI endpoint so that it sees the client leave."""

    def __init__(self, state: ServiceState) -> None:
        self._state = state
        self._running: set[str] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request, started, name = Request(scope, receive), False, PREFIX + uuid.uuid4().hex

        async def write(data: bytes, more: bool = True) -> None:
            nonlocal started
            if not started:
                started = True
                headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
                await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": data, "more_body": more})

        try:
            key = authenticate(self._state, request, role="admin")
            asked = wire.decode(await read_body(request, self._state.max_body_bytes), tokens_wire.decoder)
            params = self._params(asked, key.customer)
            if given := request.headers.get("x-request-id") or asked.request_id:
                name = PREFIX + given
            async with self._tracked(name, receive):
                if asked.stream:
                    await self._stream(asked, params, name, write)
                else:
                    body = await self._whole(asked, params, name)
                    await Response(wire.encode(body), media_type="application/json")(scope, receive, send)
        except ClientDisconnect:
            log.info("the client left before its request was read")
        except Exception as failure:
            error = as_api_error(failure, name)
            if started:
                await write(wire.event(error.body()) + wire.DONE, more=False)  # as vLLM ends it
            else:
                answer = Response(wire.encode(error.body()), error.status, error.headers(), "application/json")
                await answer(scope, receive, send)

    def _params(self, asked: Generate, tenant: str) -> SamplingParams:
        state = self._state
        if asked.model is not None and asked.model != state.model:
            raise errors.not_found(f"no model {asked.model!r} here; /v1/models lists them", "model", "model_not_found")
        room = state.context_length - len(asked.token_ids)
        if room < (asked.sampling_params.max_tokens or 1):
            reason = (f"{len(asked.token_ids)} token_ids and max_tokens {asked.sampling_params.max_tokens or 1} "
                      f"exceed the context of {state.context_length}")  # fmt: skip
            raise errors.invalid_request(reason, "token_ids", "context_length_exceeded")
        return tokens_wire.to_params(asked, room=room, stop_ids=tuple(state.template.stop_ids), tenant=tenant)

    @asynccontextmanager
    async def _tracked(self, name: str, receive: Receive) -> AsyncIterator[None]:
        """Known to /abort_requests, and aborted when its client leaves."""

        async def abort_on_disconnect() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            await self._state.policy.abort(name)

        self._running.add(name)
        watcher = asyncio.create_task(abort_on_disconnect())
        try:
            yield
        finally:
            watcher.cancel()
            self._running.discard(name)

    async def _whole(self, asked: Generate, params: SamplingParams, name: str) -> dict[str, Any]:
        output = _output(asked)
        async with aclosing(self._state.policy.generate(asked.token_ids, params, name)) as chunks:
            async for chunk in chunks:
                output.add(chunk)
        return {
            "request_id": name,
            "model": self._state.model,
            "created": int(time.time()),
            "usage": tokens_wire.usage(len(asked.token_ids), output),
            "prompt_logprobs": None,
            "prompt_token_ids": asked.token_ids if asked.return_token_ids else None,
            "output_mode": "tokens",
            "choices": [output.whole()],
            **tokens_wire.timed(output),
        }

    async def _stream(self, asked: Generate, params: SamplingParams, name: str, write: Write) -> None:
        output, options = _output(asked), asked.stream_options
        head = {"request_id": name, "output_mode": "tokens", "usage": None}
        first = {"prompt_token_ids": asked.token_ids} if asked.return_token_ids else {}
        async with aclosing(self._state.policy.generate(asked.token_ids, params, name)) as chunks:
            async for chunk in chunks:
                event = {**head, "choices": [output.add(chunk)], **first}
                first = {}
                if options and options.continuous_usage_stats:
                    event["usage"] = tokens_wire.usage(len(asked.token_ids), output)
                await write(wire.event(event))
        last = b""
        if options and options.include_usage:
            used = tokens_wire.usage(len(asked.token_ids), output)
            last = wire.event({**head, "choices": [], "usage": used, **tokens_wire.timed(output)})
        await write(last + wire.DONE, more=False)

    async def abort(self, state: ServiceState, request: Request) -> dict[str, Any]:
        """The named requests, or all that came through this route. Their streams end with "abort"."""
        authenticate(state, request, role="admin")
        body = await read_body(request, state.max_body_bytes)
        asked = wire.decode(body, _abort).request_ids if body else None
        names = {i if i.startswith(PREFIX) else PREFIX + i for i in asked} & self._running if asked else set(self._running)
        for name in names:
            await state.policy.abort(name)
        return {"status": "aborted", "aborted": len(names)}


def _output(asked: Generate) -> Output:
    s = asked.sampling_params
    return Output(s.logprobs is not None, tuple(s.stop_token_ids or ()))


# -- steering -------------------------------------------------------------------------------------------------------------


def _steered(state: ServiceState, what: str) -> Callable[..., Awaitable[None]]:
    method = getattr(state.policy, what, None)
    if method is None:
        raise ApiError(501, "not_supported_error", f"the policy behind this server cannot {what}")
    return method


async def pause(state: ServiceState, request: Request) -> dict[str, Any]:
    """?mode=abort (default) | wait | keep: end running requests, let them finish, or freeze them where they are."""
    authenticate(state, request, role="admin")
    mode = request.query_params.get("mode", "abort")
    if mode not in ("abort", "wait", "keep"):
        raise errors.invalid_request(f"unknown pause mode {mode!r}; use abort, wait or keep", "mode")
    await _steered(state, "pause")(mode)
    return {"status": "paused"}


async def resume(state: ServiceState, request: Request) -> dict[str, Any]:
    authenticate(state, request, role="admin")
    await _steered(state, "resume")()
    return {"status": "resumed"}


async def is_paused(state: ServiceState, request: Request) -> dict[str, Any]:
    authenticate(state, request, role="admin")
    return {"is_paused": bool(getattr(state.policy, "paused", False))}


@dataclass
class Update:
    """One weight update: start, name the checkpoint, finish. The weights are loaded and swapped at the finish, which
    is where vLLM names their version; if that fails the old ones keep serving and the update has to start again."""

    open: bool = False
    checkpoint: str | None = None

    def routes(self, get: Routed, post: Routed) -> list[Route]:
        return [
            post("/init_weight_transfer_engine", self.init),
            post("/start_weight_update", self.start),
            post("/update_weights", self.update),
            post("/finish_weight_update", self.finish),
            get("/weight_info", self.info),
        ]

    async def init(self, state: ServiceState, request: Request) -> dict[str, Any]:
        """Nothing to set up: weights come as checkpoints on a disk both sides see."""
        authenticate(state, request, role="admin")
        return {"message": "Weight transfer initialized"}

    async def start(self, state: ServiceState, request: Request) -> dict[str, Any]:
        authenticate(state, request, role="admin")
        self.open, self.checkpoint = True, None  # whatever a trainer that died had begun is forgotten
        return {"message": "Weight update started"}

    async def update(self, state: ServiceState, request: Request) -> dict[str, Any]:
        authenticate(state, request, role="admin")
        info = wire.decode(await read_body(request, state.max_body_bytes), _update).update_info
        if not self.open:
            raise errors.invalid_request("no weight update is under way; call /start_weight_update first")
        if not isinstance(info.get("checkpoint"), str):
            reason = 'weights are read from a checkpoint directory: {"update_info": {"checkpoint": PATH}}'
            raise errors.invalid_request(reason, "update_info.checkpoint")
        self.checkpoint = info["checkpoint"]
        return {"message": "Weights updated"}

    async def finish(self, state: ServiceState, request: Request) -> dict[str, Any]:
        authenticate(state, request, role="admin")
        body = await read_body(request, state.max_body_bytes)
        wanted = wire.decode(body, _finish).weight_version if body else None
        if not self.open:
            raise errors.invalid_request("no weight update is under way; call /start_weight_update first")
        version = self._version(state, wanted)
        checkpoint, self.open = self.checkpoint, False
        if checkpoint is None:
            raise errors.invalid_request("this update named no weights; call /update_weights before finishing")
        try:
            await state.policy.swap(checkpoint, version)
        except UserError as error:
            raise errors.invalid_request(str(error), "update_info.checkpoint") from error
        state.weights_version = version
        return {"message": "Weight update finished"}

    def _version(self, state: ServiceState, wanted: str | int | None) -> int:
        try:
            return state.weights_version + 1 if wanted is None else int(wanted)
        except ValueError:
            reason = f"weight_version must be a whole number here, not {wanted!r}"
            raise errors.invalid_request(reason, "weight_version") from None

    async def info(self, state: ServiceState, request: Request) -> dict[str, Any]:
        authenticate(state, request, role="admin")
        return {"weight_version": str(state.weights_version)}
