"""The engine: the same tokens in any company, from any cache, across a swap; and nothing leaks."""

import asyncio
import random

import pytest
import torch

from tidelock.engine import Engine, Limits
from tidelock.models import Batch, TransformerLM, ops, preset, save_checkpoint
from tidelock.tokens.errors import UserError
from tidelock.tokens.policy import PolicyError, SamplingParams

END, VOCAB = 9, 64
exact = pytest.mark.skipif(not ops.exact(), reason="bitwise only with the compiled kernels")
each_preset = pytest.mark.parametrize("name", ["nano-k3", "nano-k2"])


def make(name="nano-k3", seed=0):
    model = TransformerLM(preset(name, VOCAB), seed=seed)
    for p in model.parameters():
        p.data.mul_(2.5)  # random weights with opinions
    return model.eval()


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 60))


async def collect(engine, prompt, **params):
    ids, logprobs, versions, last = [], [], [], None
    async for chunk in engine.generate(prompt, SamplingParams(**{"max_tokens": 12, "seed": 7, **params})):
        ids += chunk.ids
        logprobs += chunk.logprobs
        versions += [chunk.weights_version] * len(chunk.ids)
        last = chunk
    return ids, logprobs, versions, last


def prompts(n, seed=0):
    rng = random.Random(seed)
    return [[rng.choice([i for i in range(VOCAB) if i != END]) for _ in range(rng.randint(1, 40))] for _ in range(n)]


def with_engine(work, model=None, **limits):
    async def inside():
        engine = Engine(model or make(), 1, limits=Limits(n_pages=256, n_slots=64, **limits), boundary_id=END)
        try:
            return await work(engine)
        finally:
            engine.close()

    return run(inside())


@exact
@each_preset
def test_a_request_gets_the_same_tokens_alone_in_company_and_in_chunks(name):
    asked, model = prompts(10), make(name)

    async def alone(engine):
        return [(await collect(engine, p, seed=i))[:2] for i, p in enumerate(asked)]

    async def company(engine):
        return [r[:2] for r in await asyncio.gather(*(collect(engine, p, seed=i) for i, p in enumerate(asked)))]

    expected = with_engine(alone, model)
    assert with_engine(company, model) == expected
    assert with_engine(company, model, step_tokens=7, max_batch=3) == expected


@exact
@each_preset
def test_recorded_logprobs_are_the_training_forwards(name):
    model, prompt = make(name), prompts(1)[0]
    ids, logprobs, _, _ = with_engine(lambda e: collect(e, prompt), model)
    whole = torch.tensor(prompt + ids)
    batch = Batch(whole, torch.tensor([0, len(whole)], dtype=torch.int32), torch.zeros(1, dtype=torch.int32))
    recomputed = torch.log_softmax(model.logits(model(batch)), -1)[len(prompt) - 1 : -1].gather(1, whole[len(prompt) :, None])
    assert recomputed[:, 0].tolist() == logprobs


@exact
@each_preset
def test_a_cached_beginning_changes_nothing_but_the_work(name):
    """Shared system block, and a next turn that continues the last one."""
    model = make(name)
    system, users = [1, 2, 3, 4, 5, END], [[10, 11, END, 20], [12, END, 20], [13, 14, 15, END, 20]]
    turns = [system + u for u in users]

    async def cold(engine):
        out = []
        for i, p in enumerate(turns):
            out.append((await collect(engine, p, seed=i))[:2])
            engine._scheduler.tree.clear()
        return out

    async def warm(engine):
        first = [await collect(engine, p, seed=i) for i, p in enumerate(turns)]
        assert [r[3].cached_tokens for r in first] == [0, 6, 6]
        return [r[:2] for r in first]

    assert with_engine(warm, model) == with_engine(cold, model)

    async def continued(engine, forget):
        ids, _, _, _ = await collect(engine, turns[0], max_tokens=40, stop_ids=tuple(range(VOCAB)), temperature=0.0)
        follow = turns[0] + [END] + [30, 31, END, 20]
        await collect(engine, turns[0], max_tokens=1, stop_ids=(END,))
        if forget:
            engine._scheduler.tree.clear()
        return (await collect(engine, follow, seed=3))[:2]

    assert with_engine(lambda e: continued(e, False), model) == with_engine(lambda e: continued(e, True), model)


@exact
def test_little_memory_means_waiting_and_forgetting_not_other_tokens():
    model, asked = make(), [[1, 2, END] + p + [END, 5] for p in prompts(12, 3)]

    async def all_at_once(engine):
        return [r[:2] for r in await asyncio.gather(*(collect(engine, p, seed=i) for i, p in enumerate(asked)))]

    async def inside():
        engine = Engine(model, 1, limits=Limits(n_pages=9, page_size=8, n_slots=3), boundary_id=END)
        try:
            return await all_at_once(engine)
        finally:
            engine.close()

    assert run(inside()) == with_engine(all_at_once, model)


