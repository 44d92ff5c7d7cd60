"""A pool's numbers for Prometheus, read at each scrape. Labels hold names of upstreams and causes, nothing of a request."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

STATES = ("closed", "half-open", "open", "held back")
COUNTERS = {  # name: (what it says, the tally's field)
    "requests": ("Requests sent, retries included", "requests"),
    "retries": ("Requests that failed here before their first token and went on elsewhere", "retried"),
    "prompt_tokens": ("Prompt tokens of whole answers", "prompt_tokens"),
    "cached_tokens": ("Of those, tokens it did not prefill again", "cached_tokens"),
    "generated_tokens": ("Tokens handed on", "generated_tokens"),
}


class Collector:
    def __init__(self, pool: Any) -> None:
        self._pool = pool

    def collect(self) -> Iterator[Metric]:
        upstreams = self._pool.upstreams
        for name, (words, field) in COUNTERS.items():
            family = CounterMetricFamily(f"tidelock_upstream_{name}", words, labels=["upstream"])
            for u in upstreams:
                family.add_metric([u.name], getattr(u.tally, field))
            yield family
        failures = CounterMetricFamily("tidelock_upstream_failures", "Failures by cause", labels=["upstream", "cause"])
        affinity = CounterMetricFamily("tidelock_upstream_affinity", "Placed on the conversation's own, or spilled from it",
                                       labels=["upstream", "result"])  # fmt: skip
        openings = CounterMetricFamily("tidelock_upstream_openings", "Times its circuit opened", labels=["upstream"])
        in_flight = GaugeMetricFamily("tidelock_upstream_in_flight", "Requests in it now", labels=["upstream"])
        state = GaugeMetricFamily("tidelock_upstream_state", "1 for the state it is in", labels=["upstream", "state"])
        version = GaugeMetricFamily("tidelock_upstream_weights_version", "As last heard; -1 = unknown", labels=["upstream"])
        for u in upstreams:
            for cause, n in u.tally.failures.items():
                failures.add_metric([u.name, cause], n)
            for result in ("hit", "spilled"):
                affinity.add_metric([u.name, result], u.tally.affinity[result])
            openings.add_metric([u.name], u.circuit.openings)
            in_flight.add_metric([u.name], u.in_flight)
            version.add_metric([u.name], u.version)
            for name in STATES:
                state.add_metric([u.name, name], float(u.state == name))
        yield from (failures, affinity, openings, in_flight, state, version)
        yield GaugeMetricFamily("tidelock_pool_waiting", "Requests in line for an upstream", self._pool.waiting)
        refused = CounterMetricFamily("tidelock_pool_refused", "Requests no upstream was found for", labels=["why"])
        for why, n in self._pool.refused.items():
            refused.add_metric([why], n)
        yield refused
