"""Who runs when: fair between tenants, urgent first, nobody for ever, and every bound is a refusal at once."""

import asyncio
import time

import numpy as np
import pytest

from benchmarks.schedules import END, VOCAB, make
from tests.engine.driving import Driver
from tidelock.engine import Engine, Limits
from tidelock.tokens.policy import PolicyError, SamplingParams

MODEL = make("nano-k3", 0)


def words(rng, n):
    return rng.integers(10, VOCAB, n).tolist()


def order(d, requests):
    """Names of the requests in the order they are admitted, one at a time."""
    submitted = [(name, d.submit(prompt, **params)) for name, prompt, params in requests]
    admitted = []
    while d.scheduler.busy:
        d.step()
        admitted += [n for n, got in submitted if got.seq.state != "waiting" and n not in admitted]
    return admitted


def test_within_one_level_tenants_take_turns_by_tokens():
    rng = np.random.default_rng(0)
    flood = [(f"a{i}", words(rng, 20), {"tenant": "a"}) for i in range(6)]
    two = [(f"b{i}", words(rng, 20), {"tenant": "b"}) for i in range(2)]
    assert order(Driver(MODEL, max_batch=1), flood + two) == ["a0", "b0", "a1", "b1", "a2", "a3", "a4", "a5"]
    long = [(f"b{i}", words(rng, 50), {"tenant": "b"}) for i in range(2)]
    assert order(Driver(MODEL, max_batch=1), flood + long)[:5] == ["a0", "b0", "a1", "a2", "b1"]


def test_tokens_that_were_not_used_are_not_charged():
    d = Driver(MODEL, max_batch=1)
    d.ask([10, 11], tenant="a", max_tokens=100, stop_ids=tuple(range(VOCAB)))
    assert d.scheduler.line._served["a"] == 2  # the prompt; the one sampled token was never run


def test_the_urgent_come_first_and_in_order():
    rng = np.random.default_rng(0)
    asked = [(f"{p}{i}", words(rng, 9), {"priority": p}) for i in range(2) for p in (5, 0, -3)]
    assert order(Driver(MODEL, max_batch=1), asked) == ["-30", "-31", "00", "01", "50", "51"]


@pytest.mark.parametrize("flooders", ["one tenant", "a new tenant each"])
def test_nobody_starves_behind_a_flood_of_urgent_small_requests(flooders):
    """A large, patient request: it ends although there is always something more urgent that would fit."""
    d, rng = Driver(MODEL, max_batch=4, n_pages=12, n_slots=8, patience=64), np.random.default_rng(0)
    small = lambda i: d.submit(words(rng, 6), max_tokens=4, priority=-1, tenant=f"t{i}" if "new" in flooders else "t")  # noqa: E731
    for i in range(8):
        small(i)
    big = d.submit(words(rng, 70), max_tokens=20, priority=5, tenant="big")
    steps = 0
    while big.reason is None:
        while len(d.scheduler.line) < 8:
            small(steps * 100 + len(d.scheduler.line))
        d.step()
        steps += 1
        # six levels of ageing, then what runs or stood before it, then its own 90 tokens beside three others
        assert d.stats.served < 6 * 64 + 64 + 12 * 10 + 4 * 90
    assert d.stats.finished > 20


def test_a_long_prompt_does_not_hold_up_a_short_one():
    d, rng = Driver(MODEL, step_tokens=16), np.random.default_rng(0)
    long, short = d.submit(words(rng, 200), max_tokens=2), d.submit(words(rng, 12), max_tokens=2)
    while short.reason is None:
        d.step()
    assert long.seq.sampled == 0 and long.seq.computed > 0


def test_more_decoding_sequences_than_the_budget_all_move():
    d, rng = Driver(MODEL, step_tokens=4, max_batch=16), np.random.default_rng(0)
    got = [d.submit(words(rng, 3), max_tokens=40) for _ in range(12)]
    while any(g.seq.sampled == 0 for g in got):
        d.step()
        assert all(g.reason is None for g in got)  # prompts have their part of the budget
    before = [g.seq.sampled for g in got]
    d.step(9)
    assert all(g.seq.sampled - b == 3 for g, b in zip(got, before))


def test_the_urgent_waits_no_longer_for_a_patient_prefix_than_for_its_own():
    d, rng = Driver(MODEL, step_tokens=8, max_batch=8), np.random.default_rng(0)
    shared = words(rng, 60)
    patient = d.submit([*shared, 1], priority=9)
    d.step()
    crowd = [d.submit(words(rng, 60), priority=3) for _ in range(4)]
    urgent = d.submit([*shared, 2], priority=-1)
    while urgent.reason is None:
        d.step()
    assert urgent.cached >= 59 and patient.seq.computed >= 60 and all(c.seq.sampled == 0 for c in crowd)


