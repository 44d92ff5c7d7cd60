"""Sampling: draws follow the distribution that was asked for, keep what a naive reading keeps, and never look at company."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tidelock.engine.cutoffs import rank
from tidelock.engine.penalties import Seen
from tidelock.engine.sampling import Ask, sample, uniform
from tidelock.tokens.policy import SamplingParams, compact, kept_ids

CHI_999 = {1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47, 5: 20.52, 6: 22.46, 7: 24.32, 8: 26.12, 9: 27.88, 10: 29.59, 11: 31.26}


def draws(logits, n, seen=None, allowed=None, **params):
    """n draws from one row, at positions 0 ... n - 1."""
    rows = torch.tensor(np.asarray(logits), dtype=torch.float32).repeat(n, 1)
    p = SamplingParams(**params)
    return sample(rows, [Ask(p, 5, i, seen, allowed) for i in range(n)])


def expected(logits, prompt=(), sampled=(), allowed=None, p=SamplingParams()):
    """The distribution as one would write it down, one id at a time: fp64 [V], zeros where cut off."""
    x = [float(v) for v in np.asarray(logits, dtype=np.float32)]
    for i in set(prompt) | set(sampled):
        x[i] = x[i] / p.repetition_penalty if x[i] > 0 else x[i] * p.repetition_penalty
    for i in set(sampled):
        x[i] -= p.presence_penalty + p.frequency_penalty * list(sampled).count(i)
    for i, b in p.logit_bias:
        x[i] += b
    x = [v / p.temperature for v in x]
    keep = [i for i in range(len(x)) if allowed is None or allowed[i]]
    keep.sort(key=lambda i: (-x[i], i))
    if p.top_k:
        keep = keep[: p.top_k]
    weight = {i: np.exp(x[i] - x[keep[0]]) for i in keep}
    total, mass, nucleus = sum(weight.values()), 0.0, []
    for i in keep:
        if mass / total < p.top_p - 1e-12:
            nucleus.append(i)
        mass += weight[i]
    keep = [i for i in nucleus if weight[i] >= p.min_p]
    out = np.zeros(len(x))
    out[keep] = [weight[i] for i in keep]
    return out / out.sum()


def old_draws(logits, temperature, top_p, seeds, positions):
    """Temperature and top-p by a full sort: how every id was drawn before there were other options."""
    scores = logits.astype(np.float64) / temperature
    p = np.exp(scores - scores.max(axis=1, keepdims=True))
    order = np.argsort(-p, axis=1, kind="stable")
    ranked = np.take_along_axis(p, order, axis=1)
    before = (np.cumsum(ranked, axis=1) - ranked) / ranked.sum(axis=1, keepdims=True)
    np.put_along_axis(p, order, np.where(before < top_p, ranked, 0.0), axis=1)
    edges = np.cumsum(p, axis=1)
    return (edges <= (uniform(seeds, positions) * edges[:, -1])[:, None]).sum(axis=1)


@pytest.mark.parametrize("temperature,top_p", [(1.0, 1.0), (0.7, 1.0), (1.0, 0.95), (1.5, 0.3)])
def test_plain_draws_are_the_ones_they_always_were(temperature, top_p):
    rows = torch.randn(400, 3000, generator=torch.Generator().manual_seed(1)) * 4
    seeds, positions = np.arange(400, dtype=np.uint64), np.arange(400, dtype=np.uint64) % np.uint64(7)
    asks = [Ask(SamplingParams(temperature=temperature, top_p=top_p), int(s), int(p)) for s, p in zip(seeds, positions)]
    assert [d.id for d in sample(rows, asks)] == old_draws(rows.numpy(), temperature, top_p, seeds, positions).tolist()


LOGITS = np.log([0.3, 0.2, 0.15, 0.12, 0.08, 0.05, 0.04, 0.03, 0.02, 0.01])
OPTIONS = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.0, "top_k": 4},
    {"top_p": 0.7},
    {"min_p": 0.3},
    {"top_k": 6, "top_p": 0.8, "min_p": 0.1, "temperature": 1.3},
    {"presence_penalty": 0.7, "frequency_penalty": 0.4},
    {"repetition_penalty": 1.6},
    {"logit_bias": ((9, 3.0), (0, -2.0))},
    {"repetition_penalty": 0.8, "frequency_penalty": 1.0, "logit_bias": ((4, 1.0),), "temperature": 0.9, "top_p": 0.9},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("constrained", [False, True])
def test_frequencies_and_logprobs_are_those_of_the_stated_distribution(options, constrained):
    """Chi-square at 99.9 %, fixed seeds."""
    prompt, sampled, n = [1, 2, 2], [0, 0, 3, 9], 4000
    seen = Seen(prompt)
    for token in sampled:
        seen.add(token)
    allowed = np.arange(10) % 3 != 1 if constrained else None
    p = SamplingParams(**options)
    want = expected(LOGITS, prompt, sampled, allowed, p)
    got = draws(LOGITS, n, seen, allowed, **options)
    counts = np.bincount([d.id for d in got], minlength=10)
    assert not counts[want == 0].any()
    inside = want > 0
    chi = ((counts - n * want)[inside] ** 2 / (n * want[inside])).sum()
    assert inside.sum() == 1 or chi < CHI_999[inside.sum() - 1]
    for d in got[:50]:
        assert d.sampled_logprob == pytest.approx(np.log(want[d.id]), abs=1e-6)
        assert d.logprob == pytest.approx(LOGITS[d.id], abs=1e-6)  # of the model, whatever it was drawn from
        assert d.kept is None or kept_ids(d.kept).tolist() == np.flatnonzero(inside).tolist()
    assert (got[0].kept is None) == (not constrained and not {"top_k", "top_p", "min_p"} & set(options))


few_values = st.lists(st.integers(-6, 6), min_size=2, max_size=40)  # many equals: ties are where ranks go wrong


@settings(max_examples=300, deadline=None)
@given(few_values, st.integers(0, 12), st.floats(0.05, 1.0), st.floats(0.0, 0.9), st.floats(0.3, 3.0), st.data())
def test_cut_offs_keep_what_a_naive_reading_keeps(values, top_k, top_p, min_p, temperature, data):
    logits = np.array(values, dtype=np.float32) / 2
    allowed = None
    if data.draw(st.booleans()):
        allowed = np.array(data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values))))
        allowed[0] = True
    p = SamplingParams(top_k=top_k, top_p=top_p, min_p=min_p, temperature=temperature)
    want = expected(logits, allowed=allowed, p=p)
    (d,) = draws(logits, 1, allowed=allowed, top_k=top_k, top_p=top_p, min_p=min_p, temperature=temperature)
    ids = range(len(values)) if d.kept is None else kept_ids(d.kept).tolist()
    assert list(ids) == np.flatnonzero(want).tolist()


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 900), st.integers(0, 2**32))
def test_a_ranking_is_the_beginning_of_the_sorted_vocabulary(m, seed):
    x = np.random.default_rng(seed).integers(-20, 20, (3, 900)).astype(np.float32)
    assert (rank(x, m) == np.argsort(-x, axis=1, kind="stable")[:, :m]).all()


def test_a_wide_nucleus_is_found_in_more_than_one_look():
    x = torch.randn(2, 9000, generator=torch.Generator().manual_seed(0)) * 0.3
    for d, row in zip(sample(x, [Ask(SamplingParams(top_p=0.9), 1, i) for i in range(2)]), x.numpy()):
        assert kept_ids(d.kept).tolist() == np.flatnonzero(expected(row, p=SamplingParams(top_p=0.9))).tolist()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 6))
def test_a_draw_does_not_look_at_its_company(seed, n):
    """Every field, with ==: rows of all kinds together, and each alone."""
    rng = np.random.default_rng(seed)
    rows = torch.from_numpy(rng.standard_normal((n, 700)).astype(np.float32) * 3)
    asks = []
    for i in range(n):
        seen = Seen(rng.integers(0, 700, 5))
        seen.add(int(rng.integers(0, 700)))
        options = OPTIONS[rng.integers(0, len(OPTIONS))] | {"top_logprobs": int(rng.integers(0, 4))}
        options |= {"temperature": 0.0} if rng.random() < 0.2 else {}
        allowed = rng.random(700) < 0.5 if rng.random() < 0.3 else None
        ours = {k: v for k, v in options.items() if k != "logit_bias"}
        asks.append(Ask(SamplingParams(**ours), int(rng.integers(0, 99)), i, seen, allowed))
    together = sample(rows, asks)
    assert together == [sample(rows[i : i + 1], [ask])[0] for i, ask in enumerate(asks)]
    assert together == sample(rows.flip(0), asks[::-1])[::-1]


def test_greedy_takes_the_likeliest_that_is_left_and_says_it_was_certain():
    allowed = np.arange(10) > 4
    (d,) = draws(LOGITS, 1, allowed=allowed, temperature=0.0, top_p=0.1)
    assert (d.id, d.sampled_logprob, d.kept) == (5, 0.0, compact(np.flatnonzero(allowed), 10))
    (d,) = draws(LOGITS, 1, temperature=0.0, logit_bias=((8, 9.0),))
    assert d.id == 8


def test_top_logprobs_are_the_models_and_likeliest_first():
    (d,) = draws(LOGITS[::-1].copy(), 1, top_logprobs=3, temperature=0.2, top_k=1)
    assert [i for i, _ in d.top] == [9, 8, 7]
    assert [p for _, p in d.top] == pytest.approx(np.log([0.3, 0.2, 0.15]), abs=1e-6)


@given(st.integers(1, 400), st.data())
def test_a_kept_set_survives_its_compact_form(vocab, data):
    ids = sorted(data.draw(st.sets(st.integers(0, vocab - 1), min_size=1)))
    kept = compact(np.array(ids), vocab)
    assert (list(range(vocab)) if kept is None else kept_ids(kept).tolist()) == ids
    assert kept is None or len(kept) * (4 if isinstance(kept, tuple) else 1) <= vocab // 8 + 1


def test_a_broken_row_stays_alone():
    rows = torch.tensor([[0.0, 1.0, 2.0], [float("nan")] * 3, [0.0, 1.0, 2.0]])
    for options in ({}, {"top_p": 0.9}, {"top_k": 1}, {"min_p": 0.1}, {"temperature": 0.0}):
        a, b, c = sample(rows, [Ask(SamplingParams(**options), 1, 0)] * 3)
        assert a == c and np.isfinite(a.logprob) and np.isnan(b.logprob)
