"""Every family: the gold solution succeeds, doing nothing fails, seeds decide everything, splits never meet."""

import asyncio
import copy

import pytest

from tidelock.envs.registry import FAMILIES, SPLITS, demos, names_of, split_of, tasks
from tidelock.envs.toolset import TOOLSET, evaluate
from tidelock.sandbox import ToolFault, ToolHost
from tidelock.tokens.errors import UserError

each_family = pytest.mark.parametrize("name", list(FAMILIES))


def replay(demo):
    """Run the demonstrated calls again on the task's world; returns the final world."""
    world = copy.deepcopy(demo.task.world)
    for m in demo.messages:
        for call in m.tool_calls:
            TOOLSET.call(world, call.name, call.arguments)
    return world


@each_family
def test_gold_succeeds_and_nothing_else_does(name):
    stream, family = demos(name, "train", 0), FAMILIES[name]
    for _ in range(30):
        demo = next(stream)
        task, world = demo.task, replay(demo)
        assert family.verify(task, demo.messages[-1].content, world)
        assert not family.verify(task, "", copy.deepcopy(task.world))
        assert not family.verify(task, task.answer + "0", world)
        if world != task.world:
            assert not family.verify(task, task.answer, copy.deepcopy(task.world))


@each_family
def test_changing_what_was_not_asked_for_fails(name):
    demo = next(demos(name, "train", 1))
    world = replay(demo)
    world.setdefault("records", {})["Z999"] = 1
    assert not FAMILIES[name].verify(demo.task, demo.task.answer, world)


@each_family
def test_the_same_seed_draws_the_same_tasks(name):
    assert tasks(name, "traffic", 3, 20) == tasks(name, "traffic", 3, 20) != tasks(name, "traffic", 4, 20)


@each_family
def test_splits_do_not_share_a_prompt(name):
    drawn = {split: tasks(name, split, 0, 60) for split in SPLITS}
    assert all(split_of(t) == split for split, ts in drawn.items() for t in ts)
    prompts = [t.prompt for ts in drawn.values() for t in ts]
    assert len(prompts) == len(set(prompts)) == 60 * len(SPLITS)


@each_family
def test_there_are_enough_held_out_tasks(name):
    assert len(tasks(name, "heldout", 1, 200)) == 200


def test_new_demand_is_in_no_base_family():
    base = {tuple(c.name for m in demo.messages for c in m.tool_calls)
            for name in names_of("base") for demo, _ in zip(demos(name, "train", 0), range(200))}  # fmt: skip
    new = {tuple(c.name for m in demo.messages for c in m.tool_calls)
           for name in names_of("new") for demo, _ in zip(demos(name, "train", 0), range(50))}  # fmt: skip
    assert len(names_of("base")) >= 5 and len(names_of("new")) >= 2 and not base & new


@each_family
def test_steps_lead_where_the_request_does(name):
    """A user who asks piece by piece, and is answered rightly, gets the answer of the whole."""
    demo = next(demos(name, "train", 2))
    if not demo.task.steps:
        return
    answers = [m.content for m in demo.messages if m.role == "tool"]
    asked = [w.format(answers[i]) for i, w in enumerate(demo.task.steps)]
    assert len(asked) >= 2 and "{}" not in "".join(asked)


@pytest.mark.parametrize("expression", ["__import__('os')", "1/0", "9**9**9", "a", "", "(" * 300, "1 if 1 else 2"])
def test_the_calculator_evaluates_nothing_but_whole_number_arithmetic(expression):
    with pytest.raises(ToolFault):
        evaluate(expression)


def test_tools_behave_in_the_sandbox_as_outside():
    async def work():
        host = await ToolHost.start("tidelock.envs.toolset:TOOLSET")
        try:
            for name in FAMILIES:
                demo = next(demos(name, "train", 5))
                await host.open(name, demo.task.world)
                calls = [c for m in demo.messages for c in m.tool_calls]
                results = [m.content for m in demo.messages if m.role == "tool"]
                for call, result in zip(calls, results):
                    assert (await host.call(name, call.name, call.arguments)).content == result
                assert await host.close(name) == demo.task.final_world
        finally:
            await host.stop()

    asyncio.run(work())


def test_an_unknown_family_is_named_with_the_known_ones():
    with pytest.raises(UserError, match="hopz.*arithmetic"):
        tasks("hopz", "train", 0, 1)
