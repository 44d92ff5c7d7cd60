"""Who is asking, and whether they may. The key is the one behind `Authorization: Bearer sk-…` (or Anthropic clients'
`x-api-key`)."""

from __future__ import annotations

from starlette.requests import Request
from starlette.types import Scope

from tidelock.service import errors
from tidelock.service.keys import Key
from tidelock.service.state import ServiceState
from tidelock.service.wire import header

KEY_IN_SCOPE, FOUND = "tidelock.key", "tidelock.key.found"  # admitted; there is such a key


async def look_up(state: ServiceState, scope: Scope) -> None:
    """Brings the key from the database, off the event loop, for `authenticate`; not for an address that guesses."""
    secret = _secret(scope)
    if secret and not state.guesses.wait_s(_address(scope)):
        scope[FOUND] = await state.keys.look_up(secret)


def authenticate(state: ServiceState, request: Request, scope: str = "model", *, role: str | None = None) -> Key:
    """Raises ApiError: 401 without a live key, 429 to an address that guesses keys, 403 if the key may not do this
    (`scope`; "" for what every key may), may not come from there, has another role than `role`, or its organisation is
    suspended."""
    secret = _secret(request.scope)
    if not secret:
        raise errors.invalid_key()
    address = _address(request.scope)
    if wait_s := state.guesses.wait_s(address):
        raise errors.guessing(wait_s)
    key = request.scope.pop(FOUND, None) or state.keys.authenticate(secret)  # a wrong one is looked for again: rare
    if key is None:
        state.guesses.wrong(address)
        raise errors.invalid_key()
    if not key.admits(address):
        raise errors.permission_denied(f"this key may not be used from {address or 'there'}")
    if key.suspended:
        raise errors.suspended(key.suspended)
    if key.budgeted:
        state.budgeted = True  # this worker has not heard of any budget until its next heartbeat
    if scope and scope not in key.scopes:
        raise errors.permission_denied(f"this key does not have the scope {scope!r}")
    if role is not None and key.role != role:
        raise errors.permission_denied(f"this needs a key with role {role}")
    request.scope[KEY_IN_SCOPE] = key
    return key


def _secret(scope: Scope) -> str:
    scheme, _, bearer = header(scope, b"authorization").partition(" ")
    return bearer.strip() if scheme.lower() == "bearer" else header(scope, b"x-api-key")


def _address(scope: Scope) -> str:
    client = scope.get("client")
    return client[0] if client else ""
