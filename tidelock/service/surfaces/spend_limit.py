"""`/v1/organization/spend_limit`: what an organisation may spend in a month, in OpenAI's admin shape (cents).

It is the organisation's hard budget (`budgets`): taken with the hold, given back with the bill.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from starlette.requests import Request

from tidelock.service import budget_rules, wire
from tidelock.service.auth import authenticate
from tidelock.service.http import read_body
from tidelock.service.keys import Key
from tidelock.service.state import ServiceState
from tidelock.service.surfaces.account import month_start, spent

CENT = 10_000_000  # nano-USD


class SpendLimitRequest(msgspec.Struct):
    """The body of `POST /v1/organization/spend_limit`."""

    threshold_amount: Annotated[int, msgspec.Meta(ge=0, le=10**11)]
    currency: Literal["USD"]
    interval: Literal["month"]


_decoder = msgspec.json.Decoder(SpendLimitRequest)


async def retrieve(state: ServiceState, request: Request) -> dict[str, Any]:
    """Without a limit of its own an organisation's limit is what it prepaid; either is enforced."""
    key = authenticate(state, request, "usage")
    nano_usd = _budget(state, key)["hard_nano_usd"]
    if nano_usd is None:
        nano_usd = state.ledger.balance(key.customer) + spent(state, key.customer, month_start())
    return _shown(nano_usd)


async def update(state: ServiceState, request: Request) -> dict[str, Any]:
    key = authenticate(state, request, "admin")
    asked: SpendLimitRequest = wire.decode(await read_body(request, state.max_body_bytes), _decoder)
    _set(state, key, asked.threshold_amount * CENT)
    state.budgeted = True
    return _shown(asked.threshold_amount * CENT)


async def delete(state: ServiceState, request: Request) -> dict[str, Any]:
    """A soft budget stays. Doing it again changes nothing."""
    key = authenticate(state, request, "admin")
    _set(state, key, None)
    return {"object": "organization.spend_limit.deleted", "deleted": True}


def _set(state: ServiceState, key: Key, hard_nano: int | None) -> None:
    soft = _budget(state, key)["soft_nano_usd"]
    budget_rules.set_budget(state.ledger.db, key.customer, "", soft, hard_nano, state.ledger.clock(), key.id)


def _budget(state: ServiceState, key: Key) -> dict[str, Any]:
    found = budget_rules.listed(state.ledger.db, key.customer, state.ledger.clock())
    return next((b for b in found if b["scope"] is None), {"soft_nano_usd": None, "hard_nano_usd": None})


def _shown(nano_usd: int) -> dict[str, Any]:
    return {
        "object": "organization.spend_limit", "threshold_amount": nano_usd // CENT, "currency": "USD", "interval": "month",
        "enforcement": {"status": "enforcing"},
    }  # fmt: skip
