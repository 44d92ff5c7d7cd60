"""Chat completions that were created with `store: true`: list, read, label, delete."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.requests import Request

from tidelock.service import wire
from tidelock.service.auth import authenticate
from tidelock.service.http import read_body
from tidelock.service.state import ServiceState
from tidelock.service.surfaces import files

KIND = "chat completion"


class Update(msgspec.Struct):
    """The body of `POST /v1/chat/completions/{id}`."""

    metadata: dict[str, str] | None


_decoder = msgspec.json.Decoder(Update)


async def listed(state: ServiceState, request: Request) -> dict[str, Any]:
    key = authenticate(state, request)
    after, limit, newest_first = files.paging(request)
    docs, more = state.objects.page(KIND, key.customer, after=after, limit=limit, newest_first=newest_first)
    return files.listing([doc["completion"] for doc in docs], more)


async def retrieve(state: ServiceState, request: Request) -> dict[str, Any]:
    key = authenticate(state, request)
    return state.objects.get(KIND, key.customer, request.path_params["id"])["completion"]


async def update(state: ServiceState, request: Request) -> dict[str, Any]:
    key = authenticate(state, request)
    body = wire.decode(await read_body(request, state.max_body_bytes), _decoder)

    def change(doc: dict[str, Any]) -> None:
        doc["completion"]["metadata"] = body.metadata or {}

    return state.objects.change(KIND, key.customer, request.path_params["id"], change)["completion"]


async def delete(state: ServiceState, request: Request) -> dict[str, Any]:
    key = authenticate(state, request)
    completion_id = request.path_params["id"]
    state.objects.delete(KIND, key.customer, completion_id)
    return {"object": "chat.completion.deleted", "id": completion_id, "deleted": True}


async def messages(state: ServiceState, request: Request) -> dict[str, Any]:
    """The messages the completion was asked with."""
    key = authenticate(state, request)
    docs = state.objects.get(KIND, key.customer, request.path_params["id"])["messages"]
    if request.query_params.get("order", "asc") == "desc":
        docs = docs[::-1]
    return files.listing(docs, False)
