"""Who is asking, and whether they may: the key behind `Authorization: Bearer sk-…` (or Anthropic clients' `x-api-key`)."""

from __future__ import annotations

from starlette.requests import Request

from tidelock.service import errors
from tidelock.service.keys import Key
from tidelock.service.state import ServiceState

KEY_IN_SCOPE = "tidelock.key"


def authenticate(state: ServiceState, request: Request, scope: str = "model", *, role: str | None = None) -> Key:
    """Raises ApiError: 401 without a live key, 429 to an address that guesses keys, 403 if the key may not do this
    (`scope`; "" for what every key may), may not come from there, or has another role than `role`."""
    scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
    secret = bearer.strip() if scheme.lower() == "bearer" else request.headers.get("x-api-key", "")
    if not secret:
        raise errors.invalid_key()
    address = request.client.host if request.client else ""
    if wait_s := state.guesses.wait_s(address):
        raise errors.guessing(wait_s)
    key = state.keys.authenticate(secret)
    if key is None:
        state.guesses.wrong(address)
        raise errors.invalid_key()
    if not key.admits(address):
        raise errors.permission_denied(f"this key may not be used from {address or 'there'}")
    if scope and scope not in key.scopes:
        raise errors.permission_denied(f"this key does not have the scope {scope!r}")
    if role is not None and key.role != role:
        raise errors.permission_denied(f"this needs a key with role {role}")
    request.scope[KEY_IN_SCOPE] = key
    return key
