"""Counters and histograms for what happens in one event loop: no lock, and a tenth of the client library's price.

The library's own are right for everything that is seldom counted or counted by several threads; a request counts a dozen
times, and with locks and a loop over the buckets that was a twentieth of what it cost in all.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.utils import floatToGoString


class Count:
    """Only grows: `n` is added to in place."""

    def __init__(self, name: str, told: str) -> None:
        self.n, self._name, self._told = 0, name, told

    def collect(self) -> Iterator[CounterMetricFamily]:
        yield CounterMetricFamily(self._name, self._told, value=self.n)


class Counts:
    """A `Count` for each value of some labels, made when it is first asked for."""

    def __init__(self, name: str, told: str, labels: Sequence[str]) -> None:
        self.n: dict[tuple[str, ...], int] = {}
        self._name, self._told, self._labels = name, told, labels

    def add(self, *values: str) -> None:
        self.n[values] = self.n.get(values, 0) + 1

    def collect(self) -> Iterator[CounterMetricFamily]:
        family = CounterMetricFamily(self._name, self._told, labels=self._labels)
        for values, n in sorted(self.n.items()):
            family.add_metric(values, n)
        yield family


class Spread:
    """A histogram. `bounds`: of its buckets, ascending, each inclusive; above the last is one more."""

    def __init__(self, name: str, told: str, bounds: Sequence[float]) -> None:
        self._name, self._told, self._bounds = name, told, tuple(bounds)
        self._counts, self._sum = [0] * (len(self._bounds) + 1), 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def collect(self) -> Iterator[HistogramMetricFamily]:
        below, buckets = 0, []
        for bound, count in zip((*self._bounds, float("inf")), self._counts, strict=True):
            below += count
            buckets.append((floatToGoString(bound), below))
        yield HistogramMetricFamily(self._name, self._told, buckets=buckets, sum_value=self._sum)
