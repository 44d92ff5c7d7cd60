"""What a customer has and may buy: the balance by pocket, payments, the plans on sale, and changing between them."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import msgspec
from starlette.requests import Request

from tidelock.service import wire
from tidelock.service.auth import authenticate
from tidelock.service.db import Database
from tidelock.service.errors import permission_denied
from tidelock.service.http import read_body
from tidelock.service.keys import Key
from tidelock.service.payments import takes
from tidelock.service.state import ServiceState
from tidelock.service.surfaces import billing, files
from tidelock.service.surfaces.account import whole
from tidelock.service.surfaces.organization import bad_request

POCKETS = ("cash", "voucher", "plan", "extra")
MOST_SEATS = 1_000_000


class PlanRequest(msgspec.Struct):
    """The body of `POST /v1/organization/subscription`."""

    plan: str
    quantity: Annotated[int, msgspec.Meta(ge=1, le=MOST_SEATS)] | None = None  # seats; null: as many as now, or the least


_plan = msgspec.json.Decoder(PlanRequest)


async def balance(state: ServiceState, request: Request) -> dict[str, Any]:
    """`GET /v1/organization/balance`: by pocket, and each voucher and plan period with its expiry."""
    key = authenticate(state, request, "usage")
    return pockets(state.ledger.db, key.customer, state.ledger.clock())


def pockets(db: Database, customer: str, now: float) -> dict[str, Any]:
    sql = "SELECT kind, lot, expires, balance_nano FROM accounts WHERE customer = ? AND balance_nano <> 0 ORDER BY kind, lot"
    sums, lots = dict.fromkeys((*POCKETS, "held", "receivable"), 0), []
    for kind, lot, expires, nano in db.read(sql, (customer,)):
        if kind in sums and (expires is None or expires > now):
            sums[kind] += nano
            if lot:
                lots.append(
                    {"kind": kind, "lot": lot, "nano_usd": nano, "expires_at": None if expires is None else int(expires)}
                )
    return {
        "object": "organization.balance",
        "available_nano_usd": sum(sums[kind] for kind in POCKETS),
        **{f"{kind}_nano_usd": sums[kind] for kind in POCKETS},
        "held_nano_usd": sums["held"],
        "owed_nano_usd": -sums["receivable"],
        "lots": lots,
    }


async def payments(state: ServiceState, request: Request) -> dict[str, Any]:
    """`GET /v1/organization/payments`, newest first."""
    key = authenticate(state, request, "billing")
    return files.listing([shown_payment(p) for p in reversed(state.payments.payments(key.customer))], False)


def shown_payment(p: dict[str, Any]) -> dict[str, Any]:
    disputed = any(takes(status) for _, status in p["disputes"].values())
    status = "disputed" if disputed else "refunded" if p["taken_nano"] else "paid"
    return {
        "object": "organization.payment",
        "id": p["id"],
        "created_at": int(p["created"]),
        "pocket": p["pocket"],
        "status": status,
        "net_nano_usd": p["net_nano"],
        "tax_nano_usd": p["tax_nano"],
        "returned_nano_usd": p["taken_nano"],
    }


async def plans(state: ServiceState, request: Request) -> dict[str, Any]:
    """`GET /v1/organization/plans`: what is sold, whether there is a seat, and which one the organisation has."""
    key = authenticate(state, request, "billing")
    has = state.plans.subscription(key.customer)
    return {**files.listing([shown_plan(p) for p in state.plans.plans()], False), "subscribed": has.plan if has else None}


def shown_plan(p: dict[str, Any]) -> dict[str, Any]:
    """Of each seat: the price of a term of `months`, the credits of one month."""
    return {
        "object": "plan",
        "id": p["name"],
        "months": p["months"],
        "least_quantity": p["least"],
        "most_quantity": p["most"],
        "price_nano_usd": p["price_nano"],
        "credits_nano_usd": p["credits_nano"],
        "five_hours_nano_usd": p["five_hours_nano"],
        "week_nano_usd": p["week_nano"],
        "available": p["sold"] + p["waiting"] + p["least"] <= p["seats"],
    }


async def preview(state: ServiceState, request: Request) -> dict[str, Any]:
    """`GET /v1/organization/plans/{id}/preview?quantity=`: what changing to so many seats of the plan would cost now, and
    from when until when it would count."""
    key = authenticate(state, request, "billing")
    plan, quantity = request.path_params["id"], whole(request.query_params.get("quantity"), "quantity", 1, MOST_SEATS)
    with bad_request():
        found = await asyncio.to_thread(state.plans.preview, key.customer, plan, quantity)
    return {
        "object": "organization.subscription.preview",
        "plan": plan,
        "kind": found.kind,
        "quantity": found.quantity,
        "charge_nano_usd": found.charge_nano,
        "unused_nano_usd": found.unused_nano,
        "effective_at": int(found.effective),
        "ends_at": int(found.ends),
    }


async def change(state: ServiceState, request: Request) -> dict[str, Any]:
    """`POST /v1/organization/subscription`: begins a plan, or changes to another. It spends the organisation's cash, so the
    billing scope, which most keys have, is not enough."""
    key = _owner(state, request)
    asked = wire.decode(await read_body(request, state.max_body_bytes), _plan)
    act = state.plans.change if state.plans.subscription(key.customer) else state.plans.subscribe
    with bad_request():
        await asyncio.to_thread(act, key.customer, asked.plan, key.id, asked.quantity)
    return billing.shown_subscription(state, key.customer)


async def cancel(state: ServiceState, request: Request) -> dict[str, Any]:
    """`DELETE /v1/organization/subscription`: with the end of the term."""
    key = _owner(state, request)
    await asyncio.to_thread(state.plans.cancel, key.customer, key.id)
    return billing.shown_subscription(state, key.customer)


def _owner(state: ServiceState, request: Request) -> Key:
    key = authenticate(state, request, "billing")
    if "admin" not in key.scopes:
        raise permission_denied("changing the plan needs a key with the scopes 'billing' and 'admin'")
    return key
