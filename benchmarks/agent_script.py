"""A mind for coding agents that needs no model: it reads the prompt it is given and does one small repair, step by step.

The repository holds `calc.py`, whose `add` subtracts, and `test_calc.py`, which notices. Whatever tools an agent
declares, the script looks the file at hand over, mends it, runs the test and reports what the test said; the words it
uses for paths, texts and commands are those of the tools' own schemas. Everything goes through the chat template: the
prompt is parsed from its ids, the answer is ids of a turn.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from tidelock.tokens.directives import is_of_one_request
from tidelock.tokens.message import Message, ToolCall, ToolSpec
from tidelock.tokens.policy import Chunk, PolicyError, SamplingParams
from tidelock.tokens.template import Template, declared_tools
from tidelock.tokens.turn import call_id

BROKEN, MENDED = "    return a - b\n", "    return a + b\n"
FILES = {
    "calc.py": f"def add(a, b):\n{BROKEN}",
    "test_calc.py": 'from calc import add\n\nassert add(2, 3) == 5, add(2, 3)\nprint("all tests passed")\n',
}
FIXED, BROKEN_STILL = "I mended calc.py: the test passes now.", "The test still fails."
SHELLS = ("exec_command", "shell_command", "shell", "bash", "Bash", "Shell", "run_shell_command")
READERS, EDITORS = ("Read", "read", "ReadFile", "read_file"), ("Edit", "edit", "StrReplaceFile")
PER_CHUNK, PAUSE_S = 16, 0.002
MOST_OPENED = 64  # ids of an empty thought, with room


def task(directory: Path) -> str:
    return f"The repository {directory} has a failing test, test_calc.py. Find the fault in calc.py, mend it and run the test."


def lay_out(directory: Path) -> None:
    directory.mkdir(parents=True)
    for name, text in FILES.items():
        (directory / name).write_text(text)


class AgentScript:
    """A `Policy` that answers a conversation with what `answer` makes of it, the repair unless told otherwise.
    `tools`: the names that were declared, for whoever wants to know."""

    exact = True

    def __init__(self, template: Template, answer: Callable[[Sequence[Message]], Message] | None = None) -> None:
        self._template, self._answer = template, answer or repair
        self.tools: set[str] = set()
        self._aborted: set[str] = set()

    async def generate(
        self, prompt_ids: Sequence[int], params: SamplingParams, request_id: str | None = None, said: Message | None = None
    ) -> AsyncIterator[Chunk]:
        """`said`: this and not what the conversation would be answered with."""
        parsed = await asyncio.to_thread(self._template.parse, prompt_ids)
        messages = [m for m in parsed if not is_of_one_request(m)]  # what it is told of its form, the decoder sees to
        if messages[-1].role == "assistant":  # the turn that is to be sampled, empty as yet
            messages.pop()
        self.tools |= {tool.name for tool in declared_tools(messages)}
        ids = self._rest(said or self._answer(messages), prompt_ids)[: params.max_tokens]
        for start in range(0, len(ids), PER_CHUNK):
            await asyncio.sleep(PAUSE_S)
            if request_id in self._aborted:
                yield Chunk((), (), 1, "abort")
                return
            part = tuple(ids[start : start + PER_CHUNK])
            last = start + PER_CHUNK >= len(ids)
            ended = ("stop" if ids[-1] in self._template.stop_ids else "length") if last else None
            yield Chunk(part, (-0.5,) * len(part), 1, ended)

    def _rest(self, message: Message, prompt_ids: Sequence[int]) -> Sequence[int]:
        """The ids to sample. Where the prompt ends in an empty thought, as it does for who wants none, they follow that."""
        unthought = self._template.sampled(replace(message, reasoning=""))
        for n in range(min(len(unthought), MOST_OPENED), 0, -1):
            if tuple(prompt_ids[-n:]) == tuple(unthought[:n]):
                return unthought[n:]
        return self._template.sampled(message)

    async def count(self, prompt_ids: Sequence[int]) -> int:
        return len(prompt_ids)

    async def abort(self, request_id: str) -> None:
        self._aborted.add(request_id)

    async def swap(self, checkpoint: str, version: int) -> None:
        raise PolicyError("a script has no weights")


def repair(messages: Sequence[Message]) -> Message:
    tools = {tool.name: tool for tool in declared_tools(messages)}
    said = "\n".join(m.content for m in messages if m.role == "user")
    places = re.findall(r"The repository (\S+) has a failing test", said)
    if not places or not any(name in tools for name in SHELLS):
        return Message("assistant", "Mending calc.py")  # a title, a summary: what agents ask on the side
    steps = _steps(tools, Path(places[-1]))
    done = sum(m.role == "tool" for m in messages)
    if done < len(steps):
        thought, name, arguments = steps[done]
        number = sum(len(m.tool_calls) for m in messages)
        return Message("assistant", "", thought, (ToolCall(call_id(name, number), name, arguments),))
    passed = "all tests passed" in next(m.content for m in reversed(messages) if m.role == "tool")
    return Message("assistant", FIXED if passed else BROKEN_STILL, "The test has run; I report what it said.")


def _steps(tools: dict[str, ToolSpec], place: Path) -> list[tuple[str, str, dict[str, Any]]]:
    """(thought, tool, arguments) of each call."""
    shell = next(name for name in SHELLS if name in tools)
    reader = next((name for name in READERS if name in tools), None)
    fitting = (name for name in EDITORS if name in tools and "old" in " ".join(tools[name].parameters["properties"]).lower())
    editor = next(fitting, None)
    target, test = place / "calc.py", f"cd {place} && python3 test_calc.py"
    look = "First I look at calc.py, since the test imports add from it and nothing else."
    mend = "add subtracts: the operator is the fault. I put a plus where the minus is, and leave the rest alone."
    check = "Now the test has to run, or I would only believe that it is mended."
    if reader and editor:
        words = {"old": BROKEN.rstrip("\n"), "new": MENDED.rstrip("\n"), "path": str(target)}
        return [
            (look, reader, _arguments(tools[reader], {"path": str(target)})),
            (mend, editor, _arguments(tools[editor], words)),
            (check, shell, _command(tools[shell], test)),
        ]
    mending = f"cd {place} && sed -i 's/a - b/a + b/' calc.py && cat calc.py"
    commands = ((look, f"cat {target}"), (mend, mending), (check, test))
    return [(thought, shell, _command(tools[shell], command)) for thought, command in commands]


def _arguments(tool: ToolSpec, words: dict[str, str]) -> dict[str, Any]:
    """Each word under the first property whose name has it in it: `old` is old_string, oldString, oldText."""
    properties = list(tool.parameters.get("properties", {}))
    return {next(p for p in properties if word in p.lower()): text for word, text in words.items()}


def _command(tool: ToolSpec, command: str) -> dict[str, Any]:
    properties = tool.parameters.get("properties", {})
    name = next(p for p in ("command", "cmd") if p in properties)
    arguments: dict[str, Any] = {name: ["bash", "-lc", command] if properties[name].get("type") == "array" else command}
    if "description" in tool.parameters.get("required", ()):
        arguments["description"] = "a step of the repair"
    return arguments
