"""The operator's side, for keys with role admin: organisations and what may be done for them, the books' soundness, prices,
the log of the whole service. `tidelock admin` does the same at a terminal; analytics have a route of their own."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import asdict
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.routing import Route

from tidelock.service import receipts, suspension, wire
from tidelock.service.accounts import UnknownId, log
from tidelock.service.audit import audit_and_root
from tidelock.service.auth import authenticate
from tidelock.service.books import Books
from tidelock.service.db import Database
from tidelock.service.errors import conflict, invalid_request
from tidelock.service.http import Json, read_body
from tidelock.service.keys import Key
from tidelock.service.ladder import Limits
from tidelock.service.prices import exact_nano
from tidelock.service.state import ServiceState
from tidelock.service.surfaces import billing, files, organization, wallet
from tidelock.service.surfaces.organization import bad_request

MONTH_S = 30 * 86400.0


class Voucher(msgspec.Struct):
    """The body of `POST /admin/organizations/{id}/vouchers`. `usd`: decimal text."""

    usd: str
    name: str
    expires_at: int | None = None


class LimitsByHand(msgspec.Struct):
    """The body of `POST /admin/organizations/{id}/limits`; what is null comes from the tier."""

    tier: int | None = None
    concurrency: int | None = None
    requests: int | None = None
    tokens: int | None = None
    day_tokens: int | None = None


class Suspension(msgspec.Struct):
    """The body of `POST /admin/organizations/{id}/suspend`; the organisation is told the reason."""

    reason: str


_voucher, _limits = msgspec.json.Decoder(Voucher), msgspec.json.Decoder(LimitsByHand)
_suspension = msgspec.json.Decoder(Suspension)
_verifying = asyncio.Lock()


def routes(state: ServiceState) -> list[Route]:
    table = [
        ("GET", "/admin/organizations", organizations),
        ("GET", "/admin/organizations/{id}", one),
        ("GET", "/admin/organizations/{id}/receipts", its_receipts),
        ("POST", "/admin/organizations/{id}/vouchers", grant),
        ("POST", "/admin/organizations/{id}/limits", limit),
        ("POST", "/admin/organizations/{id}/suspend", suspend),
        ("POST", "/admin/organizations/{id}/resume", resume),
        ("GET", "/admin/ledger", ledger),
        ("GET", "/admin/prices", prices),
        ("GET", "/admin/plans", plans),
        ("GET", "/admin/audit_logs", audit_logs),
    ]
    return [Route(path, Json(state, handler), methods=[method]) for method, path, handler in table]


async def organizations(state: ServiceState, request: Request) -> dict[str, Any]:
    """In the order of their ids, with balance and the last 30 days; `q` finds ids and names."""
    authenticate(state, request, "", role="admin")
    after, limit, _ = files.paging(request)
    return await asyncio.to_thread(
        _organizations, state.ledger.db, request.query_params.get("q", ""), after or "", min(limit, 200)
    )


def _organizations(db: Database, wanted: str, after: str, limit: int) -> dict[str, Any]:
    like = "%" + wanted.lower().replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_") + "%"
    sql = ("SELECT id, name, created, suspended, suspended_for FROM organizations WHERE id > ? AND (LOWER(id) LIKE ? "
           f"ESCAPE '\\' OR LOWER(name) LIKE ? ESCAPE '\\') ORDER BY id LIMIT {limit + 1}")  # fmt: skip
    rows = db.read(sql, (after, like, like))
    more, rows, now = len(rows) > limit, rows[:limit], time.time()
    names = [row["id"] for row in rows]
    marks = ", ".join("?" * len(names)) or "''"
    free = dict(map(tuple, db.read(
        "SELECT customer, CAST(SUM(balance_nano) AS BIGINT) FROM accounts WHERE kind IN ('cash', 'voucher', 'plan', 'extra') "
        f"AND (expires IS NULL OR expires > ?) AND customer IN ({marks}) GROUP BY customer", (now, *names))))  # fmt: skip
    used = {row[0]: tuple(row)[1:] for row in db.read(
        "SELECT customer, COUNT(*), CAST(SUM(nano_usd) AS BIGINT), MAX(created) FROM usage "
        f"WHERE created > ? AND customer IN ({marks}) GROUP BY customer", (now - MONTH_S, *names))}  # fmt: skip
    plan = dict(
        map(
            tuple,
            db.read(f"SELECT customer, plan FROM subscriptions WHERE state = 'active' AND customer IN ({marks})", names),
        )
    )
    shown = []
    for row in rows:
        requests, spent, last = used.get(row["id"], (0, 0, None))
        shown.append({
            "object": "organization", "id": row["id"], "name": row["name"], "created_at": int(row["created"]),
            "available_nano_usd": free.get(row["id"], 0), "requests_30d": requests, "spent_30d_nano_usd": spent,
            "last_request_at": None if last is None else int(last), "plan": plan.get(row["id"]), **_suspended(row),
        })  # fmt: skip
    return files.listing(shown, more)


async def one(state: ServiceState, request: Request) -> dict[str, Any]:
    authenticate(state, request, "", role="admin")
    return await asyncio.to_thread(_one, state, request.path_params["id"])


def _one(state: ServiceState, customer: str) -> dict[str, Any]:
    row, db = _known(state, customer), state.ledger.db
    tier, recharged, given = state.tiers.standing(customer)
    by_hand = state.tiers.caps(customer).get("", (None, Limits()))
    subscribed = state.plans.subscription(customer) is not None
    return {
        "object": "organization", "id": row["id"], "name": row["name"], "created_at": int(row["created"]),
        "tax_id": row["tax_id"] or None, "tax_bps": row["tax_bps"], **_suspended(row),
        "balance": wallet.pockets(db, customer, state.ledger.clock()),
        "limits": billing.shown_limits(state, customer, tier, recharged, given),
        "by_hand": {"tier": by_hand[0], **asdict(by_hand[1])},
        "subscription": billing.shown_subscription(state, customer) if subscribed else None,
        "payments": [wallet.shown_payment(p) for p in reversed(state.payments.payments(customer))],
        "projects": [{"id": p["id"], "name": p["name"], "archived": p["archived"] is not None} for p in state.accounts.projects(customer)],
        "members": [{"id": m["id"], "email": m["email"], "role": m["role"]} for m in state.accounts.members(customer)],
        "keys": [{**organization.shown_key(k), "revoked": k.revoked is not None} for k in state.keys.list(customer)],
    }  # fmt: skip


async def its_receipts(state: ServiceState, request: Request) -> dict[str, Any]:
    authenticate(state, request, "", role="admin")
    customer = _known(state, request.path_params["id"])["id"]
    after, limit, _ = files.paging(request)
    found, more = await asyncio.to_thread(
        receipts.page, state.ledger.db, customer, {}, after=after, limit=min(limit, 200)
    )
    return files.listing(found, more)


async def grant(state: ServiceState, request: Request) -> dict[str, Any]:
    """A voucher; the same name is never given twice. The log says who gave it."""
    key, body = await _asked(state, request, _voucher)
    customer = _known(state, request.path_params["id"])["id"]
    if not body.name or len(body.name) > 128:
        raise invalid_request("a voucher needs a name of at most 128 characters", "name")
    expires = None if body.expires_at is None else float(body.expires_at)

    def logged(books: Books) -> None:
        log(books.execute, customer, key.id, "voucher.granted", body.name, {"usd": body.usd}, books.now)

    with bad_request():
        given = await asyncio.to_thread(
            state.ledger.grant, customer, nano(body.usd), lot=body.name, expires=expires, also=logged
        )
    if not given:
        raise conflict(f"the voucher {body.name!r} was given before; nothing changed", "voucher_exists")
    return {
        "object": "voucher",
        "name": body.name,
        "balance": wallet.pockets(state.ledger.db, customer, state.ledger.clock()),
    }


async def limit(state: ServiceState, request: Request) -> dict[str, Any]:
    """Tier and limits set by hand; all null: the tier's again."""
    key, body = await _asked(state, request, _limits)
    customer = _known(state, request.path_params["id"])["id"]
    with bad_request():
        limits = Limits(body.concurrency, body.requests, body.tokens, body.day_tokens)
        await asyncio.to_thread(state.tiers.set_caps, customer, limits, "", body.tier, key.id)
    return billing.shown_limits(state, customer, *state.tiers.standing(customer))


