"""`GET /admin/analytics?month=2026-03&base=2025-11`: the report, for a key with role admin."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import Request

from tidelock.service.analytics.report import report, this_month
from tidelock.service.auth import authenticate
from tidelock.service.errors import invalid_request
from tidelock.service.state import ServiceState
from tidelock.tokens.errors import UserError


async def analytics(state: ServiceState, request: Request) -> dict[str, Any]:
    """Raises ApiError: 401 and 403 as every admin route, 400 for a month that is none."""
    authenticate(state, request, role="admin")
    name, base = request.query_params.get("month") or this_month(), request.query_params.get("base")

    def read() -> dict[str, Any]:
        with state.ledger.db.snapshot() as snapshot:
            return report(snapshot, name, base)

    try:
        return await asyncio.to_thread(read)
    except UserError as error:
        raise invalid_request(str(error), "month") from error
