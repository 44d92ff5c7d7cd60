"""The machine that reads one sampled assistant turn, whatever its format.

A format brings a table (states x terminals -> state) and the nesting of its states; the machine holds the text, closes
what a transition leaves and opens what it enters. It looks at one id at a time, so how the ids are cut into chunks
cannot matter, and anything the table does not know is skipped: the message then keeps its ids verbatim.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from .message import Message, ToolCall

if TYPE_CHECKING:
    from .template import Template


class Delta(Struct, frozen=True, gc=False):
    """A piece of a message while it is being sampled.

    The pieces of one kind join to what the finished message says; those of one call's `tool_arguments` join to its
    arguments as JSON, once the call is closed (a repeated key counts as JSON readers count it: the last one holds).
    """

    kind: str  # "reasoning" | "content" | "tool_name" | "tool_arguments"
    text: str
    call_index: int = 0


def call_id(name: str, n: int) -> str:
    """`functions.{name}:{n}`, n counting every call of the conversation from 0 (K2 report, App. B)."""
    return f"functions.{name}:{n}"


def make_calls(raw: Sequence[tuple[str, dict[str, Any]]], calls_before: int) -> tuple[ToolCall, ...]:
    return tuple(ToolCall(call_id(name, calls_before + i), name, args) for i, (name, args) in enumerate(raw))


_Utf8 = codecs.getincrementaldecoder("utf-8")
Table = Mapping[str, Mapping[Hashable, str]]


class TurnParser:
    """`feed` the ids after the generation prompt, in any chunks, then `finish`.

    nesting: for each state, the elements that are open in it, outermost first. sinks: where text goes in a state:
    "reasoning", "content" or "value" (a call's name or argument being collected); nowhere in any other state. entering,
    leaving: the methods to call when an element opens or ends, by name: bound ones would tie every parser into a cycle.
    """

    nesting: Mapping[str, tuple[str, ...]]
    sinks: Mapping[str, str]
    entering: Mapping[str, str] = {}
    leaving: Mapping[str, str] = {}

    def __init__(self, template: Template, table: Table, start: str, calls_before: int) -> None:
        self.template, self.table, self.state, self.calls_before = template, table, start, calls_before
        self.ids: list[int] = []
        self.reasoning_ids = 0  # how many of them lie in the reasoning, its opening marker included
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self._text: dict[str, list[str]] = {"reasoning": [], "content": [], "value": []}
        self._streams_value = False  # text of a value goes out while it arrives, as the inside of a JSON string
        self._deltas: list[Delta] = []
        self._heard: bytes | None = None  # what the last id added to the content
        # Holds back the bytes of an unfinished character.
        self._utf8 = _Utf8("replace")

    def feed(self, ids: Sequence[int], stop: str | None = None) -> list[Delta]:
        """`stop`: the stop string in which these ids end; the content is cut before it, the ids stay what they are."""
        self.ids += ids
        at, base = 0, self.template.tokenizer.base
        while at < len(ids):
            end = at
            if self._in_text():
                while end < len(ids) and ids[end] < base:
                    end += 1
            if end > at:
                self._hear(ids[at:end])
            else:
                end += 1
                self._read(ids[at])
            if self.sinks.get(self.state) == "reasoning":
                self.reasoning_ids += end - at
            at = end
        if stop is not None:
            self._cut(stop)
        deltas, self._deltas = self._deltas, []
        return deltas

    def content_bytes(self, token: int) -> bytes | None:
        """Feed one id; the bytes it adds to the content, None when it adds to anything else (reasoning, a call, markup)."""
        self._heard = None
        self.feed((token,))
        return self._heard

    def _cut(self, stop: str) -> None:
        """Whoever streams holds back what may become a stop, so the cut lies within the deltas not yet handed out."""
        content = "".join(self._text["content"])
        at = content.rfind(stop)
        if at < 0:
            return
        self._text["content"] = [content[:at]]
        surplus = len(content) - at
        for i in range(len(self._deltas) - 1, -1, -1):
            delta = self._deltas[i]
            if delta.kind == "content":
                cut = min(surplus, len(delta.text))
                self._deltas[i] = Delta("content", delta.text[: len(delta.text) - cut])
                surplus -= cut
        self._deltas = [d for d in self._deltas if d.text or d.kind != "content"]

    def finish(self) -> Message:
        """The message so far; what was still open is closed, the bytes of half a character are left out.

        Never raises. `verbatim` keeps the ids whenever rendering the message would give others. After it, `feed(())`
        gives the deltas of that closing, which end the arguments of a cut call.
        """
        self._utf8.reset()
        self._move("end")
        calls = make_calls(self.calls, self.calls_before)
        message = Message("assistant", "".join(self._text["content"]), "".join(self._text["reasoning"]), calls)
        return self.template.with_verbatim(message, self.ids)

    def _read(self, token: int) -> None:
        """One id: a terminal for `_on`, text for `_hear`, or part of something longer."""
        raise NotImplementedError

    def _in_text(self) -> bool:
        """Whether ids that are not special are text now, so that a run of them can be heard at once."""
        return True

    def _on(self, terminal: Hashable, closing: bool = False) -> None:
        target = self.table[self.state].get(terminal)
        if target is not None:
            self._move(target, closing)

    def _move(self, target: str, closing: bool = False) -> None:
        """Closing something ends in a state that was open all along; opening something enters its state anew."""
        self._say(self._utf8.decode(b"", final=True))
        kept = self.nesting[target] if closing else self.nesting[target][:-1]
        for element in reversed(self.nesting[self.state]):
            if element in kept:
                break
            if name := self.leaving.get(element):
                getattr(self, name)()
        self.state = target
        if not closing and (name := self.entering.get(target)):
            getattr(self, name)()

    def _hear(self, tokens: Sequence[int]) -> None:
        heard = self.template.tokenizer.decode_bytes(tokens)
        if self.sinks.get(self.state) == "content":
            self._heard = heard
        self._say(self._utf8.decode(heard))

    def _say(self, text: str) -> None:
        sink = self.sinks.get(self.state)
        if not text or sink is None:
            return
        self._text[sink].append(text)
        if sink != "value":
            self._deltas.append(Delta(sink, text))
        elif self._streams_value:
            self._on_call("tool_arguments", json.dumps(text, ensure_ascii=False)[1:-1])

    def _on_call(self, kind: str, text: str) -> None:
        self._deltas.append(Delta(kind, text, len(self.calls) - 1))

    def _take_value(self) -> str:
        text = "".join(self._text["value"])
        self._text["value"].clear()
        return text