async def suspend(state: ServiceState, request: Request) -> dict[str, Any]:
    """Its keys are refused at once here and within a second elsewhere. Whoever does it cannot lock themselves out."""
    key, body = await _asked(state, request, _suspension)
    customer = request.path_params["id"]
    if customer == key.customer:
        raise conflict("this key belongs to that organization; use another's, or a terminal", "own_organization")
    with bad_request():
        await asyncio.to_thread(suspension.suspend, state.ledger, customer, body.reason, key.id)
    return _changed(state, customer)


async def resume(state: ServiceState, request: Request) -> dict[str, Any]:
    key, customer = authenticate(state, request, "", role="admin"), request.path_params["id"]
    with bad_request():
        await asyncio.to_thread(suspension.resume, state.ledger, customer, key.id)
    return _changed(state, customer)


def _changed(state: ServiceState, customer: str) -> dict[str, Any]:
    state.keys.forget()
    return {"object": "organization", "id": customer, **_suspended(_known(state, customer))}


def _suspended(row: Any) -> dict[str, Any]:
    since = row["suspended"]
    return {"suspended_at": None if since is None else int(since), "suspended_for": row["suspended_for"] or None}


async def ledger(state: ServiceState, request: Request) -> dict[str, Any]:
    """Recomputes every sum, balance and hash chain, as `tidelock admin verify` does; one at a time, because it reads all."""
    authenticate(state, request, "", role="admin")

    def verify() -> dict[str, Any]:
        begun = time.monotonic()
        with state.ledger.db.snapshot() as read:
            found, root = audit_and_root(read)
        ms = int((time.monotonic() - begun) * 1000)
        return {
            "object": "ledger.audit",
            **asdict(found),
            "sound": found.sound,
            "root": root,
            "verified_at": int(time.time()),
            "took_ms": ms,
        }

    async with _verifying:
        return await asyncio.to_thread(verify)


