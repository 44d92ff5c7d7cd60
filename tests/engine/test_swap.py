"""New weights under live requests: which version each token is from, what a pause does, and what cannot be swapped in."""

import asyncio
import dataclasses
import errno
import time

import pytest
import torch

from benchmarks.schedules import END, VOCAB, Naive, make
from tests.engine.driving import Driver
from tidelock.engine import Engine, Limits, weights
from tidelock.models import TransformerLM, ops, preset, save_checkpoint
from tidelock.tokens.errors import UserError
from tidelock.tokens.policy import PolicyError, SamplingParams

exact = pytest.mark.skipif(not ops.exact(), reason="bitwise only with the compiled kernels")


def with_engine(work, **limits):
    async def inside():
        engine = Engine(make("nano-k3", 0), 1, limits=Limits(**{"n_pages": 256, "n_slots": 64, **limits}), boundary_id=END)
        try:
            return await work(engine)
        finally:
            engine.close()

    return asyncio.run(asyncio.wait_for(inside(), 60))


async def collect(engine, prompt, **params):
    ids, versions, last = [], [], None
    async for last in engine.generate(prompt, SamplingParams(**{"max_tokens": 8, "seed": 7, **params})):
        ids += last.ids
        versions += [last.weights_version] * len(last.ids)
    return ids, versions, last.finish_reason


# -- which version ----------------------------------------------------------------------------------------------------


def begun(policy_goes_on):
    d = Driver("nano-k3", stream_every=3)
    got = [d.submit([1, 2, 3, END, 4 + i], max_tokens=12, seed=i) for i in range(4)]
    d.step(6)
    d.swap(1, 2, go_on=policy_goes_on)
    late = d.submit([1, 2, 3, END, 4], max_tokens=12)
    d.drain()
    return d, got, late


def test_finish_ends_every_request_on_the_version_it_began_with():
    d, got, late = begun(False)
    assert all(set(g.versions) == {1} and len(g.ids) == 12 for g in got) and set(late.versions) == {2}
    assert late.cached == 0  # what the old weights computed is nothing to the new ones
    assert {n.pages is not None for n in d.scheduler.tree} == {True} and len(d.scheduler.tree._roots) == 1


@exact
def test_continue_goes_on_with_the_new_weights_and_every_token_is_exactly_its_versions():
    d, got, late = begun(True)
    naive = Naive("nano-k3")
    for g in got:
        assert g.versions == [1] * 5 + [2] * 7 or g.versions == [1] * 6 + [2] * 6
        whole = torch.tensor([*g.seq.prompt, *g.ids], dtype=torch.int32).numpy()
        for i, (token, logprob, version) in enumerate(zip(g.ids, g.logprobs, g.versions)):
            row = naive.logits(version - 1, whole)[len(g.seq.prompt) + i - 1]
            assert float(torch.log_softmax(row[None], -1)[0, token]) == logprob
    assert set(late.versions) == {2}


def long_streams(preset, ends=(), drain=True):
    """Four streams behind 40 tokens they share, moved to new weights; those in `ends` are aborted while they move."""
    d = Driver(preset, stream_every=3, step_tokens=32, n_pages=256, n_slots=64)
    got = [d.submit([*(3 * j % (VOCAB - 1) for j in range(39)), END, *((i + j) % (VOCAB - 1) for j in range(40))], max_tokens=60,
                    seed=i) for i in range(4)]  # fmt: skip
    while not all(len(g.ids) > 6 for g in got):
        d.step(1)
    d.swap(1, 2, go_on=True, model=preset)
    before = [len(g.ids) for g in got]
    d.step(4)
    assert any(s.unsampled for s in d.scheduler.running) and all(len(g.ids) > n for g, n in zip(got, before))
    for i in ends:
        d.scheduler.end(got[i].seq, "abort")
    if drain:
        d.drain()
    return d, got


@exact
@pytest.mark.parametrize("preset", ["nano-k3", "nano-k2"])
def test_long_streams_move_to_new_weights_without_standing_still(preset):
    d, got = long_streams(preset)
    naive = Naive(preset)
    for g in got:
        changed = g.versions.index(2)
        assert len(g.ids) == 60 and g.versions == [1] * changed + [2] * (60 - changed)
        whole = torch.tensor([*g.seq.prompt, *g.ids], dtype=torch.int32).numpy()
        for i, (token, logprob, version) in enumerate(zip(g.ids, g.logprobs, g.versions)):
            row = naive.logits(version - 1, whole)[len(g.seq.prompt) + i - 1]
            assert float(torch.log_softmax(row[None], -1)[0, token]) == logprob
    assert {root for root in d.scheduler.tree._roots} == {d.scheduler.weights} and not d.scheduler.running


def test_who_ends_while_it_moves_leaves_nothing_behind():
    d, got = long_streams("nano-k3", ends=(0, 2))
    assert [len(g.ids) == 60 for g in got] == [False, True, False, True] and not d.scheduler.running
    d.scheduler.tree.clear()
    assert d.scheduler.memory.pages.free == 256 and d.scheduler.memory.slots.free == 64


def test_weights_that_were_replaced_while_streams_moved_to_them_go_with_the_last_that_used_them():
    d, got = long_streams("nano-k3", drain=False)
    d.swap(0, 3, go_on=False, model="nano-k3")
    for g in got:
        d.scheduler.end(g.seq, "abort")
    assert set(d.scheduler.tree._roots) <= {d.scheduler.weights} and not d.scheduler.running


