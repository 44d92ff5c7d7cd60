"""Signed webhooks: `t=1700000000,v1=HEX`, where HEX is HMAC-SHA-256 of `t.payload` under a secret both sides know.

Several secrets count at once, so that one can be replaced without losing an event.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from pathlib import Path

from tidelock.tokens.errors import UserError

TOLERANCE_S = 300


class Forged(UserError):
    """The signature is not one of ours, or too old to trust."""


def sign(payload: bytes, secret: str, when: int) -> str:
    """The header's value."""
    return f"t={when},v1={_hmac(payload, secret, str(when))}"


def verify(payload: bytes, header: str, secrets: Sequence[str], now: float, tolerance_s: float = TOLERANCE_S) -> None:
    """Raises Forged."""
    parts = [part.strip().partition("=") for part in header.split(",")]
    times = [value for name, _, value in parts if name == "t"]
    given = [value for name, _, value in parts if name == "v1"]
    if len(times) != 1 or not times[0].isascii() or not times[0].isdecimal() or len(times[0]) > 12 or not given:
        raise Forged("the signature header is not of the form t=…,v1=…")
    expected = [_hmac(payload, secret, times[0]) for secret in secrets]
    genuine = False
    for value in given:
        for ours in expected:  # all of them, in the same time whichever it is
            genuine |= hmac.compare_digest(value.encode(), ours.encode())
    if not genuine:
        raise Forged("the signature does not fit")
    if abs(now - int(times[0])) > tolerance_s:
        raise Forged(f"the event was signed more than {tolerance_s:g} s ago, or in the future")


def read_secrets(path: str | Path) -> tuple[str, ...]:
    """One a line, the newest anywhere; none if there is no file."""
    try:
        lines = Path(path).read_text().splitlines()
    except FileNotFoundError:
        return ()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    return tuple(line.strip() for line in lines if len(line.strip()) >= 16)


def _hmac(payload: bytes, secret: str, when: str) -> str:
    return hmac.new(secret.encode(), when.encode() + b"." + payload, hashlib.sha256).hexdigest()