async def prices(state: ServiceState, request: Request) -> dict[str, Any]:
    """Every version that was ever registered; `current` is what new requests pay."""
    authenticate(state, request, "", role="admin")
    rows = state.ledger.db.read("SELECT version, effective, book FROM price_versions ORDER BY effective DESC, version")
    current = state.prices.now.version
    shown = [{"id": r[0], "effective_at": int(r[1]), "current": r[0] == current, **json.loads(r[2])} for r in rows]
    return files.listing(shown, False)


async def plans(state: ServiceState, request: Request) -> dict[str, Any]:
    authenticate(state, request, "", role="admin")
    found = [
        {**wallet.shown_plan(p), "seats": p["seats"], "sold": p["sold"], "waiting": p["waiting"]}
        for p in state.plans.plans()
    ]
    return files.listing(found, False)


async def audit_logs(state: ServiceState, request: Request) -> dict[str, Any]:
    """Of one `organization`, or of what concerns the whole service."""
    authenticate(state, request, "", role="admin")
    after, limit, _ = files.paging(request)
    entries, more = state.accounts.audit_log(
        request.query_params.get("organization", ""), after=after, limit=min(limit, 200)
    )
    return files.listing([organization.shown_entry(e) for e in entries], more)


def nano(usd: str) -> int:
    """Raises ApiError (400)."""
    value = exact_nano(usd)
    if value is not None and 0 < value < 2**62:
        return value
    raise invalid_request(f"{usd[:40]!r} is no positive amount in USD with at most nine decimals", "usd")


def _known(state: ServiceState, customer: str) -> Any:
    rows = state.ledger.db.read("SELECT * FROM organizations WHERE id = ?", (customer,))
    if not rows:
        raise UnknownId(f"no organization {customer!r}")
    return rows[0]


async def _asked(state: ServiceState, request: Request, decoder: msgspec.json.Decoder) -> tuple[Key, Any]:
    key = authenticate(state, request, "", role="admin")
    return key, wire.decode(await read_body(request, state.max_body_bytes), decoder)
