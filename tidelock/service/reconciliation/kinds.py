"""What a reconciliation can find, and what it found."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

MOST_LISTED = 1000  # discrepancies that are kept; all are counted

# kind -> (unit of expected and found, what it means)
KINDS = {
    "upstream_prompt": ("tokens", "the upstream says another number of prompt tokens (found) than was billed (expected)"),
    "upstream_completion": ("tokens", "the upstream says another number of answer tokens (found) than was billed (expected)"),
    "upstream_cached": ("tokens", "the upstream says another number of cached tokens (found) than was billed (expected)"),
    "trace_tokens": ("tokens", "the trace holds (expected) another number of sampled tokens than was billed (found)"),
    "traced_not_billed": ("tokens", "the trace holds an answer (expected) that has no usage row"),
    "debit_missing": ("nano-USD", "a usage row (expected) without a debit in the ledger"),
    "usage_missing": ("nano-USD", "a debit in the ledger (found) without a usage row"),
    "debit_wrong": ("nano-USD", "the ledger's debit (found) is not what the usage costs by its price version (expected)"),
    "charge_wrong": ("nano-USD", "the usage row's charge (found) is not the ledger's debit (expected), which is right"),
    "usage_changed": ("nano-USD", "the usage row is not as it was settled, though it costs the same"),
    "adjustment_missing": ("nano-USD", "a re-rating in the ledger (found) without its row"),
    "adjustment_wrong": ("nano-USD", "a re-rating's row (expected) is not what the ledger booked for it (found)"),
    "invoice_lines": ("nano-USD", "an invoice's lines (expected) do not sum to its net (found)"),
    "invoice_wrong": ("nano-USD", "an invoice's net (found) is not what the ledger says (expected)"),
    "invoice_missing": ("nano-USD", "the ledger's movement (expected), or a number in the row of invoices, without an invoice"),
    "credit_missing": ("nano-USD", "a payment (expected) that was not credited"),
    "credit_wrong": ("nano-USD", "what was credited (found) is not what was paid (expected)"),
    "payback_wrong": ("nano-USD", "what was booked back (found) is not what of a payment was paid back (expected)"),
}
ROWS_MISSING = ("traced_not_billed", "debit_missing", "usage_missing", "adjustment_missing", "invoice_missing", "credit_missing")


@dataclass(frozen=True)
class Discrepancy:
    """`id`: of a request, an invoice or a payment. `nano_usd`: what the difference is worth, signed: positive is money that
    we pay or give beyond what is in the books."""

    kind: str
    id: str
    customer: str
    expected: int
    found: int
    nano_usd: int
    detail: str = ""

    @property
    def difference(self) -> int:
        return self.found - self.expected

    def shown(self) -> dict[str, Any]:
        return {**asdict(self), "difference": self.difference, "unit": KINDS[self.kind][0]}


@dataclass
class Found:
    since: float
    until: float
    checked: Counter[str] = field(default_factory=Counter)  # rows looked at, by what they are
    by_kind: Counter[str] = field(default_factory=Counter)
    listed: list[Discrepancy] = field(default_factory=list)
    drift_nano: int = 0  # the sum of what all of them are worth, without sign
    upstreams: dict[str, Counter[str]] = field(default_factory=dict)  # by name: requests, billed and reported tokens
    unbacked: Counter[str] = field(default_factory=Counter)  # money put in by hand: no payment says anything of it

    def add(self, discrepancy: Discrepancy) -> None:
        self.by_kind[discrepancy.kind] += 1
        self.drift_nano += abs(discrepancy.nano_usd)
        if len(self.listed) < MOST_LISTED:
            self.listed.append(discrepancy)

    @property
    def total(self) -> int:
        return sum(self.by_kind.values())

    @property
    def missing(self) -> int:
        return sum(self.by_kind[kind] for kind in ROWS_MISSING)

    def shown(self) -> dict[str, Any]:
        return {
            "object": "reconciliation", "since": self.since, "until": self.until, "sound": self.total == 0,
            "checked": dict(self.checked), "discrepancies": self.total, "by_kind": dict(self.by_kind),
            "rows_missing": self.missing, "drift_nano_usd": self.drift_nano,
            "upstreams": {name: dict(counts) for name, counts in sorted(self.upstreams.items())},
            "unbacked": dict(self.unbacked), "listed": [one.shown() for one in self.listed],
        }  # fmt: skip
