"""Callers that pass anything, and steps that go wrong: a clear refusal for them, and nobody else notices."""

import asyncio

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from benchmarks.schedules import END, VOCAB, make
from tidelock.engine import Engine, Limits, scheduler
from tidelock.tokens.policy import PolicyError, SamplingParams

NAN, INF = float("nan"), float("inf")
HUGE = 1 << 70
JUNK = [None, True, NAN, INF, -INF, -1, 0, 1.5, HUGE, -HUGE, 1 << 62, "x", (), ("x",), ((0, NAN),), ((HUGE, 1.0),), (NAN,), {}, b"\\xff"]
FIELDS = [f for f in SamplingParams.__struct_fields__]
PROMPTS = [[], [0], [-1], [VOCAB], [HUGE], [NAN], ["x"], [None], [1.5], [[1], [2]], [1, [2]], [True], "abc", list(range(9)) * 500,
           np.array([1, 2], dtype=np.uint8), np.array([1.0])]  # fmt: skip
GOOD = SamplingParams(max_tokens=5, seed=7)


async def ask(engine, prompt, params):
    return [(chunk.ids, chunk.logprobs) async for chunk in engine.generate(prompt, params)]


async def ask_or_refusal(engine, prompt, params):
    try:
        return await asyncio.wait_for(ask(engine, prompt, params), 20)
    except PolicyError as e:
        assert str(e) and "\n" not in str(e) and (e.status in (400, 429) or "stopped" in str(e)), e
        return None


@pytest.fixture(scope="module")
def loop():
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


@pytest.fixture(scope="module")
def engine():
    engine = Engine(make("nano-k3", 0), 1, limits=Limits(n_pages=64, n_slots=16), boundary_id=END)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def answer(engine, loop):
    return loop.run_until_complete(ask(engine, [1, 2, 3], GOOD))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_whatever_is_passed_is_answered_or_refused_and_others_get_what_they_always_got(engine, loop, answer, data):
    fields = data.draw(st.lists(st.sampled_from(FIELDS), max_size=3, unique=True))
    params = replace(GOOD, **{f: data.draw(st.sampled_from(JUNK) | st.integers() | st.floats()) for f in fields})
    prompt = data.draw(st.sampled_from(PROMPTS) | st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20))

    async def both():
        return await asyncio.gather(ask_or_refusal(engine, prompt, params), ask(engine, [1, 2, 3], GOOD))

    assert loop.run_until_complete(both())[1] == answer


@pytest.mark.parametrize("seed", [-1, -HUGE, HUGE, 0, (1 << 64) + 3])
def test_any_whole_number_is_a_seed(engine, loop, seed):
    first, again = (loop.run_until_complete(ask(engine, [4], SamplingParams(max_tokens=8, seed=seed))) for _ in range(2))
    assert first == again


def test_a_step_that_fails_ends_its_own_requests_and_the_engine_goes_on(monkeypatch):
    """The old weights' forward fails once, while a request of the new ones runs beside it."""
    forward, broken = scheduler.forward, []

    def fails(model, memory, work):
        if broken and model is broken[0]:
            broken.clear()
            raise RuntimeError("a fault of the machine")
        return forward(model, memory, work)

    async def inside():
        engine = Engine(make("nano-k3", 0), 1, limits=Limits(n_pages=512, n_slots=24), boundary_id=END)
        try:
            expected = await ask(engine, [1, 2, 3], GOOD)
            old = engine._scheduler.weights.model
            monkeypatch.setattr(scheduler, "forward", fails)
            hit = [asyncio.create_task(ask(engine, [5, i], SamplingParams(max_tokens=1500, seed=i))) for i in range(3)]
            while engine.stats.decoded < 12:
                await asyncio.sleep(0.001)
            await engine.adopt(make("nano-k3", 0), 2)
            beside = asyncio.create_task(ask(engine, [6], SamplingParams(max_tokens=900, seed=1)))
            await asyncio.sleep(0.02)
            broken.append(old)
            for task in hit:
                with pytest.raises(PolicyError, match="a fault of the machine") as error:
                    await task
                assert error.value.status == 500
            assert sum(len(ids) for ids, _ in await beside) == 900
            assert await ask(engine, [1, 2, 3], GOOD) == expected
            engine._scheduler.tree.clear()
            return engine._scheduler.memory.pages.free, engine._scheduler.memory.slots.free
        finally:
            engine.close()

    assert asyncio.run(asyncio.wait_for(inside(), 60)) == (512, 24)
