"""Who is asking: the key behind `Authorization: Bearer sk-…` (or the `x-api-key` of Anthropic-style clients)."""

from __future__ import annotations

from starlette.requests import Request

from tidelock.service import errors
from tidelock.service.keys import Key
from tidelock.service.state import ServiceState


def authenticate(state: ServiceState, request: Request, role: str | None = None) -> Key:
    """Raises ApiError: 401 without a live key, 403 if the key's role is not `role`."""
    scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
    secret = bearer.strip() if scheme.lower() == "bearer" else request.headers.get("x-api-key", "")
    key = state.keys.authenticate(secret) if secret else None
    if key is None:
        raise errors.invalid_key()
    if role is not None and key.role != role:
        raise errors.permission_denied(f"this needs a key with role {role}")
    return key
