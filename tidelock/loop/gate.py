"""The gate: may the candidate replace the incumbent? Same held-out tasks for both, compared pair by pair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from .intervals import mcnemar, paired_difference


@dataclass(frozen=True)
class GateRule:
    """margin: how far the interval of a base family's paired difference may reach below zero (non-inferiority).

    New demand must improve: its interval has to lie above zero.
    """

    margin: float = 0.08


@dataclass(frozen=True)
class FamilyVerdict:
    kind: str
    n: int
    incumbent: float
    candidate: float
    difference: float
    low: float
    high: float
    p: float
    passed: bool


@dataclass(frozen=True)
class GateDecision:
    passed: bool
    reasons: list[str]
    families: dict[str, FamilyVerdict]

    def to_dict(self) -> dict:
        return asdict(self)


def decide(
    incumbent: Mapping[str, Sequence[bool]],
    candidate: Mapping[str, Sequence[bool]],
    kinds: Mapping[str, str],
    rule: GateRule = GateRule(),
) -> GateDecision:
    """Success per task of both models, by family. Passes when no base family is worse and all new demand improved."""
    verdicts = {name: judge(incumbent[name], candidate[name], kinds[name], rule) for name in incumbent}
    reasons = [f"{name}: {_words(v, rule)}" for name, v in verdicts.items() if not v.passed]
    return GateDecision(not reasons, reasons or ["every base family holds and every new demand improved"], verdicts)


def judge(before: Sequence[bool], after: Sequence[bool], kind: str, rule: GateRule) -> FamilyVerdict:
    difference, low, high = paired_difference(before, after)
    passed = low > -rule.margin if kind == "base" else low > 0
    n = len(before)
    return FamilyVerdict(kind, n, sum(before) / n, sum(after) / n, difference, low, high, mcnemar(before, after), passed)


def _words(v: FamilyVerdict, rule: GateRule) -> str:
    change = f"{v.incumbent:.1%} to {v.candidate:.1%} (difference {v.low:+.1%} to {v.high:+.1%})"
    if v.kind == "base":
        return f"may have become worse by more than {rule.margin:.0%}: {change}"
    return f"did not improve for certain: {change}"
