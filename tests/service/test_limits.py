"""Laws of the limits: nobody gets more than the limit and what drains, nobody is refused what fits, on one worker or many."""

from __future__ import annotations

import asyncio
import re
from datetime import UTC, datetime
from fractions import Fraction

import anthropic
import httpx2 as httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidelock.service.books import Admission, InsufficientBalance, Metered
from tidelock.service.db import Database
from tidelock.service.ladder import KIMI, NANO, OPEN, Ladder, Limits
from tidelock.service.ledger import Ledger
from tidelock.service.limiter import RateLimited
from tidelock.service.limits import duration, limit_headers
from tidelock.service.prices import Counts, Price
from tidelock.service.tiers import Tiers
from tidelock.service.till import Till
from tidelock.tokens.errors import UserError

PRICE = Price(1, 0, 1)
ASK = {"model": "tide", "messages": [{"role": "user", "content": "hi"}]}


class Shop:
    """Admissions at moments of our choosing."""

    def __init__(self, target: str) -> None:
        self.now = 1_000_000.0
        self.db = Database(target)
        self.ledger = Ledger(self.db, clock=lambda: self.now)
        self.ledger.open_account("ann")
        self.ledger.topup("ann", 10**15)
        self.tiers, self.n = Tiers(self.db), 0

    def ask(self, prompt: int, most: int, ladder: Ladder = OPEN, customer: str = "ann", project: str = "p", key: str = "k"):
        self.n += 1
        reserve = prompt + most
        ask = Admission(f"r{self.n}", customer, key, "m", PRICE, "v", prompt, most, 60.0, project=project, ladder=ladder,
                        reserve=reserve)  # fmt: skip
        with self.ledger.books([customer]) as books:
            return books.hold(ask)

    def settle(self, hold, prompt: int, completion: int) -> None:
        with self.ledger.books([hold.customer], [hold.request_id]) as books:
            books.settle(hold.request_id, PRICE, Metered(Counts(prompt, completion=completion), "stop"))


@pytest.fixture
def shop(target):
    shop = Shop(target)
    yield shop
    assert shop.ledger.audit().sound
    shop.db.close()


# ---- the ladder --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("usd", "tier", "concurrency", "rpm", "tpm", "tpd"),
    [(0, 0, 1, 3, 500_000, 1_500_000), (1, 0, 1, 3, 500_000, 1_500_000), (10, 1, 50, 200, 2_000_000, None),
     (19, 1, 50, 200, 2_000_000, None), (20, 2, 100, 500, 3_000_000, None), (100, 3, 200, 5000, 3_000_000, None),
     (1000, 4, 400, 5000, 4_000_000, None), (3000, 5, 1000, 10000, 5_000_000, None), (10**6, 5, 1000, 10000, 5_000_000, None)],
)  # fmt: skip
def test_kimi_s_ladder_is_the_published_table(usd, tier, concurrency, rpm, tpm, tpd):
    assert KIMI.tier(usd * NANO) == tier and KIMI.limits(usd * NANO) == Limits(concurrency, rpm, tpm, tpd)


def test_the_tier_follows_cash_and_not_vouchers_and_a_hand_may_set_it(shop):
    ledger, tiers = shop.ledger, shop.tiers
    tiers.set_ladder(KIMI)
    ledger.open_account("bob")
    ledger.grant("bob", 5000 * NANO, lot="gift")
    assert tiers.standing("bob")[0] == 0
    ledger.topup("bob", 6 * NANO, "a"), ledger.topup("bob", 5 * NANO, "b")
    assert tiers.standing("bob") == (1, 11 * NANO, KIMI.tiers[1][1])
    assert [shop.ask(1, 1, KIMI, "bob").standing.requests.limit for _ in range(2)] == [200, 200]
    ledger.refund("bob", 2 * NANO, "c")
    assert tiers.standing("bob")[0] == 0 and tiers.standing("bob")[1] == 9 * NANO
    tiers.set_caps("bob", Limits(requests=7), tier=4)
    tier, _, limits = tiers.standing("bob")
    assert tier == 4 and limits == Limits(400, 7, 4_000_000, None)
    assert shop.ask(1, 1, KIMI, "bob").standing.requests.limit == 7
    tiers.set_caps("bob", Limits())
    assert tiers.standing("bob")[0] == 0 and tiers.caps("bob") == {}


