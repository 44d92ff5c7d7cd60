"""Laws of the prices: a hold covers every bill, a version never changes, re-rating is the difference and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidelock.cli.keys import nano_usd
from tidelock.service import pricefile
from tidelock.service.books import Admission, Metered
from tidelock.service.ledger import Ledger
from tidelock.service.prices import (
    Counts,
    Price,
    PriceBook,
    Schedule,
    exact_nano,
    from_json,
    to_json,
)
from tidelock.service.rating import rerate
from tidelock.tokens.errors import UserError

KIMI = Path(pricefile.__file__).parent / "pricebooks" / "kimi.toml"
COUNT, NANO = st.integers(0, 10**6), st.integers(0, 20_000)
prices = st.builds(
    lambda cached, more, out, w5, w1, tool, num, den: Price(cached + more, cached, out, w5, w1, {"search": tool}, (num, den)),
    NANO, NANO, st.integers(1, 20_000), st.none() | NANO, st.none() | NANO, NANO, st.integers(1, 5), st.integers(1, 5),
)  # fmt: skip


@given(prices, COUNT, COUNT, COUNT, COUNT, COUNT, st.integers(0, 9))
def test_what_is_held_covers_every_bill_of_that_size(price, fresh, cached, write_5m, write_1h, completion, calls):
    used = Counts(fresh + cached + write_5m + write_1h, cached, write_5m, write_1h, completion, {"search": calls})
    assert 0 <= price.cost_nano(used) <= price.ceiling_nano(used.prompt, used.completion, used.tools)


@given(prices, st.integers(0, 10**12), COUNT)
def test_as_many_tokens_as_fit_and_not_one_more(price, nano, prompt):
    tokens = price.tokens_within(nano, prompt)
    if tokens >= 0:
        assert price.ceiling_nano(prompt, tokens) <= nano
    assert price.ceiling_nano(prompt, max(tokens, -1) + 1) > nano


@given(st.dictionaries(st.text(min_size=1, max_size=5), prices, min_size=1, max_size=3))
def test_a_stored_book_reads_back_as_it_was(models):
    models = {name: Price(**{**price.__dict__, "factor": (1, 1), "tools": {"search": 7}}) for name, price in models.items()}
    book = PriceBook("v", models, {"batch": (1, 2)}, 5.0)
    assert from_json("v", 5.0, to_json(book)) == book


def test_the_published_prices_and_their_dates():
    schedule = pricefile.read_prices(KIMI)
    k3 = schedule.at(1_780_000_000).price("kimi-k3")
    assert (k3.input_nano, k3.cached_input_nano, k3.output_nano) == (3000, 300, 15_000)
    newest = schedule.books[-1]
    assert schedule.at(newest.effective - 1) is schedule.books[0] and schedule.at(newest.effective) is newest
    pro = newest.price("kimi-k3.1-pro", "highspeed")
    assert pro.cost_nano(Counts(40, cached=10, cache_write_5m=10, cache_write_1h=10, completion=1)) == 2 * 92_000
    assert pro.cost_nano(Counts(0, tools={"$web_search": 3})) == 2 * 15_000_000
    assert newest.price("kimi-k3", "batch+highspeed").factor == (2, 2)
    with pytest.raises(UserError, match="has begun"):
        schedule.at(0)
    with pytest.raises(UserError, match="no mode"):
        newest.price("kimi-k3", "free")


BROKEN = {
    "float": ('input = "3.00"', "input = 3.0", "is no price"),
    "too fine": ('input = "3.00"', 'input = "3.0001"', "whole nano-USD"),
    "negative": ('input = "3.00"', 'input = "-3"', "is no price"),
    "unknown field": ('input = "3.00"', 'inptu = "3.00"', "unknown field inptu"),
    "no zone": ("2026-10-24T00:00:00Z", "2026-10-24T00:00:00", "with its zone"),
    "factor": ('batch = "1/2"', 'batch = "0"', "no factor"),
    "same name": ('name = "kimi-2026-10"', 'name = "kimi-2026-03"', "different names"),
    "cached above input": ('cached_input = "0.30"', 'cached_input = "30"', "0 <= cached input <= input"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_mistake_in_a_price_book_is_named(tmp_path, case):
    old, new, message = BROKEN[case]
    path = tmp_path / "prices.toml"
    path.write_text(KIMI.read_text().replace(old, new))
    with pytest.raises(UserError, match=message):
        pricefile.read_prices(path)


OLD = PriceBook("old", {"m": Price(300, 30, 1500)})


@pytest.fixture
def ledger(db):
    now = [100.0]
    ledger = Ledger(db, clock=lambda: now[0])
    ledger.now = now
    OLD.register(db)
    for customer in ("ann", "bob"):
        ledger.open_account(customer)
    return ledger


def spend(ledger: Ledger, customer: str, request_id: str, tokens: int, mode: str = "") -> None:
    price = OLD.price("m", mode)
    with ledger.books([customer]) as books:
        books.hold(Admission(request_id, customer, "key", "m", price, "old", 10, tokens, 60, mode))
    with ledger.books([customer], [request_id]) as books:
        books.settle(request_id, price, Metered(Counts(10, 4, completion=tokens), "stop"))


def test_rerating_down_returns_the_difference_once_and_edits_nothing(ledger):
    PriceBook("new", {"m": Price(300, 30, 500)}).register(ledger.db)
    ledger.topup("ann", 1_000_000)
    ledger.grant("ann", 30_000, lot="gift")
    spend(ledger, "ann", "r1", 10)  # 16_920, all from the voucher
    spend(ledger, "ann", "r2", 100)  # 151_920: 13_080 from the voucher, the rest cash
    spend(ledger, "ann", "r3", 10, "batch")
    before = [tuple(row) for row in ledger.db.read("SELECT * FROM usage ORDER BY request_id")]
    cash = ledger.balances("ann")["cash"]
    looked = rerate(ledger, 0, 1000, "new", dry_run=True)
    assert looked.changed == 3 and ledger.balances("ann")["cash"] == cash
    done = rerate(ledger, 0, 1000, "new")
    assert done == looked and done.returned_nano == 10_000 + 100_000 + 5_000
    assert ledger.balances("ann")["cash"] == cash + 100_000 + 5_000 and ledger.balances("ann")["voucher"] == 10_000
    assert rerate(ledger, 0, 1000, "new").changed == 0
    assert [tuple(row) for row in ledger.db.read("SELECT * FROM usage ORDER BY request_id")] == before
    assert ledger.audit().sound


def test_rerating_up_charges_what_there_is_and_the_rest_is_owed_until_the_next_payment(ledger):
    PriceBook("dear", {"m": Price(300, 30, 2500)}).register(ledger.db)
    PriceBook("back", {"m": Price(300, 30, 1500)}).register(ledger.db)
    ledger.topup("bob", 16_920 + 4_000)
    spend(ledger, "bob", "r1", 10)
    ledger.now[0] = 200.0
    assert rerate(ledger, 0, 100, "dear").requests == 0
    done = rerate(ledger, 0, 1000, "dear")
    assert (done.charged_nano, done.owed_nano) == (10_000, 6_000)
    assert ledger.balance("bob") == 0 and ledger.balances("bob")["receivable"] == -6_000 and ledger.audit().sound
    ledger.topup("bob", 7_000, "pay_2")
    assert ledger.balance("bob") == 1_000 and ledger.balances("bob")["receivable"] == 0
    assert rerate(ledger, 0, 1000, "back").returned_nano == 10_000 and ledger.audit().sound


def test_rerating_with_a_version_that_lacks_a_model_books_nothing(ledger):
    PriceBook("other", {"x": Price(1, 1, 1)}).register(ledger.db)
    ledger.topup("ann", 1_000_000)
    spend(ledger, "ann", "r1", 10)
    for version in ("other", "never registered"):
        with pytest.raises(UserError, match="no price"):
            rerate(ledger, 0, 1000, version)
    assert ledger.db.read("SELECT * FROM adjustments") == []


def test_a_schedule_prices_each_request_by_its_hour():
    first, second = PriceBook("a", {"m": Price(1, 1, 1)}, effective=10), PriceBook("b", {"m": Price(2, 2, 2)}, effective=20)
    schedule = Schedule((second, first))
    assert [schedule.at(t).version for t in (10, 19.9, 20, 99)] == ["a", "a", "b", "b"]


@pytest.mark.parametrize(
    ("usd", "nano"),
    [("0.1", 10**8), ("0.000000001", 1), (".5", 5 * 10**8), ("12", 12 * 10**9), ("0.30000000000000000", 3 * 10**8), ("0", 0)],
)
def test_amounts_are_exact_decimal_text(usd, nano):
    assert exact_nano(usd) == nano


@pytest.mark.parametrize(
    "usd",
    ["1.0000000000000000000000000000001", "0.0000000001", "1_000", "1e3", "1E999999", "1e-400", "NaN", "sNaN", "Infinity", "-1", "+1",
     " 1", "1 ", "1,5", "0x10", "\u0661", "1.", ".", "", "9" * 13, 0.1, 1, None],
)  # fmt: skip
def test_what_is_no_amount_is_none(usd):
    """A voucher of 1_000 gave a thousand dollars, one of 1E999999 was a failure of the server, the first was rounded."""
    assert exact_nano(usd) is None
    if isinstance(usd, str):
        with pytest.raises(UserError):
            nano_usd(usd)


def test_a_price_of_a_million_tokens_is_shared_exactly():
    assert exact_nano("0.15", 1_000_000) == 150 and exact_nano("0.0001", 1_000_000) is None
