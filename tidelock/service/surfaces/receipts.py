"""`/v1/organization/receipts`: a customer's requests as they settle, one by one, listed, in detail and live."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import StreamingResponse

from tidelock.service import errors, receipts, wire
from tidelock.service.accounts import UnknownId
from tidelock.service.auth import authenticate
from tidelock.service.db import StorageDown
from tidelock.service.keys import Key
from tidelock.service.state import ServiceState
from tidelock.service.surfaces import account, files

MOST_SHOWN = 200  # a page; also what a live stream catches up with at once
POLL_S = 1.25  # one query each time, and one more about the key every CHECKED polls: less than one a second
CHECKED = 5
OVERLAP_S = 5.0  # rows appear in the order of their commits, not of their times: how far we look back
MOST_STREAMS = 20  # of one organisation on one worker

_streams: Counter[str] = Counter()


async def listed(state: ServiceState, request: Request) -> dict[str, Any]:
    """`GET /v1/organization/receipts`, newest first; the filters are query parameters."""
    key = authenticate(state, request, "usage")
    after, limit, newest_first = files.paging(request)
    query = request.query_params
    wanted: dict[str, Any] = {name: query.get(name) or None for name in ("model", "api_key_id", "project_id", "outcome")}
    wanted |= {name: account.whole(query.get(name), name, 0, account.MAX_TIME) for name in ("start_time", "end_time")}
    if wanted["outcome"] not in (None, *receipts.OUTCOMES):
        raise errors.invalid_request(f"outcome must be one of {', '.join(receipts.OUTCOMES)}", "outcome")
    read = (state.ledger.db, key.customer, wanted)
    try:
        found, more = await asyncio.to_thread(
            receipts.page, *read, after=after, limit=min(limit, MOST_SHOWN), oldest_first=not newest_first
        )
    except UnknownId:  # as the other lists: nothing comes after what is not there
        found, more = [], False
    return files.listing(found, more)


async def retrieve(state: ServiceState, request: Request) -> dict[str, Any]:
    key = authenticate(state, request, "usage")
    return await asyncio.to_thread(receipts.one, state.ledger.db, key.customer, request.path_params["id"])


async def stream(state: ServiceState, request: Request) -> StreamingResponse:
    """`GET /v1/organization/receipts/stream`: server-sent events `receipt`, from whichever worker settled them; `skipped` where
    there were more than are sent, `gone` when the key has ended. It begins with what came after `since_ms`, by default now."""
    key = authenticate(state, request, "usage")
    if _streams[key.customer] >= MOST_STREAMS:
        raise errors.ApiError(
            429, "rate_limit_reached_error", f"at most {MOST_STREAMS} live streams at a time", retry_after_s=5
        )
    since_ms = account.whole(request.query_params.get("since_ms"), "since_ms", 0, account.MAX_TIME * 1000)
    since = state.ledger.clock() if since_ms is None else since_ms / 1000
    headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
    return StreamingResponse(_events(state, key, since), media_type="text/event-stream; charset=utf-8", headers=headers)


async def _good(state: ServiceState, key: Key) -> bool:
    now = await asyncio.to_thread(state.keys.live, key.id)
    return now is not None and not now.suspended


async def _events(state: ServiceState, key: Key, since: float) -> AsyncIterator[bytes]:
    seen: dict[str, float] = {}
    begun, polls = since, 0
    _streams[key.customer] += 1
    try:
        yield b"retry: 2000\n\n"
        while True:
            try:
                if polls % CHECKED == 0 and not await _good(state, key):
                    yield b"event: gone\ndata: {}\n\n"
                    return
                found = await receipts.since(state.ledger.db, key, max(begun, since - OVERLAP_S), MOST_SHOWN + 1)
            except StorageDown:
                yield wire.COMMENT
                await asyncio.sleep(POLL_S)
                continue
            polls += 1
            new = [r for r in reversed(found[:MOST_SHOWN]) if r["id"] not in seen]
            if len(found) > MOST_SHOWN and found[MOST_SHOWN]["id"] not in seen:
                yield b"event: skipped\ndata: {}\n\n"
            for receipt in new:
                seen[receipt["id"]] = receipt["created_ms"] / 1000
                since = max(since, seen[receipt["id"]])
                yield b"event: receipt\ndata: " + wire.encode(receipt) + b"\n\n"
            if not new:
                yield wire.COMMENT  # so that a client that left is noticed
            seen = {r: at for r, at in seen.items() if at > since - 2 * OVERLAP_S}
            await asyncio.sleep(POLL_S)
    finally:
        _streams[key.customer] -= 1
