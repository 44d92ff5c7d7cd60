"""The money torture, small: kills, outage, broken upstream and leaving clients, on both databases."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tidelock.service.local_postgres import missing

ROOT = Path(__file__).parents[2]
SMALL = ["--customers", "5", "--streams", "8-16", "--balance", "2000000", "--spread", "1.5", "--kill-every", "1.5",
         "--outage-after", "1.2", "--outage", "0.7", "--stall", "2"]  # fmt: skip


@pytest.mark.parametrize("options", [["--database", "sqlite"], ["--database", "postgres", "--workers", "2", "--no-fsync"]])
def test_the_books_survive_a_small_torture(tmp_path, options):
    if "postgres" in options and missing():
        pytest.skip(f"PostgreSQL: {missing()}")
    result = tmp_path / "torture.json"
    argv = [sys.executable, str(ROOT / "benchmarks" / "money_torture.py"), *SMALL, *options, "--json", str(result)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    happened = json.loads(result.read_text())["happened"]
    assert happened["requests"] > 30 and happened["usage_rows"] > 10 and happened["database outages"] > 0
    assert happened["refused by a limit"] > 0 and happened["with the upstream's own count"] > 0 and happened["with a trace"] > 0
