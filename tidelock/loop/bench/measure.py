"""Drive a load through a client and sum up what it felt like."""

from __future__ import annotations

import asyncio
import statistics
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from tidelock.tokens.policy import PolicyError

from .clients import Client, Measured
from .load import Load, Step


@dataclass(frozen=True)
class Run:
    """One pass of a load over one server."""

    load: Load
    client: Client
    requests: list[Measured]
    wall_s: float


async def drive(load: Load, client: Client) -> Run:
    """All conversations to their end. A request that fails ends its path and is counted."""
    done: list[Measured] = []
    gate = asyncio.Semaphore(load.concurrency) if load.concurrency else nullcontext()
    begun = time.perf_counter()

    async def path(history: Any, step: Step) -> None:
        measured = Measured(time.perf_counter())
        done.append(measured)
        try:
            history = await client.ask(history, step, measured)
        except PolicyError as e:
            measured.error = str(e)
            return
        await asyncio.gather(*(path(history, after) for after in step.then))

    async def conversation(start) -> None:
        await asyncio.sleep(max(0.0, begun + start.at - time.perf_counter()))
        async with gate:
            await path(client.begin(start.opening), start.step)

    await asyncio.gather(*(conversation(s) for s in load.starts))
    return Run(load, client, done, time.perf_counter() - begun)


def percentile(values: list[float], q: float) -> float | None:
    """The value below which a share q lies (nearest rank). None of nothing."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))] if ordered else None


def figures(run: Run) -> dict[str, Any]:
    """Seconds, tokens, tokens per second."""
    good = [r for r in run.requests if not r.error and r.moments]
    ttft, gaps = [r.ttft for r in good], [g for r in good for g in r.gaps]
    prompt, sampled = sum(r.prompt_tokens for r in good), sum(r.completion_tokens for r in good)
    cached = sum(r.cached_tokens for r in good)
    return {
        "server": run.client.name, "kind": run.client.kind, "load": run.load.name, "requests": len(run.requests),
        "errors": sum(bool(r.error) for r in run.requests), "first_error": next((r.error for r in run.requests if r.error), ""),
        "wall_s": run.wall_s, "prompt_tokens": prompt, "sampled_tokens": sampled, "reused_tokens": cached,
        "reused_share": cached / prompt if prompt else 0.0,
        "sampled_per_s": sampled / run.wall_s, "total_per_s": (prompt + sampled) / run.wall_s,
        "ttft_p50": percentile(ttft, 0.5), "ttft_p95": percentile(ttft, 0.95),
        "itl_p50": percentile(gaps, 0.5), "itl_p95": percentile(gaps, 0.95),
    }  # fmt: skip


def middle(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """The median of each number over the rounds of one server and load."""
    out = dict(rounds[0])
    for key, value in rounds[0].items():
        numbers = [r[key] for r in rounds if r[key] is not None]
        if isinstance(value, int | float) and numbers:
            out[key] = statistics.median(numbers)
    return {**out, "rounds": len(rounds)}
