"""How long a request was in the engine's own line, in its prompt and in its answer: from a real scheduler over the wire into
span, log line, receipt and histogram; and nothing anywhere where nobody tells."""

import asyncio
import math
import time

import httpx2 as httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_logs import access, log  # noqa: F401  (a fixture)
from test_metrics import scrape
from test_real_engine import running

from tidelock.remote import TokenPolicy
from tidelock.service import receipts
from tidelock.service.answer import Sample
from tidelock.service.reported import engine_ms
from tidelock.tokens.policy import Chunk, SamplingParams, Times

SECONDS = st.none() | st.floats(0, 1e5)


@given(SECONDS, SECONDS, SECONDS)
def test_what_travels_is_what_was_measured(queued, prefill, decode):
    times = Times(queued, prefill, decode)
    back = Times.of(times.metrics())
    if times == Times():
        assert back is None
    else:
        for a, b in zip((queued, prefill, decode), (back.queued_s, back.prefill_s, back.decode_s), strict=True):
            assert a is b is None or math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-6)


@pytest.mark.parametrize("metrics", [
    None, [], {}, "x", {"queue_time_ms": "7"}, {"queue_time_ms": -1}, {"queue_time_ms": float("nan")},
    {"time_to_first_token_ms": None}, {"tokens_per_second": 3.0},
])  # fmt: skip
def test_what_is_no_time_is_untold(metrics):
    assert Times.of(metrics) is None


def test_who_waits_behind_another_says_how_long_by_the_engine_and_through_the_token_routes(tmp_path):
    with running(tmp_path, max_batch=1) as (state, url):
        _, secret = state.keys.create("boss", role="admin")
        remote = TokenPolicy(url.removesuffix("/v1"), secret)
        params = SamplingParams(max_tokens=40, seed=1)

        async def ask(policy, n):
            began = time.perf_counter()
            chunks = [c async for c in policy.generate([n, 5, 6, 7] * 20, params)]
            assert all(c.times is None for c in chunks[:-1])
            return chunks[-1].times, time.perf_counter() - began

        async def work(policy):
            await ask(policy, 1)  # for the buffers
            return await asyncio.gather(*(ask(policy, n) for n in range(3)))

        for policy in (state.policy, remote):
            asked = asyncio.run(work(policy))
            for times, took_s in asked:
                parts = (times.queued_s, times.prefill_s, times.decode_s)
                assert all(part >= 0 for part in parts) and sum(parts) <= took_s + 0.001
                assert times.prefill_s > 0 and times.decode_s > 0
            first, second, third = sorted((times for times, _ in asked), key=lambda t: t.queued_s)
            ran = [times.prefill_s + times.decode_s for times in (first, second)]
            assert first.queued_s < 0.5 * ran[0] <= second.queued_s and third.queued_s >= second.queued_s + 0.5 * ran[1]


def test_a_request_that_never_ran_was_in_line_all_the_time(tmp_path):
    with running(tmp_path, max_batch=1) as (state, _):

        async def work():
            long = asyncio.create_task(anext(aiter(state.policy.generate([1, 2], SamplingParams(max_tokens=1500), "long"))))
            await long
            waiting = state.policy.generate([3, 4], SamplingParams(max_tokens=9), "short")
            last = asyncio.create_task(anext(aiter(waiting)))
            await asyncio.sleep(0.2)
            await state.policy.abort("short")
            times = (await last).times
            await state.policy.abort("long")
            return times

        times = asyncio.run(work())
        assert times.queued_s >= 0.19 and times.prefill_s is times.decode_s is None


TOLD = Times(0.25, 0.5, 1.5)
ASK = {"model": "tide", "messages": [{"role": "user", "content": "hi"}]}


def post(service, secret, **options):
    headers = {"authorization": f"Bearer {secret}"}
    answer = httpx.post(service.running.base_url + "/chat/completions", json={**ASK, **options}, headers=headers)
    assert answer.status_code == 200
    return answer.headers["x-request-id"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("times", [None, TOLD, Times(None, 0.5)])
def test_it_is_in_the_receipt_the_line_and_the_histogram_or_nowhere(service, log, stream, times):  # noqa: F811
    service.policy.times = times
    request_id = post(service, service.key(), stream=stream)
    service.wait(lambda: access(log))
    (line,) = access(log)
    parts = () if times is None else (times.queued_s, times.prefill_s, times.decode_s)
    told = {name: int(s * 1000) for name, s in zip(("queue_ms", "prefill_ms", "decode_ms"), parts) if s is not None}
    assert {n: line[n] for n in ("queue_ms", "prefill_ms", "decode_ms") if n in line} == told
    latency = receipts.one(service.state.ledger.db, "ann", request_id)["latency"]
    assert {n: latency[n] for n in ("queue_ms", "prefill_ms", "decode_ms") if latency[n] is not None} == told
    m = scrape(service)
    assert m["tidelock_engine_queue_seconds_count",] == ("queue_ms" in told)
    assert m["tidelock_engine_prefill_seconds_count",] == ("prefill_ms" in told)
    if "queue_ms" in told:
        assert m["tidelock_engine_queue_seconds_sum",] == 0.25


def test_it_is_on_the_policy_s_span_by_the_names_of_the_conventions(service):
    pytest.importorskip("opentelemetry.sdk")
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    from tidelock.service.tracing import Tracing

    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    service.state.tracing = Tracing(provider)
    secret = service.key()
    for times, there in ((TOLD, (0.25, 0.5, 1.5)), (None, ())):
        exporter.clear()
        service.policy.times = times
        post(service, secret)
        service.wait(lambda: any(s.name.startswith("POST") for s in exporter.get_finished_spans()))
        (span,) = [s for s in exporter.get_finished_spans() if s.name == "chat tide"]
        names = [f"gen_ai.latency.time_in_{part}" for part in ("queue", "model_prefill", "model_decode")]
        assert tuple(span.attributes[n] for n in names if n in span.attributes) == there
        assert 0 < span.attributes["gen_ai.response.time_to_first_chunk"] < 10


def test_of_several_answers_the_one_that_waited_longest_counts():
    samples = []
    for times in (Times(0.1, 1.0, 2.0), None, Times(0.4, 0.2, 0.3), Times(0.2, 9.0, 9.0)):
        samples.append(Sample())
        samples[-1].add(Chunk((1,), (0.0,), 1, "stop", times=times))
    assert engine_ms(samples) == (400, 200, 300) and engine_ms(samples[1:2]) == (None, None, None)
