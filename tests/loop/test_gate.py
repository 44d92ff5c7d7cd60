"""Intervals with their coverage, and a gate that cannot be passed by luck or by trading base skills away."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidelock.loop.gate import GateRule, decide
from tidelock.loop.intervals import mcnemar, paired_difference, wilson


def test_wilson_is_the_textbook_interval():
    low, high = wilson(81, 263)
    assert (low, high) == pytest.approx((0.2553, 0.3662), abs=5e-4)  # Newcombe 1998
    assert wilson(0, 0) == (0.0, 1.0)


def test_paired_interval_is_newcombes_method_10():
    """Newcombe 1998 (Stat Med 17:2635), Table II (a): 36, 12, 2, 0 gives (0.0569, 0.3404)."""
    before = [True] * 36 + [False] * 12 + [True] * 2
    after = [True] * 36 + [True] * 12 + [False] * 2
    d, low, high = paired_difference(before, after)
    assert d == pytest.approx(0.2)
    assert (low, high) == pytest.approx((0.0569, 0.3404), abs=1e-3)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_swapping_the_models_mirrors_the_interval(pairs):
    a, b = [x for x, _ in pairs], [y for _, y in pairs]
    d, low, high = paired_difference(a, b)
    assert -1 <= low <= d + 1e-12 and d - 1e-12 <= high <= 1
    assert paired_difference(b, a) == pytest.approx((-d, -high, -low))
    assert mcnemar(a, b) == mcnemar(b, a) <= 1


def test_the_interval_covers_the_truth_about_95_times_in_100():
    rng, covered = random.Random(0), 0
    for _ in range(400):
        before = [rng.random() < 0.7 for _ in range(80)]
        after = [x if rng.random() < 0.5 else rng.random() < 0.85 for x in before]
        _, low, high = paired_difference(before, after)
        covered += low <= 0.5 * (0.85 - 0.7) <= high
    assert covered / 400 > 0.92


def verdict(base_after, new_after, rule=GateRule()):
    before = {"base": [True] * 100, "new": [False] * 100}
    after = {"base": base_after, "new": new_after}
    return decide(before, after, {"base": "base", "new": "new"}, rule)


def test_gate_passes_when_base_holds_and_new_improves():
    assert verdict([True] * 100, [True] * 90 + [False] * 10).passed


def test_gate_refuses_new_demand_that_did_not_improve_for_certain():
    decision = verdict([True] * 100, [True] * 2 + [False] * 98)
    assert not decision.passed and decision.reasons[0].startswith("new:")


def test_gate_refuses_a_base_family_that_became_worse():
    decision = verdict([True] * 80 + [False] * 20, [True] * 100)
    assert not decision.passed and decision.reasons[0].startswith("base:")
