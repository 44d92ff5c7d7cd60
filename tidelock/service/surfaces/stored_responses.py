"""Stored responses: read, delete, list what they were asked; and the count of a request's input before it is made."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import StreamingResponse

from tidelock.service import detached, run, wire
from tidelock.service.auth import authenticate
from tidelock.service.errors import invalid_request
from tidelock.service.http import is_lenient, read_body
from tidelock.service.state import ServiceState
from tidelock.service.surfaces import files
from tidelock.service.surfaces.account import whole
from tidelock.service.surfaces.responses_items import KIND
from tidelock.service.surfaces.responses_request import InputTokensRequest, to_ask
from tidelock.tokens.policy import SamplingParams

_decoder = msgspec.json.Decoder(InputTokensRequest)


async def count(state: ServiceState, request: Request) -> dict[str, Any]:
    """`POST /v1/responses/input_tokens`"""
    key = authenticate(state, request)
    body = wire.decode(await read_body(request, state.max_body_bytes), _decoder)
    ask = to_ask(state, key, body, SamplingParams(), is_lenient(state, request))
    return {"object": "response.input_tokens", "input_tokens": await run.count_tokens(state, key, ask)}


async def retrieve(state: ServiceState, request: Request) -> Any:
    """With `stream`, the events of a response in the background, from behind the one with the number `starting_after` on."""
    key = authenticate(state, request)
    response_id = request.path_params["id"]
    response = state.objects.get(KIND, key.customer, response_id)["response"]
    if request.query_params.get("stream") not in ("true", "True", "1"):
        if response["background"] and response["status"] != "in_progress":
            await detached.traced(state, response_id)
        return response
    if not await detached.streamed(state, response_id):
        reason = "only a response that was created with background: true and stream: true can be streamed, for an hour"
        raise invalid_request(reason, "stream")
    after = whole(request.query_params.get("starting_after"), "starting_after", 0, 2**53)
    events = detached.follow(state, response_id, -1 if after is None else after)
    return StreamingResponse(events, media_type="text/event-stream; charset=utf-8", headers={"cache-control": "no-store"})


async def delete(state: ServiceState, request: Request) -> dict[str, Any]:
    key = authenticate(state, request)
    response_id = request.path_params["id"]
    if state.objects.get(KIND, key.customer, response_id)["response"]["background"]:
        await detached.forget(state, response_id)
    state.objects.delete(KIND, key.customer, response_id)
    return {"id": response_id, "object": "response", "deleted": True}


async def cancel(state: ServiceState, request: Request) -> Any:
    """Again and again, or too late: what it came to is the answer."""
    key = authenticate(state, request)
    response_id = request.path_params["id"]
    stored = state.objects.get(KIND, key.customer, response_id)["response"]
    if not stored["background"]:
        raise invalid_request("only a response that was created with background: true can be cancelled", "id")
    if stored["status"] != "in_progress":
        return stored
    await detached.cancel(state, response_id)
    return state.objects.get(KIND, key.customer, response_id)["response"]


async def input_items(state: ServiceState, request: Request) -> dict[str, Any]:
    key = authenticate(state, request)
    return files.page_of(request, state.objects.get(KIND, key.customer, request.path_params["id"])["input"])
