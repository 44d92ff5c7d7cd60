"""What a task is, and how a family makes, solves and judges one.

A family is a generator of tasks plus a solver written as a Python generator: it yields tool calls, receives their
results, and returns the answer. The same solver makes demonstrations and fixes the expected answer, by really running
the tools.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Generator
from dataclasses import dataclass
from random import Random
from typing import Any

from tidelock.tokens.message import Message, ToolCall, ToolSpec
from tidelock.tokens.template import canonical

from .toolset import TOOLSET

SYSTEM = "You are Tide, an agent. Use tools."

Call = tuple[str, dict[str, Any]]
Solver = Generator[Call, str, str]


@dataclass(frozen=True)
class Task:
    """One problem. The agent sees `prompt` and `tools`, its tools see `world`; nobody but the verifier sees the rest."""

    id: str
    family: str
    prompt: str
    tools: tuple[ToolSpec, ...]
    world: dict[str, Any]
    answer: str
    final_world: dict[str, Any]
    steps: tuple[str, ...] = ()  # how a patient user would ask for it piece by piece; {} is the answer before

    def system(self) -> Message:
        return Message("system", SYSTEM, tools=self.tools)


@dataclass(frozen=True)
class Draft:
    """What a family draws: the words, the tools on offer, the world, and how to solve it."""

    prompt: str
    tools: tuple[ToolSpec, ...]
    world: dict[str, Any]
    solve: Callable[[], Solver]
    steps: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """`kind` is "base" (trained before the first serving) or "new" (demand nobody trained for)."""

    name: str
    kind: str
    draw: Callable[[Random], Draft]

    def verify(self, task: Task, answer: str, final_world: dict[str, Any]) -> bool:
        """The bare answer is right and the world is as it should be: what was to change changed, nothing else did."""
        return answer.strip() == task.answer and final_world == task.final_world


@dataclass(frozen=True)
class Demo:
    """A solved task as a conversation; `trained[i]` says whether message i should be imitated."""

    task: Task
    messages: list[Message]
    trained: list[bool]


def demonstrate(family: Family, rng: Random) -> Demo:
    """Draw a task and solve it with the real tools."""
    draft = family.draw(rng)
    world = copy.deepcopy(draft.world)
    messages = [Message("system", SYSTEM, tools=draft.tools), Message("user", draft.prompt)]
    solver, result = draft.solve(), None
    while True:
        try:
            name, arguments = solver.send(result)
        except StopIteration as end:
            answer = end.value
            break
        result = TOOLSET.call(world, name, arguments)
        messages.append(Message("assistant", tool_calls=(ToolCall("", name, arguments),)))
        messages.append(Message("tool", result, name=name))
    messages.append(Message("assistant", answer))
    digest = hashlib.blake2b(f"{draft.prompt}\0{draft.world}".encode(), digest_size=8).hexdigest()
    task = Task(f"{family.name}/{digest}", family.name, draft.prompt, draft.tools, draft.world, answer, world, draft.steps)
    return Demo(task, canonical(messages), [m.role == "assistant" for m in messages])
