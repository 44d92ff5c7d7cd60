"""`GET /admin/reconciliation?since=1764000000&until=…`: compares now, and tells what the last periodic run found."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from starlette.requests import Request

from tidelock.service.auth import authenticate
from tidelock.service.errors import invalid_request
from tidelock.service.reconciliation.job import last, reconcile
from tidelock.service.state import ServiceState


async def reconciliation(state: ServiceState, request: Request) -> dict[str, Any]:
    """Of the job's window, unless `since` and `until` (seconds since 1970) say otherwise."""
    authenticate(state, request, role="admin")
    until = _moment(request, "until", time.time())
    since = _moment(request, "since", until - state.reconciler.window_s)
    if since >= until:
        raise invalid_request("since is before until", "since")

    def compare() -> dict[str, Any]:
        found, _ = reconcile(state.ledger.db, since, until, state.reconciler.journal, inexact=state.inexact)
        return {**found.shown(), "last": last(state.ledger.db)}

    return await asyncio.to_thread(compare)


def _moment(request: Request, name: str, otherwise: float) -> float:
    try:
        given = float(request.query_params.get(name, otherwise))
    except ValueError:
        given = float("nan")
    if not 0 <= given <= 2**40:
        raise invalid_request(f"{name} is a moment in seconds since 1970", name)
    return given
