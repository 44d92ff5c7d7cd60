"""The traces of this process against the usage rows: what was sampled is what was billed.

An answer is settled first and traced then, so a journal that is read up to where it ended before the books were opened can
only name requests the books know. The other way round a row may lack its trace, after a crash, and that is no fault.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from tidelock.service.db import Reading
from tidelock.service.prices import Counts
from tidelock.service.reconciliation.kinds import Discrepancy, Found
from tidelock.service.reconciliation.usage import Rater
from tidelock.tokens.journal import read_kind

AT_A_TIME = 400


def size(journal: str | Path) -> int:
    """Where it ends now; 0 if there is none."""
    path = Path(journal)
    return path.stat().st_size if path.is_file() else 0


def check(read: Reading, found: Found, journal: str | Path, end: int, start: int = 0) -> int:
    """Compares what was served in the window, among the records from byte `start` to `end`; returns where it stopped."""
    rater, stopped = Rater(read), start
    records = read_kind(journal, "served", start, end) if end > start else iter(())
    while batch := list(islice(records, AT_A_TIME)):
        stopped = batch[-1][1]
        served = [record["served"] for record, _ in batch if found.since <= record["served"]["created"] < found.until]
        for discrepancy in _compare(read, rater, served):
            found.add(discrepancy)
        found.checked["traces"] += len(served)
    return stopped


def _compare(read: Reading, rater: Rater, served: Sequence[dict[str, Any]]) -> Iterator[Discrepancy]:
    if not served:
        return
    marks = ", ".join("?" * len(served))
    sql = ("SELECT request_id, customer, completion_tokens, finish_reason, price_version, model, mode FROM usage "
           f"WHERE request_id IN ({marks})")  # fmt: skip
    rows = {row["request_id"]: row for row in read(sql, [one["request"] for one in served])}
    for one in served:
        request_id, sampled, row = one["request"], one["sampled"], rows.get(one["request"])
        if row is None:
            yield Discrepancy("traced_not_billed", request_id, "", sampled, 0, 0)
            continue
        billed = row["completion_tokens"]
        if billed == sampled or row["finish_reason"] == "lost":  # settled by others, who knew only what had been sent
            continue
        if not one["exact"] and billed < sampled:  # a text upstream counts fewer tokens than we made of its words
            continue
        price = rater.price(row["price_version"], row["model"], row["mode"])
        worth = 0 if price is None else price.cost_nano(Counts(0, completion=abs(sampled - billed)))
        worth = worth if sampled > billed else -worth
        yield Discrepancy("trace_tokens", request_id, row["customer"], sampled, billed, worth)
