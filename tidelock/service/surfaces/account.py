"""What a customer may read about their own account: balance, usage, costs, and the count of a prompt before it is paid.

Kimi's shapes for balance and usage windows, OpenAI's admin shapes for the rest. Everything is computed from settled
usage rows; nothing here is an estimate.
"""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime
from typing import Any

import msgspec
from starlette.requests import Request

from tidelock.service import run, wire
from tidelock.service.auth import authenticate
from tidelock.service.errors import invalid_request
from tidelock.service.http import is_lenient, read_body
from tidelock.service.prices import format_usd
from tidelock.service.state import ServiceState
from tidelock.service.surfaces.chat_request import ChatRequest
from tidelock.service.surfaces.chat_request import read as read_chat
from tidelock.service.windows import FIVE_HOURS, WEEK

WIDTHS = {"1m": 60, "1h": 3600, "1d": 86400}
DEFAULT_BUCKETS, MOST_BUCKETS = {"1m": 60, "1h": 24, "1d": 7}, 1440
GROUPS = {"model": "model", "api_key_id": "key_id", "project_id": "project", "batch": "mode"}
# A key stays in its project for life, so the usage of a project is that of its keys.
USED = "(SELECT usage.*, keys.project FROM usage LEFT JOIN keys ON keys.id = usage.key_id) AS used"
SUMMED = (
    "prompt_tokens", "cached_tokens", "cache_write_5m_tokens", "cache_write_1h_tokens", "completion_tokens", "nano_usd",
    "credit_nano",
)  # fmt: skip
# Kinds of usage that admin clients ask for and this service does not have: their pages are true, and empty.
UNUSED = (
    "audio_speeches", "audio_transcriptions", "code_interpreter_sessions", "decisions", "embeddings", "file_search_calls",
    "images", "moderations", "vector_stores", "web_search_calls",
)  # fmt: skip
MAX_TIME = 1 << 40

_chat = msgspec.json.Decoder(ChatRequest)


async def balance(state: ServiceState, request: Request) -> dict[str, Any]:
    """Kimi's shape; the amounts are JSON numbers in USD with every nano digit written out."""
    key = authenticate(state, request, "usage")
    pockets = state.ledger.balances(key.customer)
    nano_usd = state.ledger.balance(key.customer)
    voucher = pockets.get("voucher", 0) + pockets.get("plan", 0)
    data = {
        "available_balance": _usd(nano_usd),
        "voucher_balance": _usd(voucher),
        "cash_balance": _usd(nano_usd - voucher + pockets.get("receivable", 0)),  # negative: owed
        "available_nano_usd": nano_usd,
    }
    return {"code": 0, "scode": "0x0", "status": True, "data": data}


def _usd(nano_usd: int) -> msgspec.Raw:
    """A JSON number that loses nothing on its way."""
    return msgspec.Raw(format_usd(nano_usd).encode())


async def estimate_tokens(state: ServiceState, request: Request) -> dict[str, Any]:
    """`POST /v1/tokenizers/estimate-token-count`: exact, since the tokenizer is ours."""
    key = authenticate(state, request)
    body = wire.decode(await read_body(request, state.max_body_bytes), _chat)
    return {"data": {"total_tokens": await run.count_tokens(state, key, read_chat(state, body, is_lenient(state, request)))}}


