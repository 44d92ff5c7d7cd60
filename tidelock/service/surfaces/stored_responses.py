"""Stored responses: read, delete, list what they were asked; and the count of a request's input before it is made."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.requests import Request

from tidelock.service import run, wire
from tidelock.service.auth import authenticate
from tidelock.service.errors import invalid_request
from tidelock.service.http import is_lenient, read_body
from tidelock.service.state import ServiceState
from tidelock.service.surfaces import files
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
    key = authenticate(state, request)
    return state.objects.get(KIND, key.customer, request.path_params["id"])["response"]


async def delete(state: ServiceState, request: Request) -> dict[str, Any]:
    key = authenticate(state, request)
    response_id = request.path_params["id"]
    state.objects.delete(KIND, key.customer, response_id)
    return {"id": response_id, "object": "response", "deleted": True}


async def cancel(state: ServiceState, request: Request) -> Any:
    """Only a background response can still be running; ours are done when they are stored."""
    key = authenticate(state, request)
    stored = state.objects.get(KIND, key.customer, request.path_params["id"])["response"]
    if not stored["background"]:
        raise invalid_request("only a response that was created with background: true can be cancelled", "id")
    return stored


async def input_items(state: ServiceState, request: Request) -> dict[str, Any]:
    key = authenticate(state, request)
    return files.page_of(request, state.objects.get(KIND, key.customer, request.path_params["id"])["input"])
