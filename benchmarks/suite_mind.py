"""A mind for other people's test suites that needs no trained model: it does what a suite's prompt plainly asks for.

Suites do not only send requests that must be refused; they ask for a call of a tool, for JSON, for a number said some
turns ago, and look at how the server brings it over. This mind reads the prompt it is given (parsed from its ids, as
`agent_script` does) and answers by a few rules. Whatever an answer is held to by a grammar comes from the real engine
with random weights, so a forced call or a strict format is the decoder's doing and not the script's.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from benchmarks.agent_script import AgentScript
from benchmarks.forced_calls import bias
from tidelock.engine import Engine
from tidelock.tokens.message import Message, ToolCall, ToolSpec
from tidelock.tokens.policy import Chunk, SamplingParams
from tidelock.tokens.template import Template, declared_tools
from tidelock.tokens.turn import call_id

HELD_TOKENS = 3000  # an answer under a grammar ends long before
THOUGHT = "I read on. "
EFFORT = re.compile(r"`thinking_effort=(\w+)`")
WORDS = re.compile(r"[A-Za-z]+")
KEY = re.compile(r"key (?:named |called )?['\"`](\w+)['\"`]")
UNWANTED = re.compile(r"不应使用|不要使用|(?:do not|don't|without) (?:use|using|call|calling)", re.IGNORECASE)
WANTED = re.compile(r"使用工具|\btools?\b", re.IGNORECASE)
COMMON = {"get", "set", "the", "of", "a", "an", "for", "to", "is", "in", "and", "current", "this", "what", "use", "with"}
DEPTH = 6  # of a schema that holds its like


class SuiteMind(AgentScript):
    """A `Policy`. `engine`: real, of the same template; it answers whatever is constrained."""

    def __init__(self, template: Template, engine: Engine) -> None:
        super().__init__(template, answer)
        self._engine = engine
        self._bias = tuple((int(token), value) for token, value in bias(template.tokenizer).items())

    async def generate(
        self, prompt_ids: Sequence[int], params: SamplingParams, request_id: str | None = None
    ) -> AsyncIterator[Chunk]:
        source = super().generate(prompt_ids, params, request_id)
        if params.constraint is not None and not self._plain(prompt_ids):
            held = replace(params, logit_bias=(*self._bias, *params.logit_bias), max_tokens=min(params.max_tokens, HELD_TOKENS))
            source = self._engine.generate(prompt_ids, held, request_id)
        async with aclosing(source) as chunks:
            async for chunk in chunks:
                yield chunk

    def _plain(self, prompt_ids: Sequence[int]) -> bool:
        """Whether the words, and not only the grammar, say what to answer: which key, which of several tools."""
        messages = [m for m in self._template.parse(prompt_ids) if m.role != "assistant" or m.content]
        return bool(KEY.search(_asked(messages))) or len(declared_tools(messages)) > 1 and _fitting(messages) is not None

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
        return Message("assistant", f"The tool says: {messages[-1].content}", thought)
    tool = _fitting(messages)
    if tool is not None:
        number = sum(len(m.tool_calls) for m in messages)
        return Message("assistant", "", thought, (ToolCall(call_id(tool.name, number), tool.name, _filled(tool, asked)),))
    if key := KEY.search(asked):
        return Message("assistant", json.dumps({key.group(1): _name(asked)}), thought)
    said = [m.content for m in messages if m.role == "user"]
    return Message("assistant", "You said: " + " / ".join(text[-400:] for text in said[-6:]), thought)


def _asked(messages: Sequence[Message]) -> str:
    return next((m.content for m in reversed(messages) if m.role == "user"), "")


def _fitting(messages: Sequence[Message]) -> ToolSpec | None:
    """The tool that the last question is about, if it is about one."""
    tools, asked = declared_tools(messages), _asked(messages)
    if not tools or UNWANTED.search(asked):
        return None
    words = {word.lower() for word in WORDS.findall(asked)}
    scores = [len((set(WORDS.findall(f"{t.name} {t.description}".replace("_", " ").lower())) - COMMON) & words) for t in tools]
    if max(scores):
        return tools[scores.index(max(scores))]
    return tools[0] if WANTED.search(asked) else None


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
    """The last proper name of the question, or its last word."""
    names = re.findall(r"(?<!^)(?<![.?!] )\b[A-Z][a-z]+(?: [A-Z][a-z]+)*(?:, [A-Z][a-z]+)?", asked)
    return names[-1] if names else next(reversed(WORDS.findall(asked)), "this")
