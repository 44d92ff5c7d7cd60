"""What every `Policy` promises, asked of each of the three in the same words."""

import asyncio
import math

import pytest
from msgspec.structs import replace
from policies import CONTEXT, TEMPLATE, serving_model

from tidelock.tokens.message import Message
from tidelock.tokens.policy import Constraint, PolicyError, SamplingParams, kept_ids

PROMPT = TEMPLATE.render([Message("system", "be brief"), Message("user", "name three tides")], generation_prompt=True)
PARAMS = SamplingParams(max_tokens=24, temperature=1.0, stop_ids=TEMPLATE.stop_ids, seed=7)


async def collect(policy, prompt=PROMPT, params=PARAMS, request_id=None):
    return [chunk async for chunk in policy.generate(prompt, params, request_id)]


def run(work):
    return asyncio.run(asyncio.wait_for(work, 60))


def ids(chunks):
    return [i for c in chunks for i in c.ids]


async def until(condition):
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it did not come to that within 5 s")


def test_the_last_chunk_and_only_it_has_a_reason_and_numbers_go_with_ids(case):
    chunks = run(collect(case.policy))
    assert [c.finish_reason is not None for c in chunks] == [False] * (len(chunks) - 1) + [True]
    assert all(len(c.ids) == len(c.logprobs) for c in chunks) and ids(chunks)
    assert all(math.isfinite(p) and p <= 0 for c in chunks for p in c.logprobs)
    assert {c.weights_version for c in chunks} == ({case.engine.version} if case.exact else {-1})
    if case.exact:
        assert len(chunks) > 1 and len(ids(chunks)) <= PARAMS.max_tokens  # it streams


def test_the_same_seed_says_the_same_alone_and_in_company_and_another_seed_another_thing(case):
    async def work():
        alone = await collect(case.policy)
        seeds = [7, 8, 9, 7]
        together = await asyncio.gather(*(collect(case.policy, params=replace(PARAMS, seed=s)) for s in seeds))
        return ids(alone), [ids(c) for c in together]

    alone, together = run(work())
    assert together[0] == together[3] == alone and len({tuple(t) for t in together}) == 3


def test_greedy_text_is_the_same_through_every_door(world):
    greedy = replace(PARAMS, temperature=0.0, seed=None)
    said = {name: run(collect(case.policy, params=greedy)) for name, case in world.items()}
    assert ids(said["token ids"]) == ids(said["engine"])
    numbers = {name: [p for c in said[name] for p in c.logprobs] for name in ("engine", "token ids")}
    assert numbers["token ids"] == numbers["engine"]  # to the last bit: JSON carries doubles

    def read(name):
        parser = TEMPLATE.parser(0)
        parser.feed(ids(said[name]))
        message = parser.finish()
        return message.reasoning, message.content

    assert read("text") == read("engine")


def test_what_length_cuts_says_so(case):
    chunks = run(collect(case.policy, params=replace(PARAMS, max_tokens=3)))
    assert chunks[-1].finish_reason == "length" and (not case.exact or len(ids(chunks)) == 3)


def test_a_stop_id_ends_the_answer_and_is_part_of_it(exact):
    said = ids(run(collect(exact.policy)))
    stop = next(i for i in said[3:] if i not in said[:3])
    chunks = run(collect(exact.policy, params=replace(PARAMS, stop_ids=(stop,))))
    assert ids(chunks) == said[: said.index(stop) + 1] and chunks[-1].finish_reason == "stop"


def test_cached_tokens_are_told_at_the_end(case):
    run(collect(case.policy))
    chunks = run(collect(case.policy))
    assert 0 < chunks[-1].cached_tokens < len(PROMPT)


def test_an_abort_ends_the_stream_with_that_word(case):
    async def work():
        before = case.engine.stats.decoded
        answer = asyncio.create_task(collect(case.policy, params=replace(PARAMS, max_tokens=1900, stop_ids=()), request_id="x1"))
        await until(lambda: case.engine.stats.decoded > before + 4)
        await case.policy.abort("x1")
        return await answer

    chunks = run(work())
    assert chunks[-1].finish_reason == "abort" and len(ids(chunks)) < 1900
    assert ids(run(collect(case.policy)))  # and the policy goes on


def test_leaving_the_stream_frees_the_engine(case):
    async def work():
        before = case.engine.stats.decoded
        stream = case.policy.generate(PROMPT, replace(PARAMS, max_tokens=1900, stop_ids=()))
        reading = asyncio.create_task(anext(stream))
        await until(lambda: case.engine.stats.decoded > before + 4)
        if case.exact:
            await reading
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        await stream.aclose()
        await until(lambda: not case.engine._live)
        assert case.engine.stats.decoded < before + 1700  # it was stopped, it did not finish

    run(work())


def test_abort_of_what_nobody_asked_is_nothing(case):
    run(case.policy.abort("never heard of it"))


def test_count_is_of_the_prompt(case):
    assert run(case.policy.count(PROMPT)) == len(PROMPT)


def test_what_can_never_run_is_refused_as_the_callers_fault(case):
    with pytest.raises(PolicyError, match=str(CONTEXT)) as e:
        run(collect(case.policy, params=replace(PARAMS, max_tokens=CONTEXT + 1)))
    assert e.value.status == 400 and "\n" not in str(e.value)


