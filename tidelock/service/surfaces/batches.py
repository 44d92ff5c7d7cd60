"""Batches: a file of requests, answered at leisure and at the batch price. `batch_worker` does the answering."""

from __future__ import annotations

import re
import time
from typing import Annotated, Any

import msgspec
from starlette.requests import Request

from tidelock.service import batch_queue, wire
from tidelock.service.auth import authenticate
from tidelock.service.errors import invalid_request
from tidelock.service.http import is_lenient, read_body
from tidelock.service.state import ServiceState
from tidelock.service.surfaces import files

KIND = "batch"
ENDPOINTS = ("/v1/chat/completions",)  # Kimi's; lenient servers also take the other surface whose bodies are self-contained
LENIENT_ENDPOINTS = (*ENDPOINTS, "/v1/responses")
HOURS = (12, 7 * 24)
OVER = ("completed", "failed", "expired", "cancelled")


class BatchRequest(msgspec.Struct):
    """The body of `POST /v1/batches`."""

    input_file_id: str
    endpoint: str
    completion_window: str
    metadata: Annotated[dict[str, str], msgspec.Meta(max_length=16)] | None = None


_decoder = msgspec.json.Decoder(BatchRequest)


async def create(state: ServiceState, request: Request) -> dict[str, Any]:
    key = authenticate(state, request, "files")
    body: BatchRequest = wire.decode(await read_body(request, state.max_body_bytes), _decoder)
    endpoints = LENIENT_ENDPOINTS if is_lenient(state, request) else ENDPOINTS
    if body.endpoint not in endpoints:
        raise invalid_request(f"endpoint must be one of {', '.join(endpoints)}", "endpoint")
    for name, value in (body.metadata or {}).items():
        if len(name) > 64 or len(value) > 512:
            raise invalid_request("metadata keys have at most 64 characters, values at most 512", "metadata")
    hours = _hours(body.completion_window)
    file = state.objects.get(files.KIND, key.customer, body.input_file_id)
    if file["purpose"] != "batch":
        raise invalid_request("the input file's purpose must be batch", "input_file_id")
    doc = fresh(state.objects.new_id("batch_"), body.endpoint, file["id"], body.completion_window, hours, body.metadata)
    with state.ledger.db.transaction() as tx:
        state.objects.put_in(tx, KIND, key.customer, doc)
        batch_queue.add(tx, doc["id"], key.customer, key.id)
    state.batch_news.set()
    return doc


def fresh(
    batch_id: str, endpoint: str, input_file_id: str, window: str, hours: int, metadata: dict[str, str] | None
) -> dict[str, Any]:
    now = int(time.time())
    return {
        "id": batch_id,
        "object": "batch",
        "endpoint": endpoint,
        "errors": None,
        "input_file_id": input_file_id,
        "completion_window": window,
        "status": "validating",
        "output_file_id": None,
        "error_file_id": None,
        "created_at": now,
        "in_progress_at": None,
        "expires_at": now + hours * 3600,
        "finalizing_at": None,
        "completed_at": None,
        "failed_at": None,
        "expired_at": None,
        "cancelling_at": None,
        "cancelled_at": None,
        "request_counts": {"total": 0, "completed": 0, "failed": 0},
        "metadata": metadata,
    }


async def listed(state: ServiceState, request: Request) -> dict[str, Any]:
    key = authenticate(state, request, "files")
    after, limit, newest_first = files.paging(request)
    return files.listing(*state.objects.page(KIND, key.customer, after=after, limit=limit, newest_first=newest_first))


async def retrieve(state: ServiceState, request: Request) -> dict[str, Any]:
    key = authenticate(state, request, "files")
    return state.objects.get(KIND, key.customer, request.path_params["id"])


async def cancel(state: ServiceState, request: Request) -> dict[str, Any]:
    """What is under way is finished and charged; nothing more is begun."""
    key = authenticate(state, request, "files")

    def change(doc: dict[str, Any]) -> None:
        if doc["status"] in OVER:
            raise invalid_request(f"the batch is {doc['status']} already", "id")
        if doc["status"] != "finalizing":
            doc.update(status="cancelling", cancelling_at=doc["cancelling_at"] or int(time.time()))

    return state.objects.change(KIND, key.customer, request.path_params["id"], change)


def _hours(window: str) -> int:
    match = re.fullmatch(r"([0-9]{1,3})([hd])", window)
    hours = int(match[1]) * (24 if match[2] == "d" else 1) if match else 0
    if not HOURS[0] <= hours <= HOURS[1]:
        raise invalid_request("completion_window must be between 12h and 7d, such as 24h", "completion_window")
    return hours
