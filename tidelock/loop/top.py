"""A server's /metrics as a live picture in the terminal: what moved between two scrapes, and how it went lately."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Scrape:
    """Samples by (name, label values...), and when they were read."""

    at: float
    values: dict[tuple[str, ...], float]

    @staticmethod
    def read(text: str, at: float | None = None) -> Scrape:
        """Several workers as one: what they count is summed. Raises ValueError when it is no Prometheus text."""
        values: dict[tuple[str, ...], float] = {}
        for family in text_string_to_metric_families(text):
            for s in family.samples:
                key = (s.name, *(v for k, v in sorted(s.labels.items()) if k != "worker"))
                join = max if s.name == "tidelock_weights_version" else lambda a, b: a + b
                values[key] = join(values[key], s.value) if key in values else s.value
        return Scrape(time.monotonic() if at is None else at, values)

    def get(self, *key: str) -> float:
        return self.values.get(tuple("tidelock_" + k if i == 0 else k for i, k in enumerate(key)), 0.0)

    def total(self, name: str, *, without: tuple[str, ...] = ()) -> float:
        return sum(v for k, v in self.values.items() if k[0] == f"tidelock_{name}" and not set(without) & set(k[1:]))

    def buckets(self, name: str) -> list[tuple[float, float]]:
        """(upper bound, cumulative count), ascending."""
        return sorted((float(k[1]), v) for k, v in self.values.items() if k[0] == f"tidelock_{name}_bucket")


def quantile(before: list[tuple[float, float]], after: list[tuple[float, float]], q: float) -> float | None:
    """The q-quantile of what was observed between two scrapes, linear within its bucket. None: nothing was."""
    old = dict(before)
    counts = [(bound, n - old.get(bound, 0.0)) for bound, n in after]
    if not counts or counts[-1][1] <= 0:
        return None
    wanted, low, below = q * counts[-1][1], 0.0, 0.0
    for bound, n in counts:
        if n >= wanted:
            if bound == float("inf"):
                return low  # beyond the last bound: at least that
            return low + (bound - low) * (wanted - below) / (n - below)
        low, below = bound, n
    return low


@dataclass(frozen=True)
class Frame:
    """Rates are per second over the interval; latencies in seconds."""

    tokens: float
    prompt: float
    finished: float
    errors: float
    running: int
    waiting: int
    hit: float | None  # share of prompt tokens found in the cache
    ttft: tuple[float | None, float | None]  # p50, p95
    itl: tuple[float | None, float | None]
    version: int
    swaps: int
    rss: float  # bytes
    upstreams: tuple[tuple[str, str, int, float, float], ...] = ()  # name, state, in flight, requests/s, failures/s

    @staticmethod
    def between(a: Scrape, b: Scrape) -> Frame:
        span = max(b.at - a.at, 1e-9)

        def rate(*key: str) -> float:
            return max(0.0, b.get(*key) - a.get(*key)) / span

        def p50_p95(name: str) -> tuple[float | None, float | None]:
            old, new = a.buckets(name), b.buckets(name)
            return quantile(old, new, 0.5), quantile(old, new, 0.95)

        prompt = rate("prompt_tokens_total")
        return Frame(
            tokens=rate("generated_tokens_total"),
            prompt=prompt,
            finished=(b.total("requests_finished_total") - a.total("requests_finished_total")) / span,
            errors=(b.total("policy_errors_total") - a.total("policy_errors_total")) / span,
            running=int(b.get("requests", "running")),
            waiting=int(b.get("requests", "waiting")),
            hit=rate("cached_tokens_total") / prompt if prompt else None,
            ttft=p50_p95("time_to_first_token_seconds"),
            itl=p50_p95("inter_token_latency_seconds"),
            version=int(b.get("weights_version")),
            swaps=int(b.get("weight_swaps_total", "done")),
            rss=b.values.get(("process_resident_memory_bytes",), 0.0),
            upstreams=tuple(
                (name, state, int(b.get("upstream_in_flight", name)), rate("upstream_requests_total", name),
                 _failures(a, b, name) / span)
                for name, state in sorted(
                    (k[2], k[1]) for k, v in b.values.items() if k[0] == "tidelock_upstream_state" and v
                )
            ),  # fmt: skip
        )


def _failures(a: Scrape, b: Scrape, upstream: str) -> float:
    return sum(v - a.values.get(k, 0.0) for k, v in b.values.items()
               if k[0] == "tidelock_upstream_failures_total" and k[-1] == upstream)  # fmt: skip


def seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value * 1e3:.1f} ms" if value < 1 else f"{value:.2f} s"


def sparkline(values: list[float]) -> str:
    top = max(values, default=0.0) or 1.0
    return "".join(BARS[min(len(BARS) - 1, int(v / top * len(BARS)))] for v in values)


@dataclass
class View:
    """The picture, with a minute of history."""

    url: str
    history: deque[float] = field(default_factory=lambda: deque(maxlen=60))

    def draw(self, f: Frame) -> RenderableType:
        self.history.append(f.tokens)
        table = Table.grid(padding=(0, 3))
        for _ in range(4):
            table.add_column()
        rows = [
            ("tokens/s", f"{f.tokens:,.0f}", "prompt tokens/s", f"{f.prompt:,.0f}"),
            ("batch", str(f.running), "queue", str(f.waiting)),
            ("cache hit", "-" if f.hit is None else f"{f.hit:.0%}", "requests/s", f"{f.finished:.1f}"),
            ("first token p50", seconds(f.ttft[0]), "p95", seconds(f.ttft[1])),
            ("between tokens p50", seconds(f.itl[0]), "p95", seconds(f.itl[1])),
            ("weights version", f"{f.version} ({f.swaps} swaps)", "errors/s", f"{f.errors:.1f}"),
        ]
        for a, b, c, d in rows:
            table.add_row(Text(a, style="dim"), Text(b, style="bold"), Text(c, style="dim"), Text(d, style="bold"))
        head = Text.assemble((self.url, "bold cyan"), f"   {f.rss / 2**20:,.0f} MiB" if f.rss else "")
        parts = [head, Text(sparkline(list(self.history)), style="green"), table]
        if f.upstreams:
            heads = ("upstream", "", "in flight", "requests/s", "failures/s")
            listed = Table(*heads, box=None, header_style="dim", padding=(0, 3, 0, 0))
            for name, state, in_flight, requests, failures in f.upstreams:
                style = "green" if state == "closed" else "yellow" if state == "half-open" else "bold red"
                listed.add_row(name, Text(state, style=style), str(in_flight), f"{requests:.1f}", f"{failures:.1f}")
            parts.append(listed)
        return Group(*parts)
