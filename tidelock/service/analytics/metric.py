"""What a metric is."""

from __future__ import annotations

from dataclasses import dataclass

USD, COUNT, SECONDS = "nano-USD", "count", "seconds"


@dataclass(frozen=True)
class Metric:
    """`sql` gives rows (month, part, value), integers in `unit`."""

    name: str
    definition: str
    sql: str
    unit: str
