"""Message Batches, as Anthropic's clients know them. Beneath lies the batch of `batches` and the worker that answers it:
the requests are kept as a file of lines, and what differs is how a batch and its results are shown.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from typing import Annotated, Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from tidelock.service import batch_queue, wire
from tidelock.service.auth import authenticate
from tidelock.service.errors import invalid_request, not_found
from tidelock.service.http import read_body
from tidelock.service.state import ServiceState
from tidelock.service.surfaces import batches, files
from tidelock.service.surfaces.anthropic_pages import cursors, page, rfc3339

KIND, PREFIX = "message batch", "msgbatch_"
INPUT = "message batch requests"  # files that no list of files shows
ENDPOINT = "/v1/messages"
HOURS = 24


class BatchedMessage(msgspec.Struct):
    custom_id: Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
    params: dict[str, Any]


class MessageBatchRequest(msgspec.Struct):
    """The body of `POST /v1/messages/batches`. What is wrong with a request in it, its result will say."""

    requests: Annotated[list[BatchedMessage], msgspec.Meta(min_length=1, max_length=50_000)]


_decoder = msgspec.json.Decoder(MessageBatchRequest)


async def create(state: ServiceState, request: Request) -> dict[str, Any]:
    key = authenticate(state, request, "files")
    asked: MessageBatchRequest = wire.decode(await read_body(request, state.max_body_bytes), _decoder)
    names = [each.custom_id for each in asked.requests]
    if len(set(names)) != len(names):
        raise invalid_request("custom_id must be unique within a batch", "requests")
    lines = [{"custom_id": r.custom_id, "method": "POST", "url": ENDPOINT, "body": r.params} for r in asked.requests]
    data = b"".join(wire.encode(line) + b"\n" for line in lines)
    file = await asyncio.to_thread(files.store, state, key.customer, "requests.jsonl", "batch", data, kind=INPUT)
    doc = batches.fresh(state.objects.new_id(PREFIX), ENDPOINT, file["id"], f"{HOURS}h", HOURS, None)
    doc["request_counts"]["total"] = len(lines)
    with state.ledger.db.transaction() as tx:
        state.objects.put_in(tx, KIND, key.customer, doc)
        batch_queue.add(tx, doc["id"], key.customer, key.id)
    state.batch_news.set()
    return _shown(request, doc)


async def listed(state: ServiceState, request: Request) -> dict[str, Any]:
    key = authenticate(state, request, "files")
    before, after, limit = cursors(request)
    docs, more = state.objects.page(KIND, key.customer, after=before or after, limit=limit, newest_first=before is None)
    return page([_shown(request, doc) for doc in (docs[::-1] if before else docs)], more)


async def retrieve(state: ServiceState, request: Request) -> dict[str, Any]:
    key = authenticate(state, request, "files")
    return _shown(request, state.objects.get(KIND, key.customer, request.path_params["id"]))


async def cancel(state: ServiceState, request: Request) -> dict[str, Any]:
    """What is under way is finished and charged; nothing more is begun. A batch that has ended stays as it is."""
    key = authenticate(state, request, "files")

    def change(doc: dict[str, Any]) -> None:
        if doc["status"] not in (*batches.OVER, "finalizing"):
            doc.update(status="cancelling", cancelling_at=doc["cancelling_at"] or int(time.time()))

    return _shown(request, state.objects.change(KIND, key.customer, request.path_params["id"], change))


async def delete(state: ServiceState, request: Request) -> dict[str, Any]:
    key = authenticate(state, request, "files")
    doc = state.objects.get(KIND, key.customer, request.path_params["id"])
    if doc["status"] not in batches.OVER:
        raise invalid_request("the batch has not ended; cancel it first", "id")
    state.objects.delete(KIND, key.customer, doc["id"])
    for file_id in filter(None, (doc["input_file_id"], doc["output_file_id"], doc["error_file_id"])):
        state.objects.delete(INPUT, key.customer, file_id)
        files.path_of(state, file_id).unlink(missing_ok=True)
    return {"id": doc["id"], "type": "message_batch_deleted"}


async def results(state: ServiceState, request: Request) -> Response:
    key = authenticate(state, request, "files")
    doc = state.objects.get(KIND, key.customer, request.path_params["id"])
    if doc["status"] not in batches.OVER:
        raise invalid_request("the batch has not ended; its results come with its end", "id")
    lines = await asyncio.to_thread(lambda: b"".join(wire.encode(line) + b"\n" for line in _results(state, doc)))
    return Response(lines, media_type="application/x-jsonl")


def _results(state: ServiceState, doc: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """In the order of the requests."""
    answered = {}
    for file_id in filter(None, (doc["output_file_id"], doc["error_file_id"])):
        for line in _lines(state, file_id):
            body = line["response"]["body"]
            good = line["response"]["status_code"] == 200
            said = {"type": "succeeded", "message": body} if good else {"type": "errored", "error": body}
            answered[line["custom_id"]] = said
    left = {"type": "expired" if doc["status"] == "expired" else "canceled"}
    for line in _lines(state, doc["input_file_id"]):
        yield {"custom_id": line["custom_id"], "result": answered.get(line["custom_id"], left)}


def _lines(state: ServiceState, file_id: str) -> Iterator[dict[str, Any]]:
    try:
        data = files.path_of(state, file_id).read_bytes()
    except FileNotFoundError:
        raise not_found("the requests or results of this batch are not here", "id", "file_lost") from None
    return map(json.loads, data.splitlines())  # as bytes: at no U+2028


def _shown(request: Request, doc: dict[str, Any]) -> dict[str, Any]:
    counts, over = doc["request_counts"], doc["status"] in batches.OVER
    left = counts["total"] - counts["completed"] - counts["failed"]
    ended = next((doc[f"{end}_at"] for end in batches.OVER if doc[f"{end}_at"]), None)
    root = str(request.base_url).rstrip("/") + request.url.path.partition("/messages/batches")[0]
    return {
        "id": doc["id"], "type": "message_batch",
        "processing_status": "ended" if over else "canceling" if doc["status"] == "cancelling" else "in_progress",
        "request_counts": {
            "processing": 0 if over else counts["total"], "succeeded": counts["completed"] if over else 0,
            "errored": counts["failed"] if over else 0, "canceled": left if doc["status"] == "cancelled" else 0,
            "expired": left if doc["status"] == "expired" else 0,
        },
        "created_at": rfc3339(doc["created_at"]), "expires_at": rfc3339(doc["expires_at"]), "ended_at": rfc3339(ended),
        "cancel_initiated_at": rfc3339(doc["cancelling_at"]), "archived_at": None,
        "results_url": f"{root}/messages/batches/{doc['id']}/results" if over else None,
    }  # fmt: skip
