"""Files clients upload: metadata among the objects, bytes on disk under the file's id."""

from __future__ import annotations

import asyncio
import mimetypes
import os
import time
from pathlib import Path
from typing import Any

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, Response

from tidelock.service.auth import authenticate
from tidelock.service.errors import invalid_request, not_found, too_large
from tidelock.service.http import bounded, is_lenient, speaks_anthropic
from tidelock.service.state import ServiceState
from tidelock.service.surfaces.anthropic_pages import cursors, page, rfc3339

KIND = "file"
PURPOSES = ("file-extract", "image", "video", "batch")
OPENAI_PURPOSES = ("assistants", "fine-tune", "vision", "user_data", "evals")  # to lenient servers
MAX_BYTES = 100 << 20
MAX_FILES = 1000
MOST_LISTED = 10_000


async def create(state: ServiceState, request: Request) -> dict[str, Any]:
    """`POST /v1/files`, multipart: `file` and `purpose`."""
    key = authenticate(state, request, "files")
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > MAX_BYTES + 65536:
        raise too_large(MAX_BYTES)
    try:
        streamed = Request(request.scope, bounded(request.receive, MAX_BYTES + 65536))
        async with streamed.form(max_files=1, max_fields=20) as form:
            upload, purpose = form.get("file"), form.get("purpose", "user_data" if speaks_anthropic(request) else None)
            allowed = PURPOSES + (OPENAI_PURPOSES if is_lenient(state, request) or speaks_anthropic(request) else ())
            if purpose not in allowed:
                raise invalid_request(f"purpose must be one of {', '.join(allowed)}", "purpose")
            if not isinstance(upload, UploadFile):
                raise invalid_request("a file is required", "file")
            data = await upload.read(MAX_BYTES + 1)
            name = upload.filename or "upload"
    except HTTPException as error:  # a malformed form
        raise invalid_request(str(error.detail), "file") from None
    if not data:
        raise invalid_request("the file is empty", "file")
    if len(data) > MAX_BYTES:
        raise too_large(MAX_BYTES)
    kept, more = state.objects.page(KIND, key.customer, limit=MAX_FILES)
    if more or len(kept) >= MAX_FILES:
        raise invalid_request(f"at most {MAX_FILES} files; delete some first", "file")
    return _shown(request, await asyncio.to_thread(store, state, key.customer, name, str(purpose), data))


async def listed(state: ServiceState, request: Request) -> dict[str, Any]:
    key = authenticate(state, request, "files")
    if speaks_anthropic(request):
        before, after, limit = cursors(request)
        docs, more = state.objects.page(KIND, key.customer, after=before or after, limit=limit, newest_first=before is None)
        return page([_shown(request, doc) for doc in (docs[::-1] if before else docs)], more)
    after, limit, newest_first = paging(request)
    docs, more = state.objects.page(KIND, key.customer, after=after, limit=limit, newest_first=newest_first)
    purpose = request.query_params.get("purpose")
    docs = [doc for doc in docs if purpose in (None, doc["purpose"])]
    return listing(docs, more)


async def retrieve(state: ServiceState, request: Request) -> dict[str, Any]:
    key = authenticate(state, request, "files")
    return _shown(request, state.objects.get(KIND, key.customer, request.path_params["id"]))


async def content(state: ServiceState, request: Request) -> Response:
    key = authenticate(state, request, "files")
    doc = state.objects.get(KIND, key.customer, request.path_params["id"])
    path = path_of(state, doc["id"])
    if not path.is_file():  # restored from a backup, which has no bytes, or uploaded to another machine
        raise not_found(f"the bytes of {doc['id']!r} are not here", "id", "file_lost")
    return FileResponse(path, media_type="application/octet-stream")


async def delete(state: ServiceState, request: Request) -> dict[str, Any]:
    key = authenticate(state, request, "files")
    file_id = request.path_params["id"]
    state.objects.delete(KIND, key.customer, file_id)
    path_of(state, file_id).unlink(missing_ok=True)
    if speaks_anthropic(request):
        return {"id": file_id, "type": "file_deleted"}
    return {"id": file_id, "object": "file", "deleted": True}


def _shown(request: Request, doc: dict[str, Any]) -> dict[str, Any]:
    """To Anthropic's clients in their own words."""
    if not speaks_anthropic(request):
        return doc
    kind = mimetypes.guess_type(doc["filename"])[0] or "application/octet-stream"
    return {"id": doc["id"], "type": "file", "filename": doc["filename"], "mime_type": kind, "size_bytes": doc["bytes"],
            "created_at": rfc3339(doc["created_at"]), "downloadable": True}  # fmt: skip


def store(
    state: ServiceState, customer: str, name: str, purpose: str, data: bytes, file_id: str | None = None, kind: str = KIND
) -> dict[str, Any]:
    """Bytes first, then the metadata that makes them visible, to the lists of this `kind`."""
    file_id = file_id or state.objects.new_id("file-")
    state.files.mkdir(exist_ok=True)
    path = path_of(state, file_id)
    scratch = path.with_name(path.name + ".tmp")
    try:
        with open(scratch, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    except OSError:
        scratch.unlink(missing_ok=True)
        raise
    doc = {
        "id": file_id, "object": "file", "bytes": len(data), "created_at": int(time.time()), "filename": name,
        "purpose": purpose, "status": "processed", "status_details": None,
    }  # fmt: skip
    state.objects.put(kind, customer, doc)
    return doc


def path_of(state: ServiceState, file_id: str) -> Path:
    return state.files / file_id


def paging(request: Request) -> tuple[str | None, int, bool]:
    """(after, limit, newest first) of a list request."""
    query = request.query_params
    limit = query.get("limit", "20")
    if not limit.isdecimal() or int(limit[:6]) > MOST_LISTED:
        raise invalid_request(f"limit must be a whole number up to {MOST_LISTED}", "limit")
    order = query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise invalid_request("order must be asc or desc", "order")
    return query.get("after"), max(int(limit), 1), order == "desc"


def page_of(request: Request, docs: list[dict[str, Any]]) -> dict[str, Any]:
    """The page that is asked for of a list held whole, its oldest first."""
    after, limit, newest_first = paging(request)
    docs = docs[::-1] if newest_first else docs
    start = next((n + 1 for n, doc in enumerate(docs) if doc["id"] == after), len(docs)) if after is not None else 0
    return listing(docs[start : start + limit], len(docs) > start + limit)


def listing(docs: list[dict[str, Any]], more: bool) -> dict[str, Any]:
    first, last = (docs[0]["id"], docs[-1]["id"]) if docs else ("", "")
    return {"object": "list", "data": docs, "first_id": first, "last_id": last, "has_more": more}
