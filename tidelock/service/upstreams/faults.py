"""What an upstream's failure means: whose fault it was, whether another may try, and what the client is told.

A client is told neither the upstream's address nor its words, except about its own mistakes. Those are not tried again;
a refusal for want of room is no sign of ill health; everything else counts against the upstream.
"""

from __future__ import annotations

from tidelock.tokens.policy import PolicyError

OWN_FAULT = (400, 413, 422)
NO_ROOM_S = 1.0  # an upstream that is full and does not say for how long is left alone for this
SAID = {
    "connect": "could not be reached",
    "first_token": "did not begin to answer in time",
    "stall": "stopped in the middle of the answer",
    "cut": "broke off in the middle of the answer",
    "malformed": "sent something that cannot be read",
    "abort": "ended the answer before its time",
}


def own_fault(error: PolicyError) -> bool:
    """The request itself is wrong, wherever it is sent. 401 to 404 are not: key and model are the operator's."""
    return error.status in OWN_FAULT


def rest_s(error: PolicyError) -> float | None:
    """How long the upstream is to be left alone; None: it did not refuse for want of room."""
    asked = getattr(error, "retry_after_s", None)
    if error.status == 429:
        return NO_ROOM_S if asked is None else asked
    return asked if error.status == 503 else None


def cause(error: PolicyError) -> str:
    """One word, for metrics and the log."""
    name = getattr(error, "cause", "status")
    return str(error.status) if name in ("status", "error_event") else name


def told(error: PolicyError) -> PolicyError:
    """As the client is to hear it."""
    if own_fault(error):
        words = str(error) if getattr(error, "quoted", True) else f"the model's server refused the request ({error.status})"
        return PolicyError(words, status=error.status, kind="invalid_request_error")
    if error.status == 429:
        return full()
    if error.status == 504:
        return PolicyError(f"the model's server {SAID.get(cause(error), SAID['stall'])}", status=504, kind="timeout_error")
    words = SAID.get(cause(error), f"failed ({error.status})")
    return PolicyError(f"the model's server {words}", status=503 if error.status == 503 else 502, kind="server_error")


def full() -> PolicyError:
    return PolicyError("the model's servers are at capacity; try again in a moment", status=429)


def down() -> PolicyError:
    return PolicyError("none of the model's servers can be reached; try again in a moment", status=503)
