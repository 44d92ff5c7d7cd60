"""The ids of an assistant turn of which only the text comes in, piece by piece: our rendering of what another said.

Each piece is encoded as it comes, so it can be handed on at once; where the pieces are cut is the other's affair, and the
ids need not be those that the whole text would get. What lies between thought, answer and end is the template's.
"""

from __future__ import annotations

from collections.abc import Sequence

from tidelock.tokens.message import Message, ToolCall
from tidelock.tokens.template import Template


class Form:
    """Where a template's turn has its thought and its content, found by rendering turns that have nothing else."""

    def __init__(self, template: Template) -> None:
        self.template = template
        self.empty = template.sampled(Message("assistant"))
        thought = template.sampled(Message("assistant", reasoning="x"))
        self.thinks = thought != self.empty
        content = _common(self.empty, template.sampled(Message("assistant", content="x")))
        self.at = {"start": 0, "reasoning": _common(self.empty, thought) if self.thinks else content, "content": content}


class Rendering:
    def __init__(self, form: Form, state: str = "start") -> None:
        """`state`: "start" | "reasoning" | "content", where the prompt leaves off."""
        self._form, self._state = form, state

    def say(self, kind: str, text: str) -> list[int]:
        """The ids that some more "reasoning" or "content" adds. Reasoning has no place once the content has begun, nor in
        a format without any: then it is left out, and there are none."""
        form = self._form
        if not text or (kind == "reasoning" and (self._state == "content" or not form.thinks)):
            return []
        ids = form.empty[form.at[self._state] : form.at[kind]]
        self._state = kind
        return [*ids, *form.template.tokenizer.encode(text)]

    def end(self, calls: Sequence[ToolCall] = ()) -> list[int]:
        """The rest of the turn: its calls, and what closes it."""
        whole = self._form.template.sampled(Message("assistant", tool_calls=tuple(calls)))
        return whole[self._form.at[self._state] :]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    return next((n for n, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
