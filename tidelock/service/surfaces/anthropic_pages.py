"""Lists and moments as Anthropic's API writes them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request

from tidelock.service.errors import invalid_request

MOST_LISTED = 1000


def cursors(request: Request) -> tuple[str | None, str | None, int]:
    """(before, after, limit) of a list request in Anthropic's words."""
    query = request.query_params
    limit = query.get("limit", "20")
    if not limit.isdecimal() or not 1 <= int(limit[:6]) <= MOST_LISTED:
        raise invalid_request(f"limit must be a whole number from 1 to {MOST_LISTED}", "limit")
    return query.get("before_id"), query.get("after_id"), int(limit)


def page(docs: list[dict[str, Any]], more: bool) -> dict[str, Any]:
    first, last = (docs[0]["id"], docs[-1]["id"]) if docs else (None, None)
    return {"data": docs, "has_more": more, "first_id": first, "last_id": last}


def rfc3339(moment: float | None) -> str | None:
    return None if moment is None else datetime.fromtimestamp(moment, UTC).isoformat().replace("+00:00", "Z")
