"""OpenTelemetry: the spans of a request, into whose trace they go, and what a collector really receives."""

from __future__ import annotations

import http.server
import threading

import httpx2 as httpx
import pytest

from tidelock.remote.sse import Endpoint
from tidelock.service import genai
from tidelock.tokens.errors import UserError
from tidelock.tokens.propagation import outgoing

pytest.importorskip("opentelemetry.sdk")

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest  # noqa: E402
from opentelemetry.sdk.trace import TracerProvider  # noqa: E402
from opentelemetry.sdk.trace.export import SimpleSpanProcessor  # noqa: E402
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter  # noqa: E402
from opentelemetry.trace import SpanKind, StatusCode  # noqa: E402

from tidelock.service.tracing import Tracing  # noqa: E402

ASK = {"model": "tide", "messages": [{"role": "user", "content": "secret words"}]}
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Collector(http.server.BaseHTTPRequestHandler):
    """Keeps what is posted to it."""

    def do_POST(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.posts.append((self.path, headers, self.rfile.read(int(self.headers["content-length"]))))
        self.send_response(200)
        self.send_header("content-length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def collector():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    server.posts = []
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def spans(service):
    """The finished spans, by name."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    service.state.tracing = Tracing(provider)

    def finished():
        service.wait(lambda: any(span.kind == SpanKind.SERVER for span in exporter.get_finished_spans()))
        return {span.name: span for span in exporter.get_finished_spans()}

    return finished


def post(service, secret, body=ASK, **headers):
    headers = {"authorization": f"Bearer {secret}", **headers}
    return httpx.post(service.running.base_url + "/chat/completions", json=body, headers=headers)


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_a_tree_of_spans_with_tokens_and_cost(service, spans, stream):
    seen = []
    generate = service.policy.generate
    service.policy.generate = lambda *args: seen.append(dict(outgoing.get())) or generate(*args)
    service.policy.cached_tokens = 3
    answer = post(service, service.key(), {**ASK, "stream": stream}, traceparent=f"00-{TRACE}-{PARENT}-01")
    found = spans()
    assert set(found) == {"POST /v1/chat/completions", "hold", "chat tide", "settle", "trace"}
    root, policy = found["POST /v1/chat/completions"], found["chat tide"]
    (row,) = service.state.ledger.db.read("SELECT * FROM usage")
    assert root.attributes[genai.REQUEST_ID] == row["request_id"] == answer.headers["x-request-id"]
    assert (root.attributes[genai.COST], root.attributes[genai.CACHE_READ_TOKENS]) == (row["nano_usd"], 3)
    billed = (row["prompt_tokens"], row["completion_tokens"])
    assert (root.attributes[genai.BILLED_INPUT], root.attributes[genai.BILLED_OUTPUT]) == billed
    assert (policy.attributes[genai.INPUT_TOKENS], policy.attributes[genai.OUTPUT_TOKENS]) == billed
    assert (root.attributes[genai.ORGANIZATION], root.attributes[genai.STATUS]) == ("ann", 200)
    assert f"{root.context.trace_id:032x}" == TRACE and f"{root.parent.span_id:016x}" == PARENT
    assert all(span.context.trace_id == root.context.trace_id for span in found.values())
    assert all(span.parent.span_id == root.context.span_id for name, span in found.items() if span is not root)
    assert seen == [{"traceparent": f"00-{TRACE}-{policy.context.span_id:016x}-01"}]
    (first,) = [event for event in policy.events if event.name == genai.FIRST_TOKEN]
    order = [found["hold"].start_time, policy.start_time, first.timestamp, policy.end_time, found["settle"].start_time,
             found["trace"].start_time, root.end_time]  # fmt: skip
    assert order == sorted(order)
    assert all(span.status.status_code == StatusCode.UNSET for span in found.values())
    assert "secret" not in str([span.to_json() for span in found.values()])


@pytest.mark.parametrize("header", [None, "nonsense", f"00-{'0' * 32}-{PARENT}-01"])
def test_without_a_sound_traceparent_the_request_begins_a_trace(service, spans, header):
    post(service, service.key(), **({"traceparent": header} if header else {}))
    root = spans()["POST /v1/chat/completions"]
    assert root.parent is None and root.context.trace_id


def test_errors_are_recorded_by_type_where_they_happened(service, spans):
    service.policy.fail_after = 1
    assert post(service, service.key()).status_code == 503
    found = spans()
    root, policy = found["POST /v1/chat/completions"], found["chat tide"]
    assert root.attributes[genai.ERROR] == policy.attributes[genai.ERROR] == "engine_overloaded_error"
    assert root.status.status_code == policy.status.status_code == StatusCode.ERROR
    assert found["hold"].status.status_code == StatusCode.UNSET and "settle" not in found


def test_a_request_that_is_refused_has_a_span_too(service, spans):
    assert post(service, "sk-wrong").status_code == 401
    (root,) = spans().values()
    assert root.attributes[genai.ERROR] == "invalid_api_key" and "sk-wrong" not in root.to_json()


def test_an_unsampled_trace_stays_unsampled(service, spans):
    post(service, service.key(), traceparent=f"00-{TRACE}-{PARENT}-00")
    post(service, service.key("bob"))
    assert [f"{span.context.trace_id:032x}" for span in spans().values()].count(TRACE) == 0


def test_a_collector_receives_the_spans_over_otlp_http(service, collector):
    service.state.tracing = Tracing.to(f"http://127.0.0.1:{collector.server_port}")
    request_id = post(service, service.key()).headers["x-request-id"]
    service.wait(lambda: service.state.tracing._provider.force_flush() and "POST /v1/chat/completions" in _received(collector))
    service.state.tracing.close()
    path, headers, body = collector.posts[0]
    assert path == "/v1/traces" and headers["content-type"] == "application/x-protobuf"
    (resource,) = ExportTraceServiceRequest.FromString(body).resource_spans
    assert ("service.name", "tidelock") in {(a.key, a.value.string_value) for a in resource.resource.attributes}
    received = _received(collector)
    assert set(received) == {"POST /v1/chat/completions", "hold", "chat tide", "settle", "trace"}
    root = received["POST /v1/chat/completions"]
    told = {a.key: a.value for a in root.attributes}
    assert told[genai.REQUEST_ID].string_value == request_id and told[genai.COST].int_value > 0
    assert {span.parent_span_id for span in received.values() if span is not root} == {root.span_id}


def _received(collector):
    messages = [ExportTraceServiceRequest.FromString(body) for _, _, body in collector.posts]
    scopes = [scope for message in messages for resource in message.resource_spans for scope in resource.scope_spans]
    return {span.name: span for scope in scopes for span in scope.spans}


def test_a_collector_that_is_away_disturbs_nobody(service):
    service.state.tracing = Tracing.to("http://127.0.0.1:9", 0.2)
    assert post(service, service.key()).status_code == 200


def test_no_collector_is_one_clear_line():
    with pytest.raises(UserError, match="write http://HOST:4318"):
        Tracing.to("localhost:4318")


async def _call(port):
    outgoing.set({"traceparent": f"00-{TRACE}-{PARENT}-01"})
    return await Endpoint(f"http://127.0.0.1:{port}", "key").call("POST", "/x", {})


def test_remote_policies_carry_the_header_upstream(collector):
    import asyncio

    asyncio.run(_call(collector.server_port))
    assert collector.posts[0][1]["traceparent"] == f"00-{TRACE}-{PARENT}-01"
