"""OpenTelemetry traces of requests, for `tidelock serve --otel URL`. Nothing imports this module unless they are on.

A request is a server span; under it are the hold of its money, the policy's work (with the moment of the first token), the
settlement and the write of the trace. A client's W3C `traceparent` makes the request part of the client's trace, and an
upstream is told the policy span's. An error is recorded by its type; its words may quote a client and are not.
"""

from __future__ import annotations

from collections.abc import Mapping
from time import perf_counter, time_ns
from typing import Any

from tidelock.service import genai
from tidelock.service.record import Record
from tidelock.tokens.errors import UserError
from tidelock.tokens.policy import Times
from tidelock.tokens.propagation import outgoing

try:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ImportError as error:
    raise UserError("traces need OpenTelemetry: pip install 'tidelock[otel]'") from error

POLICY = "generate"  # the step that is the policy's work


class Tracing:
    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("tidelock")
        self._w3c = TraceContextTextMapPropagator()

    @staticmethod
    def to(url: str, timeout_s: float = 5.0) -> Tracing:
        """Spans go to an OTLP/HTTP collector, in the background, in batches; those it does not take are dropped."""
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        if not url.startswith(("http://", "https://")):
            raise UserError(f"{url!r} is no OTLP/HTTP collector; write http://HOST:4318")
        endpoint = url if url.endswith("/v1/traces") else url.rstrip("/") + "/v1/traces"
        provider = TracerProvider(resource=Resource.create({"service.name": "tidelock"}))
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint, timeout=timeout_s)))
        return Tracing(provider)

    # ---- a request ---------------------------------------------------------------------------------------------

    def request(self, scope: Mapping[str, Any]) -> Span:
        """Of an ASGI scope; its name and attributes are known at its end."""
        carrier = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope.get("headers", ())
                   if name in (b"traceparent", b"tracestate")}  # fmt: skip
        return self._tracer.start_span("request", context=self._w3c.extract(carrier), kind=SpanKind.SERVER)

    def finish(self, record: Record, method: str, route: str) -> None:
        span = record.span
        span.update_name(f"{method} {route}".strip())
        span.set_attributes({genai.REQUEST_ID: record.request_id, genai.ROUTE: route, genai.STATUS: record.status})
        for name, value in ((genai.METHOD, method), (genai.ORGANIZATION, record.customer), (genai.KEY, record.key),
                            (genai.MODEL, record.model), (genai.ERROR, record.error)):  # fmt: skip
            if value:
                span.set_attribute(name, value)
        if (used := record.counts) is not None:
            span.set_attributes({genai.BILLED_INPUT: used.prompt, genai.BILLED_OUTPUT: used.completion,
                                 genai.CACHE_READ_TOKENS: used.cached, genai.COST: record.nano_usd,
                                 genai.CACHE_WRITE_TOKENS: used.cache_write_5m + used.cache_write_1h,
                                 genai.FINISH_REASONS: [record.finish_reason]})  # fmt: skip
        if record.error or record.status >= 500:
            span.set_status(Status(StatusCode.ERROR, record.error))
        span.end()

    # ---- its parts ---------------------------------------------------------------------------------------------

    def begin(self, name: str, record: Record, at: float | None = None) -> Span:
        """A child of the request. The policy's is what an upstream's spans will hang under. `at`: of `perf_counter`, now if
        unsaid."""
        parent = None if record.span is None else set_span_in_context(record.span)
        if name != POLICY:
            return self._tracer.start_span(name, context=parent, start_time=_epoch_ns(at))
        span = self._tracer.start_span(f"{genai.CHAT} {record.model}".strip(), context=parent, kind=SpanKind.CLIENT)
        span.set_attributes({genai.OPERATION: genai.CHAT, genai.PROVIDER: "tidelock", genai.MODEL: record.model})
        headers: dict[str, str] = {}
        self._w3c.inject(headers, context=set_span_in_context(span))
        outgoing.set(headers)
        return span

    def first_token(self, span: Span, after_s: float) -> None:
        span.add_event(genai.FIRST_TOKEN)
        span.set_attribute(genai.FIRST_CHUNK, after_s)

    def timed(self, span: Span, times: Times) -> None:
        """What the engine says of its own part, in seconds."""
        told = ((genai.QUEUED, times.queued_s), (genai.PREFILL, times.prefill_s), (genai.DECODE, times.decode_s))
        span.set_attributes({name: seconds for name, seconds in told if seconds is not None})

    def generated(self, span: Span, prompt_tokens: int, tokens: int, reason: str) -> None:
        span.set_attributes({genai.INPUT_TOKENS: prompt_tokens, genai.OUTPUT_TOKENS: tokens, genai.FINISH_REASONS: [reason]})

    def end(self, span: Span, error: BaseException | None, at: float | None = None) -> None:
        if error is not None and not isinstance(error, GeneratorExit):  # left early is no error
            name = getattr(error, "code", None) or getattr(error, "kind", None) or type(error).__name__
            span.set_attribute(genai.ERROR, name)
            span.set_status(Status(StatusCode.ERROR, name))
        span.end(_epoch_ns(at))

    def close(self) -> None:
        """Sends what is left, waiting a few seconds at most."""
        self._provider.force_flush(5000)
        self._provider.shutdown()


def _epoch_ns(at: float | None) -> int | None:
    return None if at is None else time_ns() - int((perf_counter() - at) * 1e9)