def test_a_ladder_is_in_force_for_other_workers_within_a_second(shop, target):
    now = [0.0]
    other = Tiers(Database(target), monotonic=lambda: now[0])
    assert other.ladder == OPEN
    shop.tiers.set_ladder(KIMI)
    now[0] += 1.0
    assert other.ladder == KIMI
    with pytest.raises(UserError):
        shop.tiers.set_ladder(Ladder("odd", ((5, Limits()), (5, Limits()))))


# ---- one bucket against a naive oracle ---------------------------------------------------------------------------


def drained(history, limit: int, until: Fraction) -> Fraction:
    """What is in a bucket of (time, amount) that drains at `limit` a minute, from the whole history every time."""
    level, at = Fraction(0), history[0][0] if history else until
    for when, amount in [*history, (until, 0)]:
        level, at = max(level - (when - at) * limit / 60, Fraction(0)) + amount, when
        level = max(level, Fraction(0))
    return level


STEPS = st.lists(
    st.tuples(st.integers(0, 25_000), st.sampled_from(["ask", "settle"]), st.integers(1, 70), st.integers(1, 70), st.integers(0, 9)),
    min_size=1, max_size=25,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(steps=STEPS, rpm=st.integers(1, 6), tpm=st.integers(20, 200))
def test_admission_is_exactly_what_a_naive_bucket_says_and_true_use_stays_under_the_limit(steps, rpm, tpm):
    shop = Shop(":memory:")
    shop.tiers.set_caps("ann", Limits(requests=rpm, tokens=tpm))
    requests: list[tuple[Fraction, Fraction | int]] = []
    tokens: list[tuple[Fraction, Fraction | int]] = []
    running, true_use = [], {}
    for pause_ms, what, prompt, most, which in steps:
        shop.now += pause_ms / 1000
        now = Fraction(int(shop.now * 1000), 1000)
        if what == "ask":
            fits = drained(requests, rpm, now) + 1 <= rpm and drained(tokens, tpm, now) + prompt + most <= tpm
            if fits:
                hold = shop.ask(prompt, most)
                requests.append((now, 1))
                tokens.append((now, prompt + most))
                running.append((hold, now, prompt, most))
                true_use[hold.request_id] = [now, prompt + most]
                assert hold.standing.tokens.remaining == int(tpm - drained(tokens, tpm, now))
            else:
                with pytest.raises(RateLimited):
                    shop.ask(prompt, most)
        elif running:
            hold, since, prompt, most = running.pop(which % len(running))
            used = min(which * 8, most)
            shop.settle(hold, prompt, used)
            true_use[hold.request_id][1] = prompt + used
            back = max(most - used - (now - since) * tpm / 60, Fraction(0))
            tokens.append((now, -back))
    for start, _ in true_use.values():
        for end, _ in true_use.values():
            within = sum(amount for when, amount in true_use.values() if start <= when <= end)
            assert end < start or within <= tpm + (end - start) * tpm / 60
    shop.db.close()


def test_the_unused_part_is_given_back_and_the_day_counts_too(shop):
    shop.tiers.set_caps("ann", Limits(tokens=1000, day_tokens=1500))
    hold = shop.ask(100, 900)
    assert hold.standing.tokens.remaining == 0
    with pytest.raises(RateLimited, match="TPM 1001 of 1000"):
        shop.ask(0, 1)
    shop.settle(hold, 100, 50)
    assert shop.ask(100, 750).standing.tokens.remaining == 0
    shop.now += 60
    with pytest.raises(RateLimited, match="TPD") as reached:
        shop.ask(500, 500)
    assert reached.value.retry_s > 1000
    with pytest.raises(RateLimited) as hopeless:
        shop.ask(900, 200)
    assert hopeless.value.retry_s is None  # larger than the limit: waiting does not help


def test_waiting_as_long_as_was_said_is_enough_and_a_second_less_is_not(shop):
    shop.tiers.set_caps("ann", Limits(requests=3))
    for _ in range(3):
        shop.ask(1, 1)
    with pytest.raises(RateLimited) as reached:
        shop.ask(1, 1)
    assert (reached.value.current, reached.value.limit, reached.value.retry_s) == (4, 3, 20)
    shop.now += 19
    with pytest.raises(RateLimited):
        shop.ask(1, 1)
    shop.now += 1
    shop.ask(1, 1)


def test_concurrency_is_the_number_of_open_holds_however_they_end(shop):
    shop.tiers.set_caps("ann", Limits(concurrency=2))
    one, _ = shop.ask(1, 1), shop.ask(1, 1)
    with pytest.raises(RateLimited, match="concurrency 2 of 2"):
        shop.ask(1, 1)
    shop.settle(one, 1, 1)
    three = shop.ask(1, 1)
    shop.ledger.release(three.request_id)
    shop.ask(1, 1)
    shop.now += 61
    assert shop.ledger.sweep() == 2  # expired with their servers
    shop.ask(1, 1), shop.ask(1, 1)


def test_caps_of_a_project_and_a_key_hold_within_the_organisation_s_limits(shop):
    shop.tiers.set_caps("ann", Limits(requests=5))
    shop.tiers.set_caps("ann", Limits(requests=3), "side")
    shop.tiers.set_caps("ann", Limits(requests=1, concurrency=9), "small")
    shop.ask(1, 1, project="side", key="small")
    with pytest.raises(RateLimited, match="RPM 2 of 1"):
        shop.ask(1, 1, project="side", key="small")
    shop.ask(1, 1, project="side"), shop.ask(1, 1, project="side")
    with pytest.raises(RateLimited, match="RPM 4 of 3"):
        shop.ask(1, 1, project="side")
    assert shop.ask(1, 1).standing.requests.remaining == 1  # what was refused below was not counted above
    shop.ask(1, 1)
    with pytest.raises(RateLimited, match="RPM 6 of 5"):
        shop.ask(1, 1)


def test_who_cannot_pay_is_not_counted(shop):
    shop.tiers.set_caps("bob", Limits(requests=1))
    shop.ledger.open_account("bob")
    with pytest.raises(InsufficientBalance):
        shop.ask(1, 1, customer="bob")
    shop.ledger.topup("bob", 100)
    shop.ask(1, 1, customer="bob")


def test_two_workers_at_once_admit_exactly_the_limit(target):
    shop = Shop(target)
    shop.tiers.set_caps("ann", Limits(requests=17, tokens=10_000))
    tills = [Till(Database(target) if "://" in target else shop.db, clock=lambda: 2e6) for _ in range(3)]

    async def all_at_once() -> list:
        asks = [Admission(f"q{n}", "ann", "k", "m", PRICE, "v", 10, 10, 60.0, ladder=OPEN, reserve=20) for n in range(60)]
        return await asyncio.gather(*(tills[n % 3].hold(ask) for n, ask in enumerate(asks)), return_exceptions=True)

    results = asyncio.run(all_at_once())
    refused = [r for r in results if isinstance(r, RateLimited)]
    assert len(results) - len(refused) == 17 and len(refused) == 43
    for till in tills:
        till.close()
    assert shop.db.read("SELECT COUNT(*) FROM holds")[0][0] == 17


# ---- on the wire -------------------------------------------------------------------------------------------------


def test_headers_speak_all_three_dialects_and_are_live(service):
    secret = service.key("ann")
    service.state.tiers.set_caps("ann", Limits(requests=100, tokens=60_000))
    answers = [service.client(secret).chat.completions.with_raw_response.create(**ASK, max_tokens=400) for _ in range(2)]
    first, second = (answer.headers for answer in answers)
    assert (first["x-ratelimit-limit-requests"], first["x-ratelimit-remaining-requests"]) == ("100", "99")
    assert second["x-ratelimit-remaining-requests"] in ("98", "99") and first["x-ratelimit-limit"] == "100"
    assert re.fullmatch(r"\d+ms|[\d.]+s|\d+m[\d.]+s", first["x-ratelimit-reset-tokens"])
    assert not any(name.startswith("anthropic-") for name in first)  # each in its own words
    usage = answers[0].parse().usage
    kept = 60_000 - int(second["x-ratelimit-remaining-tokens"])
    assert kept <= 2 * usage.prompt_tokens + usage.completion_tokens + 400  # the first gave its unused part back
    body = {"model": "tide", "max_tokens": 50, "messages": ASK["messages"]}
    root = service.running.base_url.removesuffix("/v1")
    client = anthropic.Anthropic(base_url=root, api_key=secret)
    headers = client.messages.with_raw_response.create(**body).headers
    assert headers["anthropic-ratelimit-requests-limit"] == "100" and int(headers["anthropic-ratelimit-tokens-remaining"]) < 60_000
    reset = datetime.fromisoformat(headers["anthropic-ratelimit-tokens-reset"])
    assert reset.tzinfo is not None and abs((reset - datetime.now(UTC)).total_seconds()) < 70
    with service.client(secret).chat.completions.with_streaming_response.create(**ASK, stream=True) as stream:
        assert int(stream.headers["x-ratelimit-remaining-requests"]) <= 98
        list(stream.iter_lines())


def test_a_service_starts_without_limits_and_says_nothing_of_them(service):
    headers = service.client().chat.completions.with_raw_response.create(**ASK).headers
    assert not [name for name in headers if "ratelimit" in name]


@pytest.mark.parametrize(
    ("limits", "words", "retried"),
    [
        (Limits(requests=1), r"request reached RPM rate limit, current:2, limit:1", True),
        (Limits(tokens=10), r"request reached TPM rate limit, current:\d+, limit:10", False),
        (Limits(day_tokens=10), r"request reached TPD rate limit, current:\d+, limit:10", False),
        (Limits(concurrency=0), r"request reached max concurrency, current:0, limit:0", True),
    ],
)
def test_a_limit_is_429_in_kimi_s_words(service, limits, words, retried):
    secret = service.key("ann")
    client = service.client(secret, max_retries=0)
    if limits.requests:
        service.state.tiers.set_caps("ann", limits)
        client.chat.completions.create(**ASK)
    service.state.tiers.set_caps("ann", limits)
    before = service.state.ledger.balance("ann")
    with pytest.raises(openai.RateLimitError) as refused:
        client.chat.completions.create(**ASK)
    error, headers = refused.value.body, refused.value.response.headers
    key_id = service.state.keys.list("ann")[0].id
    assert error["type"] == "rate_limit_reached_error" and error["message"].startswith(f"Your account ann<{key_id}> ")
    assert re.search(words, error["message"])
    assert headers["x-should-retry"] == str(retried).lower() and ("retry-after" in headers) is retried
    assert service.state.ledger.balance("ann") == before
    url, body = service.running.base_url + "/messages", {"model": "tide", "max_tokens": 50, "messages": ASK["messages"]}
    answer = httpx.post(url, json=body, headers={"x-api-key": secret, "anthropic-version": "2023-06-01"})
    assert answer.status_code == 429 and answer.json()["error"]["type"] == "rate_limit_error"


@pytest.mark.parametrize(
    ("ms", "text"), [(0, "0ms"), (12, "12ms"), (1500, "1.5s"), (60_000, "1m0s"), (360_000, "6m0s"), (3_661_000, "1h1m1s")]
)
def test_durations_read_as_openai_s_do(ms, text):
    assert duration(ms) == text


def test_no_limits_no_headers():
    from tidelock.service.limiter import Gauge, Standing

    assert limit_headers(Standing()) == {}
    kimi = limit_headers(Standing(tokens=Gauge(9, 3, 1001)), now=0.5)
    assert kimi["x-ratelimit-reset"] == "2" and kimi["anthropic-ratelimit-tokens-reset"] == "1970-01-01T00:00:02Z"


def test_a_clock_that_is_put_back_stops_nobody_and_one_that_is_a_little_slow_gives_nothing_away(shop):
    """It was an hour fast: put right, it let nobody use a limit again for an hour."""
    def retry_s() -> int:
        """As the till does it: what is refused is written down with the rest."""
        shop.n += 1
        with shop.ledger.books(["ann"]) as books, pytest.raises(RateLimited) as reached:
            books.hold(Admission(f"r{shop.n}", "ann", "k", "m", PRICE, "v", 1, 1, 60.0, project="p", ladder=OPEN, reserve=2))
        return reached.value.retry_s

    shop.tiers.set_caps("ann", Limits(requests=3))
    for _ in range(3):
        shop.ask(1, 1)
    shop.now -= 3600
    shop.now += retry_s()
    shop.ask(1, 1)
    for skew in (-30, 30, -30, 30):  # two workers, whose clocks differ
        shop.now += skew
        assert retry_s() > 0
    shop.now += 20
    shop.ask(1, 1)
