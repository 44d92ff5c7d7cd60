"""A benchmark's table, its JSON and its plots."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tidelock.charts import bars, curves, standalone

from .measure import Run, percentile

COLUMNS = (
    ("sampled/s", "sampled_per_s", 1), ("total/s", "total_per_s", 1), ("TTFT p50 ms", "ttft_p50", 1e3),
    ("TTFT p95 ms", "ttft_p95", 1e3), ("ITL p50 ms", "itl_p50", 1e3), ("ITL p95 ms", "itl_p95", 1e3),
    ("reused", "reused_share", 100), ("errors", "errors", 1),
)  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown; every number is the median of its rounds."""
    head = ["load", "server", *(name for name, _, _ in COLUMNS)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * 2 + "---:|" * len(COLUMNS)]
    for row in rows:
        cells = [row["load"], f"{row['kind']} {row['server']}", *(_cell(name, row[key], by) for name, key, by in COLUMNS)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(name: str, value: float | None, by: float) -> str:
    if value is None:
        return "-"
    return f"{value * by:.0f} %" if name == "reused" else f"{value * by:.0f}" if name == "errors" else f"{value * by:,.1f}"


def machine() -> dict[str, Any]:
    """What the numbers were taken on, and how busy it was already."""
    return {"processors": os.cpu_count(), "load_average": os.getloadavg()[0], "machine": platform.machine(),
            "threads": os.environ.get("OMP_NUM_THREADS"), "wait_policy": os.environ.get("GOMP_SPINCOUNT")}  # fmt: skip


def write(directory: Path, rows: Sequence[dict[str, Any]], rounds: Sequence[dict[str, Any]], runs: Sequence[Run],
          settings: dict[str, Any]) -> list[str]:  # fmt: skip
    """bench.md, bench.json and one plot of each kind per load; returns the names."""
    directory.mkdir(parents=True, exist_ok=True)
    files = {"bench.md": table(rows) + "\n",
             "bench.json": json.dumps({"settings": settings, "median": rows, "rounds": rounds}, indent=1)}  # fmt: skip
    for load in dict.fromkeys(r.load.name for r in runs):
        mine = [r for r in runs if r.load.name == load]
        files[f"{load}-ttft.svg"] = standalone(_shares(mine, lambda r: [m.ttft for m in r.requests if m.moments], "first token, ms"))
        files[f"{load}-itl.svg"] = standalone(_shares(mine, lambda r: [g for m in r.requests for g in m.gaps], "between tokens, ms"))
        speeds = [(row["kind"], row["total_per_s"], f"{row['total_per_s']:,.0f}/s") for row in rows if row["load"] == load]
        files[f"{load}-speed.svg"] = standalone(bars(speeds))
    for name, text in files.items():
        scratch = directory / f".{name}.tmp"
        scratch.write_text(text)
        os.replace(scratch, directory / name)
    return list(files)


def _shares(runs: Sequence[Run], of, label: str) -> str:
    """The share of values up to x, a line per server; the last round of each."""
    lines, latest = [], {r.client.name: r for r in runs}
    for colour, (_, run) in zip("abcd", latest.items()):
        values = of(run)
        if values:
            at = [i / 50 for i in range(50)]  # the slowest hundredth would flatten the rest
            lines.append((run.client.kind, [(percentile(values, q) * 1e3, q * 100) for q in at], colour))
    return curves(lines, label, "% of them")
