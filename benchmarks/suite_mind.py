"""A mind for other people's test suites that needs no trained model: it does what a suite's prompt plainly asks for.

Suites do not only send requests that must be refused; they ask for a call of a tool, for JSON, for a number said some
turns ago, and look at how the server brings it over. This mind reads the prompt it is given (parsed from its ids, as
`agent_script` does) and answers by a few rules. What an answer is held to comes from the real engine with random
weights, so that a forced call and a strict format are the decoder's doing, unless the words of the question say which
tool to call, and with what: there the script does as it is told, if the grammar takes it, for a suite that looks at the
arguments.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

import numpy as np
from msgspec.structs import replace

from benchmarks.agent_script import AgentScript
from benchmarks.forced_calls import bias
from tidelock.engine import Engine
from tidelock.engine.grammar import Grammars
from tidelock.tokens import jsontext
from tidelock.tokens.directives import is_of_one_request
from tidelock.tokens.message import Message, ToolCall, ToolSpec
from tidelock.tokens.policy import Chunk, SamplingParams
from tidelock.tokens.template import Template, declared_tools
from tidelock.tokens.turn import call_id

REMEMBERED = 64  # prompts
HELD_TOKENS = 3000  # an answer under a grammar ends long before
THOUGHT = "I read on. "
EFFORT = re.compile(r"`thinking_effort=(\w+)`")
WORDS = re.compile(r"[A-Za-z]+")
KEYS = re.compile(r"\bkeys? (?:named |called )?['\"`]\w+['\"`]|['\"`]\w+['\"`] keys?\b")
QUOTED = re.compile(r"['\"`](\w+)['\"`]")
UNWANTED = re.compile(r"不应使用|不要使用|(?:do not|don't|without) (?:use|using|call|calling)", re.IGNORECASE)
WANTED = re.compile(r"使用工具|\btools?\b", re.IGNORECASE)
PARALLEL = re.compile(r"\bparallel\b", re.IGNORECASE)  # what is quoted is then asked for in a call each
RECITAL, VERSE = re.compile(r"\brecite\b", re.IGNORECASE), "Arma virumque cano, Troiae qui primus ab oris.\n"
COMMON = {"get", "set", "the", "of", "a", "an", "for", "to", "is", "in", "and", "current", "this", "what", "use", "with"}
LONG = 400  # letters; an instruction this long tells how arguments are to look and not what they are: the decoder's business
DEPTH = 6  # of a schema that holds its like


class SuiteMind(AgentScript):
    """A `Policy`. `engine`: real, of the same template; it answers whatever the script has no answer for.

    It tells how much of a prompt it had before, as a cache would, though there is none for a script to have.
    """

    def __init__(self, template: Template, engine: Engine) -> None:
        super().__init__(template, answer)
        self._engine = engine
        self._grammars = Grammars(template.tokenizer, template.tokenizer.vocab_size)
        self._bias = tuple((int(token), value) for token, value in bias(template.tokenizer).items())
        self._seen: deque[np.ndarray] = deque(maxlen=REMEMBERED)

    async def generate(
        self, prompt_ids: Sequence[int], params: SamplingParams, request_id: str | None = None
    ) -> AsyncIterator[Chunk]:
        cached = self._before(prompt_ids)
        said = None if params.constraint is None else await self._told(prompt_ids, params)
        if params.constraint is None or said is not None:
            source = super().generate(prompt_ids, params, request_id, said)
        else:
            biases, most = (*self._bias, *params.logit_bias), min(params.max_tokens, HELD_TOKENS)
            source = self._engine.generate(prompt_ids, replace(params, logit_bias=biases, max_tokens=most), request_id)
        async with aclosing(source) as chunks:
            async for chunk in chunks:
                yield replace(chunk, cached_tokens=cached) if chunk.finish_reason else chunk

    async def _told(self, prompt_ids: Sequence[int], params: SamplingParams) -> Message | None:
        """The answer, if the words say what it is and the grammar lets it be said."""
        messages = [m for m in self._template.parse(prompt_ids) if not is_of_one_request(m)]
        if messages[-1].role == "assistant":  # the turn that is to be sampled, empty as yet
            messages.pop()
        asked = _asked(messages)
        if len(asked) > LONG or not (KEYS.search(asked) or _fitting(messages, wanted=None)):
            return None
        said = answer(messages)
        for message in (said, replace(said, reasoning="")):
            if await self._allowed(message, params):
                return message
        return None

    async def _allowed(self, message: Message, params: SamplingParams) -> bool:
        matcher = await self._grammars.matcher(params.constraint)
        for token in self._template.sampled(message):
            if not matcher.allowed(self._template.stop_ids)[token]:
                return False
            matcher.take(token)
        return True

    def _before(self, prompt_ids: Sequence[int]) -> int:
        """How many of the first ids were the first of an earlier prompt too; of the last one none are counted."""
        ids, longest = np.asarray(prompt_ids), 0
        for old in self._seen:
            n = min(len(old), len(ids) - 1)
            differing = np.flatnonzero(old[:n] != ids[:n])
            longest = max(longest, int(differing[0]) if len(differing) else n)
        self._seen.append(ids)
        return longest

    async def abort(self, request_id: str) -> None:
        await super().abort(request_id)
        await self._engine.abort(request_id)


def answer(messages: Sequence[Message]) -> Message:
    asked = _asked(messages)
    efforts = [EFFORT.search(m.content) for m in messages if m.role == "system" and m.name == "thinking-effort"]
    effort = efforts[-1].group(1) if efforts and efforts[-1] else "unknown"
    thought = THOUGHT * {"low": 1, "medium": 2, "high": 4, "max": 8}.get(effort, 2)
    if "thinking_effort" in asked:
        return Message("assistant", effort, thought)
    if messages[-1].role == "tool":
        last = max(n for n, message in enumerate(messages) if message.role != "tool")
        return Message("assistant", "The tool says: " + " / ".join(m.content for m in messages[last + 1 :]), thought)
    if RECITAL.search(asked):
        return Message("assistant", VERSE * 60, thought)
    tool = _fitting(messages)
    if tool is not None:
        number = sum(len(m.tool_calls) for m in messages)
        things = [f"'{word}'" for word in QUOTED.findall(asked)] if PARALLEL.search(asked) else [asked]
        calls = [ToolCall(call_id(tool.name, number + n), tool.name, _filled(tool, thing)) for n, thing in enumerate(things)]
        return Message("assistant", "", thought, tuple(calls))
    if KEYS.search(asked):
        return Message("assistant", jsontext.dump(dict.fromkeys(QUOTED.findall(asked), _name(asked))), thought)
    said = [m.content for m in messages if m.role == "user"]
    return Message("assistant", "You said: " + " / ".join(text[-400:] for text in said[-6:]), thought)


def _asked(messages: Sequence[Message]) -> str:
    return next((m.content for m in reversed(messages) if m.role == "user"), "")


def _fitting(messages: Sequence[Message], wanted: re.Pattern[str] | None = WANTED) -> ToolSpec | None:
    """The tool that the last question is about, if it is about one; the first, if it only asks (`wanted`) for a tool."""
    tools, asked = declared_tools(messages), _asked(messages)
    if not tools or UNWANTED.search(asked):
        return None
    words = {word.lower() for word in WORDS.findall(asked)}
    texts = [f"{tool.name} {tool.description}".replace("_", " ").lower() for tool in tools]
    scores = [len((set(WORDS.findall(text)) - COMMON) & words) for text in texts]
    if max(scores):
        return tools[scores.index(max(scores))]
    return tools[0] if wanted and wanted.search(asked) else None


def _filled(tool: ToolSpec, asked: str) -> dict[str, Any]:
    root = tool.parameters
    value = _value(root, root, asked, 0)
    return value if isinstance(value, dict) else {}


def _value(schema: Any, root: dict[str, Any], asked: str, depth: int) -> Any:
    """Something that `schema` allows, taken from the question where it can be."""
    if not isinstance(schema, dict) or depth > DEPTH:
        return None
    if "$ref" in schema:
        place: Any = root
        for part in schema["$ref"].lstrip("#/").split("/"):
            place = place[part] if part else place
        return _value(place, root, asked, depth + 1)
    if "enum" in schema:
        return next((e for e in schema["enum"] if str(e) in asked), schema["enum"][0])
    if "anyOf" in schema:
        return _value(schema["anyOf"][0], root, asked, depth + 1)
    kind = schema.get("type", "object" if "properties" in schema else "string")
    kind = kind[0] if isinstance(kind, list) else kind
    if kind == "object":
        wanted = schema.get("required", ()) or list(schema.get("properties", {}))
        return {name: _value(schema.get("properties", {}).get(name, {}), root, asked, depth + 1) for name in wanted}
    if kind == "array":
        return [_value(schema.get("items", {}), root, asked, depth + 1)] * max(1, schema.get("minItems", 1))
    if kind in ("integer", "number"):
        number = re.search(r"-?\d+(?:\.\d+)?", asked)
        return (int if kind == "integer" else float)(float(number.group())) if number else schema.get("minimum", 1)
    return {"boolean": True, "null": None}.get(kind, _name(asked)) if kind != "string" else _name(asked)


def _name(asked: str) -> str:
    """What stands in quotes, else the last proper name, else the last word."""
    quoted = re.search(r"(?<!\w)'([^']+)'(?!\w)", asked)
    names = re.findall(r"(?<!^)(?<![.?!] )\b[A-Z][a-z]+(?: [A-Z][a-z]+)*(?:, [A-Z][a-z]+)?", asked)
    found = [quoted.group(1)] if quoted else names or WORDS.findall(asked)
    return found[-1] if found else "this"
