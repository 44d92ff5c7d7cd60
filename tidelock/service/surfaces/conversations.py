"""Conversations of the Responses API: items kept under a name, that responses are told and add to.

A response adds what it was asked and what it answered in one write, once it has ended.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
from starlette.requests import Request

from tidelock.service import wire
from tidelock.service.auth import authenticate
from tidelock.service.db import StorageDown
from tidelock.service.errors import ApiError, not_found
from tidelock.service.http import is_lenient, read_body
from tidelock.service.keys import Key
from tidelock.service.objects import Objects
from tidelock.service.state import ServiceState
from tidelock.service.surfaces import files
from tidelock.service.surfaces.responses_items import Item, docs_of, messages_of, resolved

log = logging.getLogger(__name__)

KIND = "conversation"
AT_A_TIME = 20  # items that a client may add


class Items(msgspec.Struct, gc=False):
    """The body of `POST /v1/conversations/{id}/items`."""

    items: Annotated[list[Item], msgspec.Meta(max_length=AT_A_TIME)]


class Created(msgspec.Struct, gc=False):
    """The body of `POST /v1/conversations`."""

    items: Annotated[list[Item], msgspec.Meta(max_length=AT_A_TIME)] | None = None
    metadata: dict[str, str] | None = None


class Changed(msgspec.Struct, gc=False):
    """The body of `POST /v1/conversations/{id}`."""

    metadata: dict[str, str] | None


_created, _changed, _items = (msgspec.json.Decoder(body) for body in (Created, Changed, Items))


async def create(state: ServiceState, request: Request) -> dict[str, Any]:
    key = authenticate(state, request)
    body = wire.decode(await read_body(request, state.max_body_bytes) or b"{}", _created)
    added = _taken(state, key, request, body.items or ())
    doc = {"id": Objects.new_id("conv_"), "created_at": int(time.time()), "metadata": body.metadata or {}, "items": added}
    state.objects.put(KIND, key.customer, doc)
    return _shown(doc)


async def retrieve(state: ServiceState, request: Request) -> dict[str, Any]:
    key = authenticate(state, request)
    return _shown(state.objects.get(KIND, key.customer, request.path_params["id"]))


async def update(state: ServiceState, request: Request) -> dict[str, Any]:
    key = authenticate(state, request)
    body = wire.decode(await read_body(request, state.max_body_bytes), _changed)

    def change(doc: dict[str, Any]) -> None:
        doc["metadata"] = body.metadata or {}

    return _shown(state.objects.change(KIND, key.customer, request.path_params["id"], change))


async def delete(state: ServiceState, request: Request) -> dict[str, Any]:
    """Its items stay with the responses that said them, if those are stored."""
    key = authenticate(state, request)
    name = request.path_params["id"]
    state.objects.delete(KIND, key.customer, name)
    return {"id": name, "object": "conversation.deleted", "deleted": True}


async def listed(state: ServiceState, request: Request) -> dict[str, Any]:
    key = authenticate(state, request)
    return files.page_of(request, state.objects.get(KIND, key.customer, request.path_params["id"])["items"])


async def extend(state: ServiceState, request: Request) -> dict[str, Any]:
    """The items as they were added."""
    key = authenticate(state, request)
    body = wire.decode(await read_body(request, state.max_body_bytes), _items)
    name = request.path_params["id"]
    state.objects.get(KIND, key.customer, name)  # a 404 before a complaint about the items
    added = _taken(state, key, request, body.items)
    add(state, key, name, added)
    return files.listing(added, False)


async def item(state: ServiceState, request: Request) -> dict[str, Any]:
    key = authenticate(state, request)
    held = state.objects.get(KIND, key.customer, request.path_params["id"])["items"]
    return held[_place(held, request.path_params["item"])]


async def drop(state: ServiceState, request: Request) -> dict[str, Any]:
    """The conversation without the item."""
    key = authenticate(state, request)

    def change(doc: dict[str, Any]) -> None:
        del doc["items"][_place(doc["items"], request.path_params["item"])]

    return _shown(state.objects.change(KIND, key.customer, request.path_params["id"], change))


def items(state: ServiceState, key: Key, name: str) -> list[Item]:
    """What a response in the conversation is told first. Raises a 404."""
    return msgspec.convert(state.objects.get(KIND, key.customer, name)["items"], list[Item])


def add(state: ServiceState, key: Key, name: str, docs: Sequence[dict[str, Any]]) -> None:
    """Raises a 404."""

    def change(doc: dict[str, Any]) -> None:
        doc["items"] += docs

    state.objects.change(KIND, key.customer, name, change)


def keep(state: ServiceState, key: Key, name: str, docs: Sequence[dict[str, Any]]) -> None:
    """`add` for an answer that is charged: it is given, though its conversation is gone or cannot be written."""
    try:
        add(state, key, name, docs)
    except (ApiError, StorageDown) as error:
        log.error("an answer is given and charged, but could not be added to %s: %s", name, type(error).__name__)


def _taken(state: ServiceState, key: Key, request: Request, given: Sequence[Item]) -> list[dict[str, Any]]:
    """The items as documents with ids of ours. Raises a 400 for one that no response could be told."""
    given = resolved(state, key, given)
    messages_of(given, is_lenient(state, request))
    return docs_of(given, Objects.new_id(""))


def _place(held: Sequence[dict[str, Any]], name: str) -> int:
    for n, doc in enumerate(held):
        if doc["id"] == name:
            return n
    raise not_found(f"no item {name!r} in this conversation", "item")


def _shown(doc: dict[str, Any]) -> dict[str, Any]:
    return {"id": doc["id"], "object": "conversation", "created_at": doc["created_at"], "metadata": doc["metadata"]}