async def usages(state: ServiceState, request: Request) -> dict[str, Any]:
    """`GET /v1/usages`, as Kimi's coding clients show it: the windows of the plan and the extra-usage wallet. Prepaid
    accounts have no quota: then the limit is what the balance and the spending of the window make together. Amounts are
    nano-USD in decimal strings, those of the wallet a million to the cent, as there."""
    key = authenticate(state, request, "usage")
    ledger, now = state.ledger, state.ledger.clock()
    allowances, sub = state.plans.allowances(key.customer), state.plans.subscription(key.customer)
    pockets = ledger.balances(key.customer)
    credits, extra = pockets.get("plan", 0), pockets.get("extra", 0)

    def window(span: str, seconds: float) -> dict[str, str]:
        allowance = allowances.get(("plan", span)) if sub else None
        if allowance is not None:
            return _window(allowance.used_nano, allowance.limit_nano, allowance.ends or now + seconds)
        used = spent(state, key.customer, now - seconds)
        free = credits if sub else ledger.balance(key.customer)
        return _window(used, used + free, sub.month_ends if sub else now + seconds)

    five_hours = {"window": {"duration": 300, "timeUnit": "TIME_UNIT_MINUTE"}, "detail": window("5h", FIVE_HOURS)}
    answer: dict[str, Any] = {"usage": window("7d", WEEK), "limits": [five_hours]}
    month = allowances.get(("extra", "month"))
    if extra or month is not None:
        used = month.used_nano if month else 0
        answer["boosterWallet"] = {
            "balance": {"type": "BOOSTER", "amount": str((extra + used) // 10), "amountLeft": str(extra // 10)},
            "monthlyChargeLimitEnabled": month is not None,
            "monthlyChargeLimit": {"priceInCents": str(month.limit_nano // 10_000_000 if month else 0), "currency": "USD"},
            "monthlyUsed": {"priceInCents": str(used // 10_000_000), "currency": "USD"},
        }
    return answer


def _window(used: int, limit: int, reset: float) -> dict[str, str]:
    resets = datetime.fromtimestamp(reset, UTC).isoformat(timespec="seconds")
    return {"used": str(used), "limit": str(limit), "remaining": str(max(limit - used, 0)), "resetTime": resets}


async def completions_usage(state: ServiceState, request: Request) -> dict[str, Any]:
    """`GET /v1/organization/usage/completions`"""
    key = authenticate(state, request, "usage")
    page = _Page.of(request, "1d")
    buckets = []
    for start, end, rows in await asyncio.to_thread(page.buckets, state, key.customer, request):
        results = [
            {
                "object": "organization.usage.completions.result",
                "input_tokens": row["prompt_tokens"],
                "input_cached_tokens": row["cached_tokens"],
                "input_uncached_tokens": row["prompt_tokens"] - row["cached_tokens"],
                "input_cache_write_tokens": row["cache_write_5m_tokens"] + row["cache_write_1h_tokens"],
                "input_audio_tokens": 0,
                "output_tokens": row["completion_tokens"],
                "output_audio_tokens": 0,
                "num_model_requests": row["requests"],
                "project_id": row["project"],
                "user_id": None,
                "api_key_id": row["key_id"],
                "model": row["model"],
                "batch": None if row["mode"] is None else "batch" in row["mode"].split("+"),
                "service_tier": None,
                "cost_nano_usd": row["nano_usd"],
                "credit_nano_usd": row["credit_nano"],
            }
            for row in rows
        ]
        buckets.append({"object": "bucket", "start_time": start, "end_time": end, "results": results})
    return page.body(buckets)


async def unused(state: ServiceState, request: Request) -> dict[str, Any]:
    authenticate(state, request, "usage")
    page = _Page.of(request, "1d")
    return page.body([{"object": "bucket", "start_time": s, "end_time": e, "results": []} for s, e in page.spans])


async def costs(state: ServiceState, request: Request) -> dict[str, Any]:
    """`GET /v1/organization/costs`. Exact: the amounts are decimal numbers with every nano digit."""
    key = authenticate(state, request, "usage")
    page = _Page.of(request, "1d")
    buckets = []
    for start, end, rows in await asyncio.to_thread(page.buckets, state, key.customer, request):
        results = [
            {
                "object": "organization.costs.result",
                "amount": {"value": _usd(row["nano_usd"]), "currency": "usd"},
                "line_item": row["model"],
                "project_id": row["project"],
                "api_key_id": row["key_id"],
                "quantity": None,
            }
            for row in rows
        ]
        buckets.append({"object": "bucket", "start_time": start, "end_time": end, "results": results})
    return page.body(buckets)


def month_start() -> float:
    return datetime.now(UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0).timestamp()


def spent(state: ServiceState, customer: str, since: float) -> int:
    sql = "SELECT COALESCE(SUM(nano_usd), 0) FROM usage WHERE customer = ? AND created >= ?"
    return int(state.ledger.db.read(sql, (customer, since))[0][0])


class _Page:
    """Consecutive time buckets. `page` is where the next one starts, as the last answer said; other words say nothing."""

    def __init__(self, start: int, end: int, width: int, limit: int) -> None:
        self.start, self.end, self.width = start - start % width, end, width
        every = range(self.start, end, width)
        self.spans = [(s, min(s + width, end)) for s in every[:limit]]
        self.next = every[limit] if len(every) > limit else None

    @staticmethod
    def of(request: Request, default_width: str) -> _Page:
        query = request.query_params
        width = query.get("bucket_width", default_width)
        if width not in WIDTHS:
            raise invalid_request(f"bucket_width must be one of {', '.join(WIDTHS)}", "bucket_width")
        start = whole(query.get("start_time"), "start_time", 0, MAX_TIME)
        if start is None:
            raise invalid_request("start_time is required, in seconds since 1970", "start_time")
        if query.get("page", "").isdecimal():
            start = whole(query["page"], "page", 0, MAX_TIME)
        end = whole(query.get("end_time"), "end_time", 0, MAX_TIME) or int(time.time()) + 1
        limit = whole(query.get("limit"), "limit", 0, MOST_BUCKETS) or DEFAULT_BUCKETS[width]
        return _Page(start, max(end, start), WIDTHS[width], limit)

    def buckets(self, state: ServiceState, customer: str, request: Request) -> list[tuple[int, int, list[dict[str, Any]]]]:
        asked = request.query_params.getlist("group_by") + request.query_params.getlist("group_by[]")
        columns = [column for name, column in GROUPS.items() if name in asked or (name == "model" and "line_item" in asked)]
        wanted = {c: request.query_params.getlist(n) + request.query_params.getlist(n + "[]")
                  for n, c in (("models", "model"), ("api_key_ids", "key_id"), ("project_ids", "project"))}  # fmt: skip
        out = []
        for start, end in self.spans:
            where, args = "customer = ? AND created >= ? AND created < ?", [customer, start, end]
            for column, values in wanted.items():
                if values:
                    where += f" AND {column} IN ({', '.join('?' * len(values))})"
                    args += values
            sums = ", ".join(f"CAST(SUM({c}) AS BIGINT) AS {c}" for c in SUMMED)
            grouped = f"GROUP BY {', '.join(columns)}" if columns else "HAVING COUNT(*) > 0"
            selected = "".join(f"{column}, " for column in columns)
            sql = f"SELECT {selected}COUNT(*) AS requests, {sums} FROM {USED} WHERE {where} {grouped}"
            rows = [{k: row[k] for k in row.keys()} for row in state.ledger.db.read(sql, args)]
            out.append((start, end, [{"model": None, "key_id": None, "project": None, "mode": None, **row} for row in rows]))
        return out

    def body(self, buckets: list[dict[str, Any]]) -> dict[str, Any]:
        more = self.next is not None
        return {"object": "page", "data": buckets, "has_more": more, "next_page": str(self.next) if more else None}


def whole(text: str | None, field: str, low: int, high: int) -> int | None:
    if text is None:
        return None
    if not text.isdecimal() or not low <= int(text[:20]) <= high:
        raise invalid_request(f"{field} must be a whole number from {low} to {high}", field)
    return int(text)
