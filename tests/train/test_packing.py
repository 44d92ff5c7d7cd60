"""Packing loses nothing, mixes nothing, and says for every row what it predicts."""

from hypothesis import given, settings
from hypothesis import strategies as st

from tidelock.train.packing import Sample, make_pack, pack

samples_strategy = st.lists(
    st.lists(st.tuples(st.integers(0, 999), st.floats(0, 2, width=32)), min_size=1, max_size=20).map(
        lambda pairs: Sample([i for i, _ in pairs], [0.0] + [w for _, w in pairs[1:]], {"a": [float(i) for i, _ in pairs]})
    ),
    min_size=1, max_size=12,
)  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(samples_strategy, st.integers(1, 50))
def test_every_sample_is_whole_and_comes_once_in_order(samples, limit):
    packs = pack(samples, limit)
    pieces = [p.ids[a:b].tolist() for p in packs for a, b in zip(p.cu[:-1], p.cu[1:])]
    assert pieces == [s.ids for s in samples]
    assert all(p.ids.numel() <= limit or p.cu.numel() == 2 for p in packs)


@settings(max_examples=80, deadline=None)
@given(samples_strategy)
def test_a_row_predicts_its_successor_in_the_same_sample(samples):
    p = make_pack(samples)
    for s, a, b in zip(samples, p.cu[:-1].tolist(), p.cu[1:].tolist()):
        assert p.targets[a : b - 1].tolist() == s.ids[1:]
        assert p.weights[a : b - 1].tolist() == s.weights[1:]
        assert p.extras["a"][a : b - 1].tolist() == s.extras["a"][1:]
        assert p.weights[b - 1] == 0  # nothing follows a sample's last token
