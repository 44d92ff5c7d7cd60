"""What the server is doing, for Prometheus: the instruments, and a `Policy` that watches another.

Counts are of tokens and seconds as the policy hands them over, so every surface is covered by the one wrapper. No label
holds a customer, a key or a word of anybody's text; that is why /metrics needs no key, like /health.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily
from starlette.types import Scope

from tidelock.service.instruments import Count, Counts, Spread
from tidelock.service.record import step
from tidelock.tokens.policy import Chunk, Policy, PolicyError, SamplingParams, Times

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FAST = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)  # seconds between tokens
SLOW = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)  # of a request, or to its first token


class Metrics:
    """The instruments of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = r = CollectorRegistry()
        ProcessCollector(registry=r)
        self.now = {"waiting": 0, "running": 0}
        requests = Gauge("tidelock_requests", "Requests now", ["state"], registry=r)
        for state in self.now:
            requests.labels(state).set_function(lambda state=state: self.now[state])
        # what every request counts, in instruments that cost little
        self.prompt_tokens = Count("tidelock_prompt_tokens", "Prompt tokens of finished requests")
        self.cached_tokens = Count("tidelock_cached_tokens", "Of those, tokens not prefilled again")
        self.generated_tokens = Count("tidelock_generated_tokens", "Tokens sampled")
        self.finished = Counts("tidelock_requests_finished", "Requests by how they ended", ["reason"])
        self.responses = Counts("tidelock_http_responses", "HTTP responses", ["route", "status"])
        self.first = Spread("tidelock_time_to_first_token_seconds", "Arrival to first token", SLOW)
        self.between = Spread("tidelock_inter_token_latency_seconds", "Between tokens", FAST)
        self.whole = Spread("tidelock_request_seconds", "Arrival to last token", SLOW)
        self.queued = Spread("tidelock_engine_queue_seconds", "In the line of the engine that answered, as it says", SLOW)
        self.prefill = Spread("tidelock_engine_prefill_seconds", "From there to its first token, as it says", SLOW)
        for instrument in (self.prompt_tokens, self.cached_tokens, self.generated_tokens, self.finished, self.responses,
                           self.first, self.between, self.whole, self.queued, self.prefill):  # fmt: skip
            r.register(instrument)
        self.errors = Counter("tidelock_policy_errors", "Requests the policy could not answer", ["status"], registry=r)
        self.swaps = Counter("tidelock_weight_swaps", "Weight swaps", ["result"], registry=r)
        self.version = Gauge("tidelock_weights_version", "Weights that new requests get", registry=r)
        self.drift = Gauge("tidelock_reconciliation_drift_nano_usd", "What all discrepancies are worth", registry=r)
        self.discrepancies = Gauge("tidelock_reconciliation_discrepancies", "Found by the last run", registry=r)
        self.missing = Gauge("tidelock_reconciliation_rows_missing", "Of those, rows that are not there", registry=r)
        age = Gauge("tidelock_reconciliation_age_seconds", "Since the last run ended; NaN before the first", registry=r)
        age.set_function(lambda: time.time() - self._reconciled)
        self._reconciled = float("nan")

    def reconciled(self, finished: float, discrepancies: int, missing: int, drift_nano: int) -> None:
        self._reconciled = finished
        self.discrepancies.set(discrepancies)
        self.missing.set(missing)
        self.drift.set(drift_nano)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class Observed:
    """`policy`, watched. What is beyond `Policy` (pausing, say) is passed through untouched."""

    def __init__(self, policy: Policy, metrics: Metrics, version: int = -1) -> None:
        self._policy, self._metrics = policy, metrics
        metrics.version.set(version)
        if dataclasses.is_dataclass(getattr(policy, "stats", None)):
            metrics.registry.register(EngineStats(policy))
        if collector := getattr(policy, "collector", None):  # a pool's upstreams
            metrics.registry.register(collector())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)

    async def generate(
        self, prompt_ids: Sequence[int], params: SamplingParams, request_id: str | None = None
    ) -> AsyncIterator[Chunk]:
        watch = _Watch(self._metrics, len(prompt_ids))
        with step("generate") as part:
            try:
                async with aclosing(self._policy.generate(prompt_ids, params, request_id)) as chunks:
                    async for chunk in chunks:
                        watch.see(chunk, part)
                        yield chunk
            except PolicyError as error:
                self._metrics.errors.labels(str(error.status)).inc()
                watch.reason = "error"
                raise
            finally:
                watch.close(part)

    async def count(self, prompt_ids: Sequence[int]) -> int:
        return await self._policy.count(prompt_ids)

    async def abort(self, request_id: str) -> None:
        await self._policy.abort(request_id)

    async def swap(self, checkpoint: str, version: int, *args: Any) -> None:
        try:
            await self._policy.swap(checkpoint, version, *args)
        except Exception:
            self._metrics.swaps.labels("failed").inc()
            raise
        self._metrics.swaps.labels("done").inc()
        self._metrics.version.set(version)