def test_seeds_reproduce_and_differ_and_temperature_zero_is_greedy():
    async def work(engine):
        p = prompts(1)[0]
        a, b, c = [(await collect(engine, p, seed=s))[0] for s in (1, 1, 2)]
        g, h = [(await collect(engine, p, seed=s, temperature=0.0))[0] for s in (1, 2)]
        return a, b, c, g, h

    a, b, c, g, h = with_engine(work)
    assert a == b != c and g == h


def test_a_stop_id_ends_the_turn_and_belongs_to_it():
    async def work(engine):
        return await collect(engine, [1, 2, 3], max_tokens=200, stop_ids=tuple(range(0, VOCAB, 3)))

    ids, _, _, last = with_engine(work)
    assert ids[-1] % 3 == 0 and all(i % 3 for i in ids[:-1]) and last.finish_reason == "stop"


def test_swap_under_live_requests_never_mixes_versions():
    async def work(engine):
        running = [asyncio.create_task(collect(engine, p, max_tokens=60, seed=i)) for i, p in enumerate(prompts(6))]
        await asyncio.sleep(0.05)
        await engine.adopt(make(seed=1), 2)
        later = await asyncio.gather(*(collect(engine, p) for p in prompts(4, 1)))
        return await asyncio.gather(*running), later

    before, later = with_engine(work, stream_every=1)
    assert all(len(set(versions)) == 1 for _, _, versions, _ in [*before, *later])
    assert any(versions[0] == 1 for _, _, versions, _ in before)
    assert all(versions[0] == 2 for _, _, versions, _ in later)


def test_a_failed_swap_leaves_the_old_weights_serving(tmp_path):
    async def work(engine):
        before = await collect(engine, [1, 2, 3])
        with pytest.raises(UserError):
            await engine.swap(str(tmp_path / "nowhere"), 2)
        with pytest.raises(PolicyError, match="vocabulary"):
            await engine.adopt(TransformerLM(preset("nano-k3", 32)), 2)
        save_checkpoint(tmp_path / "good", make(seed=4))
        assert (await collect(engine, [1, 2, 3]))[:3] == before[:3]  # all but its chunks, which say how long they took
        await engine.swap(str(tmp_path / "good"), 2)
        after = await collect(engine, [1, 2, 3])
        return before, after

    before, after = with_engine(work)
    assert set(before[2]) == {1} and set(after[2]) == {2} and after[1] != before[1]


@pytest.mark.parametrize("seed", range(4))
def test_nothing_leaks_whatever_the_schedule(seed):
    rng = random.Random(seed)

    async def one(engine, prompt, patience):
        stream = engine.generate(prompt, SamplingParams(max_tokens=rng.randint(1, 30), seed=1, stop_ids=(END,)))
        async for _ in stream:
            patience -= 1
            if patience == 0:
                await stream.aclose()
                return

    async def work(engine):
        tasks = []
        for i, p in enumerate(prompts(40, seed)):
            tasks.append(asyncio.create_task(one(engine, [3, 4, END] + p, rng.choice([1, 2, 99]))))
            if rng.random() < 0.3:
                await asyncio.sleep(0.003)
            if i == 20:
                await engine.adopt(make(seed=1), 2)
        await asyncio.gather(*tasks)
        await collect(engine, [1], max_tokens=1)  # one more step, so that the last aborts are seen
        scheduler = engine._scheduler
        assert not scheduler.running and not len(scheduler.line) and not engine._live
        scheduler.tree.clear()
        return scheduler.memory.pages.free, scheduler.memory.slots.free

    assert with_engine(work, max_batch=8, stream_every=1) == (256, 64)


def test_a_full_queue_and_a_long_prompt_are_refused_at_once():
    async def work(engine):
        with pytest.raises(PolicyError) as long:
            await collect(engine, [1] * 2040)
        streams = [engine.generate([1, 2], SamplingParams(max_tokens=50)) for _ in range(3)]
        firsts = [asyncio.create_task(anext(s)) for s in streams]
        await asyncio.gather(*firsts[:2])
        with pytest.raises(PolicyError) as full:
            await firsts[2]
        for s in streams[:2]:
            await s.aclose()
        return long.value.status, full.value.status

    assert with_engine(work, queue=2) == (400, 429)


def test_weights_that_are_not_numbers_fail_requests_and_nothing_else():
    bad = make()
    with torch.no_grad():
        bad.lm_head.weight.fill_(float("nan"))

    async def work(engine):
        with pytest.raises(PolicyError) as error:
            await collect(engine, [1, 2])
        await engine.adopt(make(), 2)
        return error.value.status, len((await collect(engine, [1, 2]))[0])

    assert with_engine(work, bad) == (500, 12)


def test_closing_ends_what_is_running():
    async def inside():
        engine = Engine(make(), 1)
        running = asyncio.create_task(collect(engine, [1, 2], max_tokens=1000))
        await asyncio.sleep(0.05)
        await asyncio.to_thread(engine.close)
        with pytest.raises(PolicyError):
            await running
        with pytest.raises(PolicyError):
            await collect(engine, [1])

    run(inside())
