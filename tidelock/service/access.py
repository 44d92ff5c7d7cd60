"""Every HTTP request on its way through: given its id, counted, timed, and told of at its end in one log line.

This is the outermost layer, so whatever goes wrong inside is in the line, under the same id the client was told.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tidelock.service.auth import KEY_IN_SCOPE
from tidelock.service.metrics import route_of
from tidelock.service.record import Record, new_id, recording
from tidelock.service.state import ServiceState

PROBES = ("/health", "/metrics")  # asked every few seconds by machines; in the log at level debug only


def watched(app: ASGIApp, state: ServiceState) -> ASGIApp:
    answered = state.metrics.responses.add

    async def watch(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        record = Record(new_id(), state.tracing)

        async def seen(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                answered(route_of(scope), str(record.status))
            await send(message)

        with recording(record):
            if state.tracing is not None:
                record.span = state.tracing.request(scope)
            try:
                await app(scope, receive, seen)
            except BaseException as error:
                record.failed(type(error).__name__)
                raise
            finally:
                _end(state, record, scope)

    return watch


@contextmanager
def background(
    state: ServiceState, kind: str, customer: str, key: str, request_id: str | None = None
) -> Iterator[Record]:
    """The same for a request that came another way than by HTTP, `kind` being which, or goes on after it."""
    record = Record(request_id or new_id(), state.tracing)
    record.customer, record.key = customer, key
    with recording(record):
        if state.tracing is not None:
            record.span = state.tracing.request({})
        try:
            yield record
        finally:
            _tell(state, record, "", kind)


def _end(state: ServiceState, record: Record, scope: Scope) -> None:
    key = scope.get(KEY_IN_SCOPE)
    if key is not None:
        record.customer, record.key = key.customer, key.id
    _tell(state, record, scope["method"], route_of(scope))


def _tell(state: ServiceState, record: Record, method: str, route: str) -> None:
    if state.access_log is not None:
        state.access_log.say(told(record, method, route), "debug" if route in PROBES else "info")
    if record.span is not None:
        record.tracing.finish(record, method, route)


def told(record: Record, method: str, route: str) -> dict[str, Any]:
    """The access line's fields. Milliseconds; what did not happen is left out."""
    line: dict[str, Any] = {"request_id": record.request_id, "method": method, "route": route, "status": record.status}
    for name in ("customer", "key", "model", "finish_reason", "error"):
        if value := getattr(record, name):
            line[name] = value
    if (used := record.counts) is not None:
        line |= {"prompt_tokens": used.prompt, "cached_tokens": used.cached, "completion_tokens": used.completion,
                 "nano_usd": record.nano_usd}  # fmt: skip
        if used.cache_write_5m or used.cache_write_1h:
            line |= {"cache_write_5m_tokens": used.cache_write_5m, "cache_write_1h_tokens": used.cache_write_1h}
    if record.first_token_s is not None:
        line["first_token_ms"] = _ms(record.first_token_s)
    if (times := record.times) is not None:
        for name, spent in (("queue", times.queued_s), ("prefill", times.prefill_s), ("decode", times.decode_s)):
            if spent is not None:
                line[f"{name}_ms"] = _ms(spent)
    for name, seconds in record.seconds.items():
        line[f"{name}_ms"] = _ms(seconds)
    line["total_ms"] = _ms(perf_counter() - record.began)
    return line


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
