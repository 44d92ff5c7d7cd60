"""What a customer reads of invoices, plan and limits, and where the payment provider's events arrive."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request

from tidelock.service import errors, invoices
from tidelock.service.auth import authenticate
from tidelock.service.gauges import gauges
from tidelock.service.http import read_body
from tidelock.service.ladder import Limits
from tidelock.service.payments import Changed
from tidelock.service.prices import format_usd
from tidelock.service.signature import read_secrets, verify
from tidelock.service.state import ServiceState
from tidelock.service.surfaces import files
from tidelock.tokens.errors import UserError

SIGNATURES = ("tidelock-signature", "stripe-signature")
MOST_BYTES = 1 << 20


async def listed(state: ServiceState, request: Request) -> dict[str, Any]:
    """`GET /v1/organization/invoices`, newest first."""
    key = authenticate(state, request, "billing")
    return files.listing([_shown(i) for i in invoices.listed(state.ledger.db, key.customer)], False)


async def retrieve(state: ServiceState, request: Request) -> dict[str, Any]:
    key = authenticate(state, request, "billing")
    return _shown(invoices.one(state.ledger.db, key.customer, request.path_params["id"]))


async def limits(state: ServiceState, request: Request) -> dict[str, Any]:
    """`GET /v1/organization/limits`: the tier, what it gives, and the caps of projects and keys."""
    key = authenticate(state, request, "usage")
    tier, recharged, given = state.tiers.standing(key.customer)
    return shown_limits(state, key.customer, tier, recharged, given)


def shown_limits(state: ServiceState, customer: str, tier: int | None, recharged: int, given: Limits) -> dict[str, Any]:
    """With the ladder it stands on, and how full each limit is now, by scope ("" is the organisation)."""
    capped = {scope: cap for scope, (_, cap) in state.tiers.caps(customer).items() if scope}
    ladder = state.tiers.ladder
    now = gauges(state.ledger.db, customer, {"": given, **capped}, state.ledger.clock())
    steps = [{"tier": n, "from_nano_usd": nano, "limits": asdict(limits)} for n, (nano, limits) in enumerate(ladder.tiers)]
    return {
        "object": "organization.limits", "tier": tier, "recharged": format_usd(recharged), "recharged_nano_usd": recharged,
        "limits": asdict(given), "caps": {scope: asdict(cap) for scope, cap in capped.items()},
        "ladder": {"name": ladder.name, "tiers": steps}, "now": now,
    }  # fmt: skip


async def subscription(state: ServiceState, request: Request) -> dict[str, Any]:
    """`GET /v1/organization/subscription`: the plan with its seats, until when the term runs, when the next month's credits
    come, and what comes after the term. Prices are a term's, credits a month's, of all seats. 404 without one."""
    key = authenticate(state, request, "billing")
    return shown_subscription(state, key.customer)


def shown_subscription(state: ServiceState, customer: str) -> dict[str, Any]:
    """Raises ApiError (404)."""
    sub = state.plans.subscription(customer)
    if sub is None:
        raise errors.not_found("there is no subscription")
    sold = {p["name"]: p for p in state.plans.plans()}
    plan, then, seats = sold[sub.plan], sold[sub.next_plan or sub.plan], sub.next_quantity or sub.quantity
    within = sub.month_ends < sub.ends  # the next month is paid already
    coming = plan["credits_nano"] * sub.quantity if within else 0 if sub.cancelled else then["credits_nano"] * seats
    windows = [
        {"span": span, "limit_nano_usd": a.limit_nano, "used_nano_usd": a.used_nano, "starts_at": int(a.started) or None,
         "ends_at": int(a.ends) or None}
        for (pocket, span), a in sorted(state.plans.allowances(customer).items()) if pocket == "plan"
    ]  # fmt: skip
    return {
        "object": "organization.subscription", "id": sub.id, "plan": sub.plan, "current_period_start": int(sub.begins),
        "current_period_end": int(sub.ends), "next_plan": None if sub.cancelled else sub.next_plan or sub.plan,
        "months": sub.months, "quantity": sub.quantity, "next_quantity": None if sub.cancelled else seats,
        "price_nano_usd": plan["price_nano"] * sub.quantity, "seat_price_nano_usd": plan["price_nano"],
        "renewal_nano_usd": None if sub.cancelled else then["price_nano"] * seats,
        "credits_nano_usd": plan["credits_nano"] * sub.quantity, "next_credits_at": int(sub.month_ends),
        "next_credits_nano_usd": coming,
        "credits_left_nano_usd": state.ledger.balances(customer).get("plan", 0), "windows": windows,
    }  # fmt: skip


async def webhook(state: ServiceState, request: Request) -> dict[str, Any]:
    """`POST /webhooks/payments`: no key but a signature. 200 says that the event is dealt with, for good."""
    body = await read_body(request, MOST_BYTES)
    header = next((request.headers[name] for name in SIGNATURES if name in request.headers), "")
    try:
        secrets = read_secrets(state.webhook_secrets)
        verify(body, header, secrets, state.ledger.clock())
        booked = await asyncio.to_thread(state.payments.event, body)
    except Changed as error:
        raise errors.conflict(str(error), "event_changed") from None
    except UserError as error:
        raise errors.invalid_request(str(error)) from None
    return {"received": True, "booked": booked}


def _shown(i: dict[str, Any]) -> dict[str, Any]:
    return {
        "object": "organization.invoice", "id": i["id"], "number": i["number"], "kind": i["kind"],
        "created_at": int(i["created"]), "date": f"{datetime.fromtimestamp(i['created'], UTC):%Y-%m-%d}",
        "currency": i["currency"], "billed_to": i["billed_to"], "tax_id": i["tax_id"] or None, "reference": i["reference"],
        "net": format_usd(i["net_nano"]), "tax": format_usd(i["tax_nano"]), "total": format_usd(i["total_nano"]),
        "net_nano_usd": i["net_nano"], "tax_nano_usd": i["tax_nano"], "total_nano_usd": i["total_nano"], "lines": i["lines"],
    }  # fmt: skip
