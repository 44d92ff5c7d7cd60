"""What upstreams say they used: stored beside the bill, and a ceiling on it where their tokens are not ours."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidelock.service.answer import Sample
from tidelock.service.books import Metered, Upstream
from tidelock.service.ledger import Ledger
from tidelock.service.prices import Counts, Price, PriceBook
from tidelock.service.reported import billed, upstream
from tidelock.tokens.policy import Chunk, Reported, Source

PRICE = Price(input_nano=300, cached_input_nano=30, output_nano=1500)
COUNTS = st.none() | st.integers(0, 60)


@given(st.integers(1, 50), st.booleans(), st.lists(st.tuples(st.integers(0, 40), COUNTS, COUNTS, COUNTS, st.booleans()),
                                                   min_size=1, max_size=4))  # fmt: skip
def test_a_bill_never_exceeds_what_was_handed_on_nor_what_a_text_upstream_reports(prompt, exact, answers):
    samples = []
    for tokens, *said, named in answers:
        sample = Sample()
        source = Source("a", exact) if named else None
        reported = Reported(*said) if said != [None] * 3 else None
        sample.add(Chunk((1,) * tokens, (0.0,) * tokens, 1, "stop", said[2] or 0, source=source, reported=reported))
        samples.append(sample)
    counts = billed(prompt, samples, exact)
    delivered = sum(tokens for tokens, *_ in answers)
    if exact:
        assert (counts.prompt, counts.completion) == (prompt, delivered)
    else:
        assert counts.completion == sum(min(t, t if c is None else c) for t, _, c, _, _ in answers)
        assert counts.prompt == min([prompt, *(p for _, p, _, _, _ in answers if p is not None)])
    assert 0 <= counts.cached <= counts.prompt <= prompt and counts.completion <= delivered
    said = upstream(samples)
    if all(p is not None and c is not None for _, p, c, _, _ in answers):
        assert (said.prompt_tokens, said.completion_tokens) == (max(a[1] for a in answers), sum(a[2] for a in answers))
    if any(c is None for _, _, c, _, _ in answers):
        assert said.completion_tokens is None


@pytest.mark.parametrize("usage", [
    None, [], {}, {"prompt_tokens": "7", "completion_tokens": -1}, {"completion_tokens": 10**30}, {"prompt_tokens": 1.5},
    {"prompt_tokens": True, "prompt_tokens_details": 3},
])  # fmt: skip
def test_what_is_no_count_is_unsaid(usage):
    said = Reported.of(usage)
    assert said is None if not isinstance(usage, dict) else said == Reported()


def test_zero_is_said():
    usage = {"prompt_tokens": 0, "completion_tokens": 0, "prompt_tokens_details": {"cached_tokens": 0}}
    assert Reported.of(usage) == Reported(0, 0, 0)


def test_the_usage_row_keeps_it_and_the_books_stay_sound(db):
    PriceBook("v1", {"tide": PRICE}).register(db)
    ledger = Ledger(db)
    ledger.open_account("ann")
    ledger.topup("ann", 10**9)
    for name, said in (("r1", Upstream(10, 5, 4, "big")), ("r2", Upstream(name="small")), ("r3", Upstream())):
        hold = ledger.hold("ann", "k", name, model="tide", price=PRICE, price_version="v1", prompt_tokens=10, max_tokens=20,
                           lifetime_s=60.0)  # fmt: skip
        with ledger.books(["ann"], [hold.request_id]) as books:
            books.settle(name, PRICE, Metered(Counts(10, 4, completion=5), "stop", said))
    columns = "upstream_prompt, upstream_completion, upstream_cached, upstream"
    rows = db.read(f"SELECT {columns} FROM usage ORDER BY request_id", ())
    assert [tuple(row) for row in rows] == [(10, 5, 4, "big"), (None, None, None, "small"), (None, None, None, None)]
    assert ledger.audit().sound