class _Watch:
    """One request: waiting until its first token, then running until its end. Left early, its reason is "abandoned"."""

    def __init__(self, metrics: Metrics, prompt_tokens: int) -> None:
        self.m, self.prompt_tokens = metrics, prompt_tokens
        self.begun = self.last = time.perf_counter()
        self.state, self.reason, self.tokens = "waiting", "abandoned", 0
        self.m.now["waiting"] += 1

    def see(self, chunk: Chunk, part: step) -> None:
        now = time.perf_counter()
        if chunk.ids:
            self.m.generated_tokens.n += len(chunk.ids)
            self.tokens += len(chunk.ids)
            if self.state == "waiting":
                self._move("running")
                self.m.first.observe(now - self.begun)
                if part.record is not None:
                    part.record.first(now, now - self.begun, part.span)
            else:
                self.m.between.observe((now - self.last) / len(chunk.ids))
            self.last = now
        if chunk.finish_reason is not None:
            self.reason = chunk.finish_reason
            self.m.prompt_tokens.n += self.prompt_tokens
            self.m.cached_tokens.n += chunk.cached_tokens
            self.m.whole.observe(now - self.begun)
            if chunk.times is not None:
                self._timed(chunk.times, part)

    def _timed(self, times: Times, part: step) -> None:
        if times.queued_s is not None:
            self.m.queued.observe(times.queued_s)
        if times.prefill_s is not None:
            self.m.prefill.observe(times.prefill_s)
        if part.record is not None:
            part.record.took(times, part.span)

    def _move(self, state: str | None) -> None:
        self.m.now[self.state] -= 1
        if state is not None:
            self.state = state
            self.m.now[state] += 1

    def close(self, part: step) -> None:
        self._move(None)
        self.m.finished.add(self.reason)
        if part.span is not None:
            part.record.tracing.generated(part.span, self.prompt_tokens, self.tokens, self.reason)


class EngineStats:
    """The in-process engine's own numbers, whatever they are: one gauge per field of its `stats`, read at each scrape."""

    def __init__(self, policy: Any) -> None:
        self._policy = policy

    def collect(self) -> Iterator[GaugeMetricFamily]:
        for field in dataclasses.fields(self._policy.stats):
            value = getattr(self._policy.stats, field.name)
            if isinstance(value, int | float):
                yield GaugeMetricFamily(f"tidelock_engine_{field.name}", f"The engine's `{field.name}`", value)


def route_of(scope: Scope) -> str:
    """The path with its parameters by name, so that there are as many as there are routes; "other" where none matched."""
    if scope.get("endpoint") is None:
        return "other"
    path = scope["path"]
    for name, value in scope.get("path_params", {}).items():
        before, _, after = path.rpartition(str(value))
        path = f"{before}{{{name}}}{after}"
    return path
