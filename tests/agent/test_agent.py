"""The agent loop: ids only grow, results come in call order, every run ends for exactly one stated reason."""

import asyncio

import pytest

from tidelock.agent import Agent
from tidelock.agent.episode import STOP_REASONS
from tidelock.sandbox import ToolCrash, ToolResult
from tidelock.tokens.message import Message, ToolCall, ToolSpec
from tidelock.tokens.policy import Chunk, PolicyError, SamplingParams
from tidelock.tokens.template import get_template
from tidelock.tokens.tokenizer import ByteTokenizer

TEMPLATE = get_template("xtml", ByteTokenizer())
SYSTEM = Message("system", "s", tools=(ToolSpec("f", "", {"type": "object"}),))


class Scripted:
    """Says prepared turns through the real template: equipment, so that the loop's own behaviour shows."""

    exact = True

    def __init__(self, *turns, finish="stop"):
        self.turns, self.finish, self.prompts, self.seeds = list(turns), finish, [], []

    async def generate(self, prompt_ids, params, request_id=None):
        self.prompts.append(list(prompt_ids))
        self.seeds.append(params.seed)
        turn = self.turns.pop(0)
        if isinstance(turn, Exception):
            raise turn
        ids = turn if isinstance(turn, list) else TEMPLATE.sampled(turn)
        half = len(ids) // 2
        yield Chunk(tuple(ids[:half]), (-0.25,) * half, 3)
        yield Chunk(tuple(ids[half:]), (-0.5,) * (len(ids) - half), 4, self.finish)


def call(**arguments):
    return Message("assistant", tool_calls=(ToolCall("", "f", arguments),))


async def echo(name, arguments):
    return ToolResult(f"{name}:{arguments.get('x')}", True)


def episode(policy, call_tool=echo, **options):
    agent = Agent(policy, TEMPLATE, SamplingParams(max_tokens=500), **options)
    return asyncio.run(agent.run(SYSTEM, "do", call_tool, sandbox_level="landlock-7", seed=11))


def test_ids_only_ever_grow_and_everything_runs_parallel_to_them():
    policy = Scripted(call(x=1), call(x=2), Message("assistant", "done"))
    e = episode(policy)
    assert e.stop_reason == "answered" and e.answer == "done" and e.turns == 3 and e.tool_calls == 2
    for prompt in policy.prompts:
        assert e.ids[: len(prompt)] == prompt
    assert e.ids == TEMPLATE.render(e.messages)
    assert len(e.ids) == len(e.sampled) == len(e.logprobs) == len(e.versions)
    assert {v for v, s in zip(e.versions, e.sampled) if s} == {3, 4}
    assert all(lp == 0 and v == -1 for lp, v, s in zip(e.logprobs, e.versions, e.sampled) if not s)
    assert sum(e.sampled) == e.sampled_tokens


def test_parallel_calls_are_answered_in_call_order():
    both = Message("assistant", tool_calls=(ToolCall("", "f", {"x": 1}), ToolCall("", "f", {"x": 2})))
    e = episode(Scripted(both, Message("assistant", "ok")))
    assert [m.content for m in e.messages if m.role == "tool"] == ["f:1", "f:2"]
    assert [m.tool_call_id for m in e.messages if m.role == "tool"] == ["functions.f:0", "functions.f:1"]


def test_a_tools_error_is_told_to_the_model():
    async def fault(name, arguments):
        return ToolResult("error: no", False)

    e = episode(Scripted(call(), Message("assistant", "I see")), fault)
    assert e.messages[-2].content == "error: no" and e.stop_reason == "answered"


async def crash(name, arguments):
    raise ToolCrash("the worker died")


@pytest.mark.parametrize("policy,tool,options,reason", [
    (Scripted(PolicyError("down")), echo, {}, "policy_error"),
    (Scripted(Message("assistant", "x"), finish="abort"), echo, {}, "aborted"),
    (Scripted(Message("assistant", "x"), finish="length"), echo, {}, "length"),
    (Scripted(call()), crash, {}, "tool_crash"),
    (Scripted(Message("assistant", "x")), echo, {}, "answered"),
    (Scripted(call(), call()), echo, {"max_turns": 2}, "max_turns"),
])  # fmt: skip
def test_every_ending_has_its_reason(policy, tool, options, reason):
    assert episode(policy, tool, **options).stop_reason == reason and reason in STOP_REASONS


def test_garbled_turns_keep_their_ids():
    garbled = [5, TEMPLATE.SEP, TEMPLATE.OPEN, 7, TEMPLATE.END]
    e = episode(Scripted(garbled))
    assert e.messages[-1].verbatim == tuple(garbled) and e.ids == TEMPLATE.render(e.messages)


def test_turns_draw_from_seeds_of_their_own_that_come_back():
    turns = lambda: Scripted(call(), call(), Message("assistant", "x"))  # noqa: E731
    a, b = turns(), turns()
    episode(a), episode(b)
    assert a.seeds == b.seeds and len(set(a.seeds)) == 3
