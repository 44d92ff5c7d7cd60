"""What is asked of a customer's books for one request, and what they answer."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct

from tidelock.service.ladder import Ladder
from tidelock.service.limiter import Standing
from tidelock.service.prices import Counts, Price

BURN_ORDER = ("voucher", "plan", "extra", "cash")  # of pockets; within a kind: what expires first, first


class InsufficientBalance(Exception):
    """The customer's pockets do not cover what was asked for."""


class BudgetReached(InsufficientBalance):
    """They do, and a hard budget does not."""


class Admission(Struct, frozen=True, gc=False):
    """What a request wants admitted: the prompt whole, and of `max_tokens` of answer as many as the pockets cover."""

    request_id: str
    customer: str
    key_id: str
    model: str
    price: Price
    price_version: str
    prompt_tokens: int
    max_tokens: int
    lifetime_s: float
    mode: str = ""
    least_tokens: int = 1  # of answer, or it is not worth beginning
    tools: Mapping[str, int] = {}
    burn: tuple[str, ...] = BURN_ORDER  # which pockets may pay, in order
    project: str = ""
    ladder: Ladder | None = None  # whose limits count; None: none do
    reserve: int = 0  # tokens, prompt and answer, that count against them
    budgeted: bool = False  # somebody has budgets: look whether they apply


class Hold(Struct, frozen=True, gc=False):
    """Money set aside for one request. It covers `max_tokens` of answer so far; `extend` covers more."""

    request_id: str
    customer: str
    key_id: str
    model: str
    price: Price
    price_version: str
    prompt_tokens: int
    max_tokens: int
    nano_usd: int
    mode: str = ""
    burn: tuple[str, ...] = BURN_ORDER
    standing: Standing = Standing()  # of the limits, right after this was admitted


class Upstream(Struct, frozen=True, gc=False):
    """Whose work a request was and what they say it used; stored beside the bill, to be compared with it. None: unsaid."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    name: str | None = None  # None: the engine in this process


class Latency(Struct, frozen=True, gc=False):
    """Milliseconds from a request's arrival: until the model was asked, until its first token, until the bill. And what the
    engine says of its own part: in its line, until its first token, from that to its last."""

    wait_ms: int | None = None
    first_ms: int | None = None
    total_ms: int | None = None
    queue_ms: int | None = None
    prefill_ms: int | None = None
    decode_ms: int | None = None


class Metered(Struct, frozen=True, gc=False):
    """What a request turned out to use, and why it ended."""

    counts: Counts
    finish_reason: str
    upstream: Upstream = Upstream()
    latency: Latency = Latency()