def test_after_a_swap_every_chunk_has_the_new_version_and_a_failed_one_changes_nothing(case, tmp_path):
    before = case.engine.version
    if not case.exact:
        with pytest.raises(PolicyError) as e:
            run(case.policy.swap(str(case.checkpoint), before + 1))
        assert e.value.status == 400
        return
    old = ids(run(collect(case.policy)))
    with pytest.raises(Exception, match="no checkpoint"):
        run(case.policy.swap(str(tmp_path / "nothing"), before + 1))
    assert {c.weights_version for c in run(collect(case.policy))} == {before}
    run(case.policy.swap(str(case.checkpoint), before + 1))
    new = run(collect(case.policy))
    assert {c.weights_version for c in new} == {before + 1} and (before > 1 or ids(new) != old)


def test_experts_are_told_where_asked_from_there_on_and_reuse_ends_there(exact):
    """The forward of training, run over prompt and answer, chooses what the engine says it chose."""
    import torch

    from tidelock.engine.routing import noted, routing_for
    from tidelock.models import Batch

    model, params = serving_model(exact.engine), replace(PARAMS, seed=21)
    run(collect(exact.policy, params=params))  # so that there is something to reuse
    for start in (0, len(PROMPT) - 3):
        chunks = run(collect(exact.policy, params=replace(params, routed_from=start)))
        whole = [*PROMPT, *ids(chunks)]
        told = chunks[-1].routed_experts
        assert told.shape == (len(whole) - 1 - start, model.config.num_layers, model.config.num_experts_per_tok)
        assert chunks[-1].cached_tokens <= start and all(c.routed_experts is None for c in chunks[:-1])
        routing = routing_for(start, model)
        batch = Batch(torch.tensor(whole[:-1]), torch.tensor([0, len(whole) - 1], dtype=torch.int32), torch.zeros(1, dtype=torch.int32))
        with torch.no_grad(), noted(model, [(routing, 0, len(whole) - 1)]):
            model(batch)
        assert (told == routing.upto(len(whole) - 1)).all()


def test_paused_to_keep_it_freezes_and_goes_on_where_it_was(exact):
    async def work():
        whole = ids(await collect(exact.policy, params=replace(PARAMS, max_tokens=300, stop_ids=())))
        before = exact.engine.stats.decoded
        running = asyncio.create_task(collect(exact.policy, params=replace(PARAMS, max_tokens=300, stop_ids=())))
        await until(lambda: exact.engine.stats.decoded > before + 4)
        await exact.policy.pause("keep")
        frozen = exact.engine.stats.decoded
        waiting = asyncio.create_task(collect(exact.policy, params=replace(PARAMS, max_tokens=3)))
        await asyncio.sleep(0.1)
        assert exact.engine.stats.decoded == frozen < before + 299 and not running.done() and not waiting.done()
        await exact.policy.resume()
        return whole, ids(await running), ids(await waiting)

    whole, running, waiting = run(work())
    assert running == whole and waiting == whole[:3]


def test_paused_to_abort_it_ends_what_runs_and_refuses_what_comes(exact):
    async def work():
        before = exact.engine.stats.decoded
        running = asyncio.create_task(collect(exact.policy, params=replace(PARAMS, max_tokens=1500, stop_ids=())))
        await until(lambda: exact.engine.stats.decoded > before + 4)
        await exact.policy.pause("abort")
        chunks = await running
        try:
            with pytest.raises(PolicyError) as e:
                await collect(exact.policy)
        finally:
            await exact.policy.resume()
        return chunks, e.value.status, await collect(exact.policy)

    chunks, status, after = run(work())
    assert chunks[-1].finish_reason == "abort" and status == 503 and after[-1].finish_reason


def test_cut_offs_penalties_and_constraints_mean_the_same_through_the_wire(world):
    """Every knob of the waist, and what is told about the draw: bent log-probabilities, kept sets, candidates."""
    params = replace(PARAMS, max_tokens=20, top_p=0.8, top_k=40, min_p=0.01, temperature=0.7, presence_penalty=0.5,
                     frequency_penalty=0.3, repetition_penalty=1.2, logit_bias=((65, 2.0), (66, -3.0)), top_logprobs=3)  # fmt: skip
    constrained = replace(PARAMS, max_tokens=40, constraint=Constraint("regex", "[a-f]{5,9}"), stop=("ff",))
    for p in (params, constrained):
        a, b = (run(collect(world[name].policy, params=p)) for name in ("engine", "token ids"))
        assert ids(a) == ids(b)
        for field in ("logprobs", "sampled_logprobs"):
            assert [x for c in a for x in getattr(c, field)] == [x for c in b for x in getattr(c, field)], field
        flat = [[x for c in side for x in c.top_logprobs] for side in (a, b)]
        assert [[i for i, _ in top] for top in flat[0]] == [[i for i, _ in top] for top in flat[1]]
        kept = [[None if k is None else kept_ids(k).tolist() for c in side for k in c.kept] for side in (a, b)]
        assert kept[0] == kept[1] and any(kept[0])
        assert (a[-1].finish_reason, a[-1].stop) == (b[-1].finish_reason, b[-1].stop)
