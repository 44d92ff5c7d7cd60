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
    each: bool = False  # one for every part that both metrics have, instead of one for all

    def parts(self, figures: Figures, month: str) -> dict[str, Fraction]:
        (top, _), (bottom, _) = self.top, self.bottom
        pairs = ((part, figures[top].get((month, part), 0), value) for (m, part), value in figures[bottom].items() if m == month)
        return {part: Fraction(above, below) for part, above, below in sorted(pairs) if below}

    def of(self, figures: Figures, month: str) -> Fraction | None:
        """None where there is nothing to divide by."""
        bottom = total(figures, self.bottom, month)
        return Fraction(total(figures, self.top, month), bottom) if bottom else None


@dataclass(frozen=True)
class Elasticity(Ratio):
    """Arc elasticity: the relative change of the tokens over that of their mean price, each against the mean of before and
    after, by model. `top` and `bottom`: tokens and money after; those before have the same names but for the end."""

    def parts(self, figures: Figures, month: str) -> dict[str, Fraction]:
        def pair(metric: str, model: str) -> tuple[int, int]:
            return tuple(figures[f"{metric}_{side}"].get((month, model), 0) for side in ("before", "after"))

        found = {}
        for model in sorted({part for m, part in figures[self.bottom[0]] if m == month}):
            (q0, q1), (l0, l1) = pair("price_change.tokens", model), pair("price_change.list", model)
            if q0 and q1 and l1 * q0 != l0 * q1:
                found[model] = Fraction(q1 - q0, q1 + q0) / Fraction(l1 * q0 - l0 * q1, l1 * q0 + l0 * q1)
        return found


def total(figures: Figures, term: Term, month: str) -> int:
    name, parts = term
    return sum(value for (m, part), value in figures[name].items() if m == month and (not parts or part in parts))


RATIOS = (
    Ratio("arppu", "Usage revenue of the month per paying user (payers.usage).", ("revenue.usage", ()), ("payers.usage", ()),
          "nano-USD"),
    Ratio("arppu.by_region", "revenue.by_region per paying user of the region.", ("revenue.by_region", ()),
          ("payers.by_region", ()), "nano-USD", each=True),
    Ratio("payer_churn", "Payers of the month before that did not pay in this one, of all payers of the month before.",
          ("payers.moves", ("lost",)), ("payers.moves", ("lost", "kept"))),
    Ratio("cache_hit_share", "Input tokens read from the cache, of all input tokens settled in the month.",
          ("tokens", ("cached",)), ("tokens", ("fresh", "cached", "cache_write_5m", "cache_write_1h"))),
    Ratio("credit_share", "Usage at list price that vouchers and plan credits covered, per usage paid in money.",
          ("credits.used", ()), ("revenue.usage", ())),
    Ratio("gross_margin", "margin over usage revenue, all models.", ("margin", ()), ("revenue.usage", ())),
    Ratio("gross_margin.by_model", "margin over revenue.by_model.", ("margin", ()), ("revenue.by_model", ()), each=True),
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
    Ratio("capacity_use", "capacity.served of capacity.sold, by plan.", ("capacity.served", ()), ("capacity.sold", ()), each=True),
    Elasticity("price_elasticity", "Arc elasticity of demand, by model: the change of settled tokens over the change of their mean "
               "list price, from the last whole month before a price change to the first after. Growth of other causes is in it.",
               ("price_change.tokens_after", ()), ("price_change.list_after", ()), each=True),
    Ratio("mrr_churn", "MRR churned and contracted in the month, of the MRR at its start.",
          ("mrr", ("churn", "contraction")), ("mrr", ("start",))),
)  # fmt: skip
