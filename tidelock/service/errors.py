"""Errors as clients expect them: `{"error": {type, message, code, param}}` on the OpenAI and Kimi surfaces,
`{"type": "error", "error": {type, message}, "request_id"}` on Anthropic's.

`x-should-retry: false` keeps the official clients from sending a hopeless request three times.
"""

from __future__ import annotations

from typing import Any

from tidelock.service.limiter import SHORT, RateLimited
from tidelock.service.limits import limit_headers

ANTHROPIC_KINDS = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error", 504: "timeout_error",
}  # fmt: skip


class ApiError(Exception):
    """An answer other than 200. `kind` is `error.type`."""

    def __init__(
        self,
        status: int,
        kind: str,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry: bool | None = None,
        retry_after_s: int | None = None,
        more_headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.message = message
        self.code = code
        self.param = param
        self.retry = retry
        self.retry_after_s = retry_after_s
        self.more_headers = more_headers or {}
        self.bill: Any = None  # an `answer.Bill`, once a client was charged for the answer that then failed

    def body(self) -> dict[str, Any]:
        return {"error": {"type": self.kind, "message": self.message, "code": self.code, "param": self.param}}

    def anthropic(self, request_id: str) -> tuple[int, dict[str, Any]]:
        """(status, body); an overloaded engine is 529 there."""
        kind = ANTHROPIC_KINDS.get(self.status, "api_error" if self.status >= 500 else "invalid_request_error")
        if self.kind == "exceeded_current_quota_error":
            kind = "billing_error"  # what the money is missing for is not a matter of rates, whatever the status
        body = {"type": "error", "error": {"type": kind, "message": self.message}, "request_id": request_id}
        return (529 if self.status == 503 else self.status), body

    def headers(self) -> dict[str, str]:
        headers = dict(self.more_headers)
        if self.retry is not None:
            headers["x-should-retry"] = "true" if self.retry else "false"
        if self.retry_after_s is not None:
            headers["retry-after"] = str(self.retry_after_s)
        return headers


def invalid_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, "invalid_request_error", message, param=param, code=code)


def invalid_key() -> ApiError:
    message = "the API key is missing, wrong or revoked; send it as `Authorization: Bearer sk-…`"
    return ApiError(401, "invalid_authentication_error", message, code="invalid_api_key")


def rate_limited(customer: str, key_id: str, reached: RateLimited) -> ApiError:
    """In Kimi's words."""
    name, where = SHORT[reached.which], f"Your account {customer}<{key_id}> request reached"
    message = f"{where} {name} rate limit, current:{reached.current}, limit:{reached.limit}"
    if reached.which == "concurrency":
        message = f"{where} max concurrency, current:{reached.current}, limit:{reached.limit}"
    if reached.retry_s is not None:
        message += f", please try again after {reached.retry_s} seconds"
    return ApiError(
        429, "rate_limit_reached_error", message, code="rate_limit_exceeded", retry=reached.retry_s is not None,
        retry_after_s=reached.retry_s, more_headers=limit_headers(reached.standing),
    )  # fmt: skip


def guessing(wait_s: int) -> ApiError:
    message = f"too many wrong API keys came from your address; try again in {wait_s} s"
    return ApiError(429, "rate_limit_reached_error", message, code="too_many_wrong_keys", retry=False, retry_after_s=wait_s)


def permission_denied(message: str) -> ApiError:
    return ApiError(403, "permission_denied_error", message)


def suspended(reason: str) -> ApiError:
    """The key is good, and nothing is done for who has it: 403 in every dialect, and no use trying again."""
    message = f"your organization is suspended: {reason}"
    return ApiError(403, "permission_denied_error", message, code="organization_suspended", retry=False)


def not_found(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(404, "resource_not_found_error", message, param=param, code=code)


def conflict(message: str, code: str, *, retry: bool = False) -> ApiError:
    return ApiError(409, "conflict_error", message, code=code, retry=retry, retry_after_s=1 if retry else None)


def too_large(limit: int) -> ApiError:
    return ApiError(413, "invalid_request_error", f"the body is larger than {limit} bytes", code="request_too_large")


# Clients know an empty account by words as well as by type: Kimi's by "insufficient balance", Anthropic's by the rest.
# No word of it may be "exhausted" or "unavailable", which OpenCode takes for an overload and tries again.
EMPTY = "insufficient balance: your credit balance is too low"


def insufficient_balance() -> ApiError:
    message = f"{EMPTY} for this prompt and one token of answer; top up the account and try again"
    return ApiError(429, "exceeded_current_quota_error", message, code="insufficient_quota", retry=False)


def budget_reached(midway: bool = False) -> ApiError:
    what = "any more of this answer; what you were sent is charged" if midway else "this request"
    message = f"a monthly budget of your organization, project or key does not cover {what}; raise it, or wait for the next month"
    return ApiError(429, "exceeded_current_quota_error", message, code="budget_reached", retry=False)


def balance_exhausted() -> ApiError:
    message = f"{EMPTY} to go on with this answer; what you were sent is charged, and nothing more"
    return ApiError(429, "exceeded_current_quota_error", message, code="insufficient_quota", retry=False)


def storage_down() -> ApiError:
    message = "the books cannot be reached, so nothing is served; try again in a moment"
    return ApiError(503, "server_unavailable", message, code="storage_down", retry_after_s=1)


def policy_failed(message: str, status: int, kind: str) -> ApiError:
    overloaded = status in (429, 503)
    return ApiError(status, kind, message, retry_after_s=1 if overloaded else None)


def timed_out(seconds: float) -> ApiError:
    return ApiError(504, "timeout_error", f"the answer was not finished within {seconds:g} s", retry=False)


def internal() -> ApiError:
    return ApiError(500, "server_error", "the server failed on this request; the request id is in the headers")