def test_a_deadline_ends_what_runs_and_what_waits():
    d = Driver(MODEL, max_batch=1)
    runs = d.submit([10, 11], max_tokens=200, deadline_s=5.0)
    waits = d.submit([12, 13], max_tokens=200, deadline_s=3.0)
    while runs.reason is None:
        d.now += 1
        d.step()
    assert (runs.reason, waits.reason) == ("deadline", "deadline") and len(runs.ids) == 4 and waits.ids == []


def test_a_number_that_is_none_ends_only_its_own_request():
    poisoned = make("nano-k3", 0)
    poisoned.embed_tokens.weight.data[13] = float("nan")
    d, clean = Driver(poisoned), Driver(MODEL, reuse=False)
    prompts = [[1, 2, 3, 4], [1, 2, 13, 4], [5, 6, 7]]
    got = [d.submit(p, max_tokens=20) for p in prompts]
    d.drain()
    assert got[1].error.status == 500 and got[1].ids == []
    for i in (0, 2):
        want = clean.ask(prompts[i], max_tokens=20)
        upto = want.ids.index(13) + 1 if 13 in want.ids else 20
        assert got[i].ids[:upto] == want.ids[:upto] or got[i].error
    again = d.ask([13, 13, 2])
    assert again.error and not d.scheduler.running
    d.scheduler.tree.clear()
    assert d.scheduler.memory.pages.free == 256 and d.scheduler.memory.slots.free == 64


# -- at the door ------------------------------------------------------------------------------------------------------


def with_engine(work, **limits):
    async def inside():
        engine = Engine(MODEL, 1, limits=Limits(**{"n_pages": 256, "n_slots": 64, **limits}), boundary_id=END)
        try:
            return await work(engine)
        finally:
            engine.close()

    return asyncio.run(asyncio.wait_for(inside(), 120))


async def collect(engine, prompt, **params):
    ids, last = [], None
    async for last in engine.generate(prompt, SamplingParams(**{"max_tokens": 4, "seed": 7, **params})):
        ids += last.ids
    return ids, last.finish_reason


@pytest.mark.parametrize(
    ("prompt", "params"),
    [
        ([1] * 1_000_000, {}),
        ([], {}),
        ([1, VOCAB], {}),
        ([1, -1], {}),
        ([1, 2**70], {}),
        ([1, "x"], {}),
        ([1], {"max_tokens": 0}),
        ([1] * 100, {"max_tokens": 10**9}),
    ],
)
def test_what_can_never_run_is_refused_before_anything_is_allocated(prompt, params):
    async def work(engine):
        began = time.thread_time()
        with pytest.raises(PolicyError) as refused:
            await collect(engine, prompt, **params)
        assert time.thread_time() - began < 1 and not engine._live and not engine.stats.steps
        return refused.value.status, refused.value.kind

    assert with_engine(work) == (400, "invalid_request_error")


def test_a_prompt_larger_than_the_cache_is_refused_though_the_context_allows_it():
    async def work(engine):
        with pytest.raises(PolicyError, match="cache") as refused:
            await collect(engine, [1] * 200)
        return refused.value.status

    assert with_engine(work, n_pages=8) == 400


def test_ten_thousand_at_once_are_answered_or_refused_and_nothing_is_left():
    async def work(engine):
        results = await asyncio.gather(
            *(collect(engine, [1 + i % 20, 2, 3], max_tokens=2, tenant=str(i % 7)) for i in range(10_000)),
            return_exceptions=True,
        )
        refused = [r for r in results if isinstance(r, PolicyError)]
        assert all(r.status == 429 for r in refused)
        assert all(len(r[0]) == 2 for r in results if not isinstance(r, PolicyError))
        after = await collect(engine, [1, 2, 3])
        return len(refused), len(results) - len(refused), after[1], len(engine._live), engine._live_bytes

    assert with_engine(work, queue=500) == (9500, 500, "length", 0, 0)


def test_the_line_is_bounded_in_bytes():
    async def work(engine):
        results = await asyncio.gather(*(collect(engine, [1] * 100) for _ in range(8)), return_exceptions=True)
        return sorted(r.status if isinstance(r, PolicyError) else 200 for r in results)

    assert with_engine(work, queue_bytes=1200) == [200] * 3 + [429] * 5


def test_a_deadline_ends_a_request_while_everything_is_frozen():
    async def work(engine):
        await engine.pause("keep")
        return await collect(engine, [1, 2], deadline_s=0.05)

    assert with_engine(work) == ([], "deadline")
