"""Ratios of metrics, each with its definition. They are exact fractions until they are shown."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from tidelock.service.analytics.figures import Figures

Term = tuple[str, tuple[str, ...]]  # a metric and the parts of it that are summed; () = all of them


@dataclass(frozen=True)
class Ratio:
    name: str
    definition: str
    top: Term
    bottom: Term
    unit: str = "share"

    def of(self, figures: Figures, month: str) -> Fraction | None:
        """None where there is nothing to divide by."""
        bottom = total(figures, self.bottom, month)
        return Fraction(total(figures, self.top, month), bottom) if bottom else None


def total(figures: Figures, term: Term, month: str) -> int:
    name, parts = term
    return sum(value for (m, part), value in figures[name].items() if m == month and (not parts or part in parts))


RATIOS = (
    Ratio("arppu", "Usage revenue of the month per paying user (payers.usage).", ("revenue.usage", ()), ("payers.usage", ()),
          "nano-USD"),
    Ratio("cache_hit_share", "Input tokens read from the cache, of all input tokens settled in the month.",
          ("tokens", ("cached",)), ("tokens", ("fresh", "cached", "cache_write_5m", "cache_write_1h"))),
    Ratio("credit_share", "Usage at list price that vouchers and plan credits covered, per usage paid in money.",
          ("credits.used", ()), ("revenue.usage", ())),
    Ratio("gross_margin", "margin over usage revenue, all models.", ("margin", ()), ("revenue.usage", ())),
    Ratio("top_10_share", "Usage revenue of the ten largest customers, of all usage revenue.",
          ("concentration", ("top 10",)), ("concentration", ("all",))),
    Ratio("nrr_1m", "Net revenue retention month on month: net / base of retention.1m.",
          ("retention.1m", ("net",)), ("retention.1m", ("base",))),
    Ratio("grr_1m", "Gross revenue retention month on month: kept / base of retention.1m.",
          ("retention.1m", ("kept",)), ("retention.1m", ("base",))),
    Ratio("nrr_12m", "Net revenue retention year on year: net / base of retention.12m.",
          ("retention.12m", ("net",)), ("retention.12m", ("base",))),
    Ratio("grr_12m", "Gross revenue retention year on year: kept / base of retention.12m.",
          ("retention.12m", ("kept",)), ("retention.12m", ("base",))),
    Ratio("mrr_churn", "MRR churned and contracted in the month, of the MRR at its start.",
          ("mrr", ("churn", "contraction")), ("mrr", ("start",))),
)  # fmt: skip
