"""What every chat template can do, and the parts they share: rendering one message after another, canonical call ids.

A template turns messages into ids and sampled ids back into a message. `extend` appends to existing ids and never
renders an earlier message again, which is how the ids a user saw stay the ids that are trained.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from .errors import UserError
from .message import Message, ToolCall, ToolSpec
from .tokenizer import BPETokenizer, ByteTokenizer


@dataclass(frozen=True)
class Delta:
    """A piece of a message while it is being sampled. The pieces of one call's `tool_arguments` join to a JSON object."""

    kind: str  # "reasoning" | "content" | "tool_name" | "tool_arguments"
    text: str
    call_index: int = 0


class StreamParser(Protocol):
    """Reads one sampled assistant turn: the ids after the generation prompt, in any chunking."""

    def feed(self, ids: Sequence[int]) -> list[Delta]: ...

    def finish(self) -> Message:
        """The message so far. Never raises; `verbatim` keeps the ids whenever its rendering would differ from them."""
        ...


class Template:
    """Base of the formats. `stop_ids` end an assistant turn and belong to it."""

    name: str
    version = 1
    prefix_stable: bool
    stop_ids: tuple[int, ...]

    def __init__(self, tokenizer: BPETokenizer | ByteTokenizer) -> None:
        self.tokenizer = tokenizer
        identity = f"{self.name}/{self.version}/{tokenizer.base}/{tokenizer.identity}"
        self.hash = hashlib.blake2b(identity.encode(), digest_size=8).hexdigest()

    def render(self, messages: Sequence[Message], generation_prompt: bool = False) -> list[int]:
        return self.extend([], [], messages, generation_prompt)

    def extend(
        self, ids: Sequence[int], messages: Sequence[Message], new: Sequence[Message], generation_prompt: bool = False
    ) -> list[int]:
        """`ids`, which stand for `messages`, followed by the rendering of `new`."""
        out, before = list(ids), list(messages)
        for message in new:
            if message.role == "assistant":
                out += self.generation_prompt()
                out += self.sampled(message) if message.verbatim is None else message.verbatim
            else:
                out += self._input(message, before)
            before.append(message)
        if generation_prompt:
            out += self.generation_prompt()
        return out

    def generation_prompt(self) -> list[int]:
        """What comes before the first sampled id of an assistant turn."""
        raise NotImplementedError

    def sampled(self, message: Message) -> list[int]:
        """The ids a model would sample to say this assistant message, from its text, stop id included."""
        raise NotImplementedError

    def parser(self, calls_before: int = 0) -> StreamParser:
        """`calls_before`: tool calls made earlier in the conversation, which number the ids of the new ones."""
        raise NotImplementedError

    def parse(self, ids: Sequence[int]) -> list[Message]:
        """The messages of a whole conversation: the inverse of `render`."""
        raise NotImplementedError

    def _input(self, message: Message, before: Sequence[Message]) -> list[int]:
        raise NotImplementedError

    def with_verbatim(self, message: Message, sampled: Sequence[int]) -> Message:
        """The message, carrying its ids when its text alone would not give them back."""
        return message if self.sampled(message) == list(sampled) else replace(message, verbatim=tuple(sampled))


def get_template(name: str, tokenizer: BPETokenizer | ByteTokenizer) -> Template:
    from .chatml import ChatML
    from .xtml import XTML

    formats = {t.name: t for t in (XTML, ChatML)}
    if name not in formats:
        raise UserError(f"unknown template {name!r}; choose one of {', '.join(sorted(formats))}")
    return formats[name](tokenizer)


def call_id(name: str, n: int) -> str:
    """`functions.{name}:{n}`, n counting every call of the conversation from 0 (K2 report, App. B)."""
    return f"functions.{name}:{n}"


def count_calls(messages: Sequence[Message]) -> int:
    return sum(len(m.tool_calls) for m in messages)


def call_position(message: Message, before: Sequence[Message]) -> int:
    """0-based position, within the assistant message it answers, of the call a tool message belongs to.

    By id where the id is known; otherwise results answer calls in order.
    """
    answered = 0
    for earlier in reversed(before):
        if earlier.role == "tool":
            answered += 1
        elif earlier.role == "assistant":
            ids = [c.id for c in earlier.tool_calls]
            return ids.index(message.tool_call_id) if message.tool_call_id in ids else answered
        else:
            break
    return answered


def canonical(messages: Sequence[Message]) -> list[Message]:
    """The same conversation with call ids derived from position, whatever ids a client used."""
    out: list[Message] = []
    n = 0
    for i, m in enumerate(messages):
        if m.role == "assistant":
            m = replace(m, tool_calls=tuple(replace(c, id=call_id(c.name, n + j)) for j, c in enumerate(m.tool_calls)))
            n += len(m.tool_calls)
        elif m.role == "tool":
            position = call_position(m, messages[:i])
            calls = next((e.tool_calls for e in reversed(out) if e.role == "assistant"), ())
            if position < len(calls):
                m = replace(m, tool_call_id=calls[position].id, name=calls[position].name)
            else:
                m = replace(m, tool_call_id=call_id(m.name or "unknown", position), name=m.name or "unknown")
        out.append(m)
    return out


def make_calls(raw: Sequence[tuple[str, dict]], calls_before: int) -> tuple[ToolCall, ...]:
    return tuple(ToolCall(call_id(name, calls_before + i), name, args) for i, (name, args) in enumerate(raw))


def tools_json(tools: Sequence[ToolSpec]) -> str:
    """The declaration as templates embed it: keys sorted, compact."""
    return json.dumps([t.openai() for t in tools], sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def tools_from_json(text: str) -> tuple[ToolSpec, ...]:
    functions = [entry["function"] for entry in json.loads(text)]
    return tuple(ToolSpec(f["name"], f["description"], f["parameters"]) for f in functions)