def test_the_same_version_number_again_is_still_other_weights():
    d = Driver("nano-k3")
    before = d.ask([1, 2, 3, 4, 5])
    d.swap(1, 1)
    after = d.ask([1, 2, 3, 4, 5])
    assert after.cached == 0 and after.answer != before.answer


# -- pauses -----------------------------------------------------------------------------------------------------------


def test_keep_freezes_what_runs_and_queues_what_comes():
    async def work(engine):
        running = asyncio.create_task(collect(engine, [1, 2], max_tokens=100))
        while not engine.stats.decoded:
            await asyncio.sleep(0.001)
        await engine.pause("keep")
        steps, coming = engine.stats.steps, asyncio.create_task(collect(engine, [3, 4]))
        await asyncio.sleep(0.05)
        assert engine.paused and engine.stats.steps == steps and not running.done() and not coming.done()
        await engine.adopt(make("nano-k3", 1), 2)
        await engine.resume()
        return await running, await coming

    (ids, versions, _), (_, later, _) = with_engine(work)
    assert len(ids) == 100 and set(versions) == {1} and set(later) == {2}


def test_wait_lets_the_running_end_and_refuses_the_rest():
    async def work(engine):
        running = asyncio.create_task(collect(engine, [1, 2], max_tokens=60))
        await asyncio.sleep(0.01)
        pausing = asyncio.create_task(engine.pause("wait"))
        await asyncio.sleep(0)
        with pytest.raises(PolicyError) as refused:
            await collect(engine, [3])
        await pausing
        assert engine._scheduler.busy is False
        await engine.resume()
        return refused.value.status, len((await running)[0]), (await collect(engine, [3]))[2]

    assert with_engine(work) == (503, 60, "length")


def test_abort_ends_everything_at_once():
    async def work(engine):
        running = [asyncio.create_task(collect(engine, [1, i], max_tokens=1000)) for i in range(5)]
        await asyncio.sleep(0.02)
        await engine.pause("abort")
        reasons = [(await r)[2] for r in running]
        with pytest.raises(PolicyError):
            await collect(engine, [3])
        await engine.resume()
        return reasons, (await collect(engine, [3]))[2]

    assert with_engine(work, max_batch=2) == (["abort"] * 5, "length")


def test_unknown_modes_are_named():
    async def work(engine):
        for wrong in (engine.pause("soon"), engine.adopt(make("nano-k3", 0), 2, "maybe")):
            with pytest.raises(PolicyError, match="use one of"):
                await wrong

    with_engine(work)


# -- what cannot be served --------------------------------------------------------------------------------------------


def nan(directory):
    model = make("nano-k3", 2)
    model.layers[1].mlp.w_out.data[0, 0, 0] = float("nan")
    save_checkpoint(directory, model)


def endless(directory):
    """Every weight is a number and no logit is."""
    model = make("nano-k3", 2)
    model.lm_head.weight.data.fill_(3e38)
    save_checkpoint(directory, model)


def cut_short(directory):
    """What a disk that filled up during the copy leaves."""
    save_checkpoint(directory, make("nano-k3", 2))
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def weights_gone(directory):
    save_checkpoint(directory, make("nano-k3", 2))
    (directory / "model.safetensors").unlink()


def other_shape(directory):
    config = preset("nano-k3", VOCAB)
    save_checkpoint(directory, TransformerLM(dataclasses.replace(config, kv_lora_rank=32)))


def other_vocabulary(directory):
    save_checkpoint(directory, TransformerLM(preset("nano-k3", 64)))


def nothing(directory):
    pass


@pytest.mark.parametrize("harm", [nan, endless, cut_short, weights_gone, other_shape, other_vocabulary, nothing])
def test_weights_that_cannot_be_served_leave_the_old_ones_serving(harm, tmp_path):
    async def work(engine):
        before = await collect(engine, [1, 2, 3])
        running = asyncio.create_task(collect(engine, [1, 2, 3], max_tokens=200))
        harm(tmp_path / "new")
        with pytest.raises((UserError, PolicyError)) as refused:
            await engine.swap(str(tmp_path / "new"), 2)
        assert "\n" not in str(refused.value)
        assert len((await running)[0]) == 200 and await collect(engine, [1, 2, 3]) == before and engine.version == 1
        save_checkpoint(tmp_path / "good", make("nano-k3", 1))
        await engine.swap(str(tmp_path / "good"), 3)
        return set((await collect(engine, [1, 2, 3]))[1])

    assert with_engine(work) == {3}


def test_a_disk_that_fails_while_reading_is_a_refusal(tmp_path, monkeypatch):
    def fail(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    async def work(engine):
        save_checkpoint(tmp_path / "new", make("nano-k3", 1))
        monkeypatch.setattr(weights, "load_checkpoint", fail)
        with pytest.raises(UserError, match="No space"):
            await engine.swap(str(tmp_path / "new"), 2)
        return (await collect(engine, [1]))[2]

    assert with_engine(work) == "length"


def test_loading_does_not_stop_the_stream(tmp_path, monkeypatch):
    """However long a load takes, tokens keep coming while it does."""
    load = weights.load_checkpoint
    monkeypatch.setattr(weights, "load_checkpoint", lambda path: (time.sleep(0.3), load(path))[1])

    async def work(engine):
        save_checkpoint(tmp_path / "new", make("nano-k3", 1))
        running = asyncio.create_task(collect(engine, [1, 2], max_tokens=1500))
        await asyncio.sleep(0.02)
        before = engine.stats.decoded
        swapping = asyncio.create_task(engine.swap(str(tmp_path / "new"), 2))
        await asyncio.sleep(0.2)
        during = engine.stats.decoded - before
        running.cancel()
        await swapping
        return during

    assert with_engine(work) > 0
