"""What becomes known of one request while it runs: written down as it happens, read once at its end, by the access line
(`access`, `logs`) and the spans (`tracing`).

The record travels in a context variable, so what is deep below the HTTP layer (the money, the policy, the trace) can say
what it did without being handed anything. Outside of a request there is none, and saying something costs a look.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from time import perf_counter, time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tidelock.service.prices import Counts
    from tidelock.service.tracing import Tracing
    from tidelock.tokens.policy import Times

_current: ContextVar[Record | None] = ContextVar("tidelock_request", default=None)
WORD = re.compile(r"[A-Za-z0-9_.-]{1,64}")  # what an error's name looks like; anything else may quote a client


_unused_bits: list[str] = []
os.register_at_fork(after_in_child=_unused_bits.clear)  # or two processes would give out the same ones


def new_id() -> str:
    """Milliseconds since 1970 in 48 bits, then 80 random ones, as in UUID version 7 (RFC 9562, 5.7). Ids that sort by age go to
    the end of an index; random ones dirty another of its pages each, which took a sixth of the whole service. Asking the
    kernel for random bits is the dear part, so it is asked for many at once."""
    if not _unused_bits:
        digits = os.urandom(10 * 64).hex()
        _unused_bits.extend(digits[at : at + 20] for at in range(0, len(digits), 20))
    return f"req_{int(time() * 1000):012x}{_unused_bits.pop()}"


class Record:
    """`seconds` by step: hold, generate, settle, trace; `first_token_s` since the request came in. `counts` are what was
    billed, `nano_usd` what for. Never a key's secret, never a word of a prompt or an answer."""

    __slots__ = ("began", "counts", "customer", "error", "finish_reason", "first_token_s", "key", "model", "nano_usd",
                 "request_id", "seconds", "span", "status", "times", "tracing")  # fmt: skip

    def __init__(self, request_id: str, tracing: Tracing | None = None) -> None:
        self.request_id, self.tracing = request_id, tracing
        self.began = perf_counter()
        self.seconds: dict[str, float] = {}
        self.customer = self.key = self.model = self.finish_reason = self.error = ""
        self.status = 0
        self.first_token_s: float | None = None
        self.counts: Counts | None = None
        self.nano_usd = 0
        self.span: Any = None
        self.times: Times | None = None  # the engine's own

    def billed(self, counts: Counts, nano_usd: int, finish_reason: str) -> None:
        self.counts, self.nano_usd, self.finish_reason = counts, nano_usd, finish_reason

    def first(self, now: float, after_s: float, span: Any) -> None:
        """A token has come, so long after the policy was asked. Of several answers to one request the earliest counts."""
        if self.first_token_s is None:
            self.first_token_s = now - self.began
        if span is not None:
            self.tracing.first_token(span, after_s)

    def took(self, times: Times, span: Any) -> None:
        """What the engine says of one answer. Of several the one that was in line the longest counts."""
        if self.times is None or (times.queued_s or 0.0) > (self.times.queued_s or 0.0):
            self.times = times
        if span is not None:
            self.tracing.timed(span, times)

    def failed(self, name: str) -> None:
        """The error's code or kind; the first one said is what happened."""
        self.error = self.error or (name if WORD.fullmatch(name) else "unnamed")


def current() -> Record | None:
    return _current.get()


def request_id() -> str:
    """Of the request that is being answered; a new one outside of any."""
    record = _current.get()
    return record.request_id if record is not None else new_id()


@contextmanager
def recording(record: Record) -> Iterator[Record]:
    """What runs in the block, and every task it starts, belongs to this request."""
    token = _current.set(record)
    try:
        yield record
    finally:
        _current.reset(token)


class step:  # noqa: N801  (used as a statement: with step("hold"):)
    """Times a part of the current request, and is a span of its trace if it has one."""

    __slots__ = ("_began", "_name", "record", "span")

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> step:
        self.record, self.span = _current.get(), None
        if self.record is not None:
            self._began = perf_counter()
            if self.record.tracing is not None:
                self.span = self.record.tracing.begin(self._name, self.record)
        return self

    def become(self, name: str, at: float) -> None:
        """Since `at`, of `perf_counter`, it has been another step."""
        if self.record is None:
            return
        spent = self.record.seconds
        spent[self._name] = spent.get(self._name, 0.0) + at - self._began
        self._name, self._began = name, at
        if self.span is not None:
            self.record.tracing.end(self.span, None, at)
            self.span = self.record.tracing.begin(name, self.record, at)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if self.record is None:
            return
        spent = self.record.seconds
        spent[self._name] = spent.get(self._name, 0.0) + perf_counter() - self._began
        if self.span is not None:
            self.record.tracing.end(self.span, error)
