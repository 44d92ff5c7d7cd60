"""What a request pays for its record and its access line: python benchmarks/logging_cost.py

Microseconds, the best of many rounds: the machine is shared, and the best is what the code costs.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

sys.path.insert(0, str(Path(__file__).parents[1]))

from tidelock.service import access, logs  # noqa: E402
from tidelock.service.prices import Counts  # noqa: E402
from tidelock.service.record import Record, new_id, recording, step  # noqa: E402

ROUNDS, EACH = 200, 100


def request() -> Record:
    record = Record("req_0e2a5159ad404b19a12e5dc0fedd2a88")
    with recording(record):
        for name in ("hold", "generate", "settle", "trace"):
            with step(name):
                pass
        record.billed(Counts(100, 3, completion=20), 1234, "stop")
        record.first_token_s, record.status = 0.1, 200
        record.customer, record.key, record.model = "ann", "key_1f6d0a", "tide"
    return record


def best_us(once: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(ROUNDS):
        began = perf_counter()
        for _ in range(EACH):
            once()
        best = min(best, perf_counter() - began)
    return best / EACH * 1e6


def main() -> None:
    print(f"{'request id':>24}  {best_us(new_id):6.2f} us")
    print(f"{'record':>24}  {best_us(request):6.2f} us")
    record = request()
    with tempfile.TemporaryFile("w") as stream:
        for form in ("json", "text"):
            log = logs.configure(form, "info", stream)
            line = best_us(lambda log=log: log.say(access.told(record, "POST", "/v1/chat/completions")))
            print(f"{form + ' line':>24}  {line:6.2f} us")


if __name__ == "__main__":
    main()
