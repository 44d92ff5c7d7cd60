"""The events of a streamed response, numbered and in order: each item is added, filled, done; then the whole is done.

The same writer also makes the items of an answer that is not streamed, so the two cannot differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

from tidelock.service import wire
from tidelock.service.answer import Ended, Event, Piece, Token
from tidelock.service.surfaces import custom_tools
from tidelock.service.surfaces.chat import logprobs
from tidelock.service.surfaces.responses_items import sealed


class Writer:
    """`say` what happens, then `finish`. `items` are the output items so far, complete once the answer has ended."""

    def __init__(
        self, unique: str, response: dict[str, Any], queued: dict[str, Any] | None = None, custom: frozenset[str] = frozenset(),
        seal: bool = False,
    ) -> None:  # fmt: skip
        """`queued`: the response as it is told first, where it is told that it waits. `custom`: the tools that are called with
        text. `seal`: thoughts also as `encrypted_content`."""
        self.number = 0  # of the next event
        self._queued = queued
        self.items: list[dict[str, Any]] = []
        self._unique, self._response, self._custom, self._seal = unique, response, custom, seal
        self._kind: str | None = None  # "reasoning" | "content" | "call" | "custom": the open item
        self._text: list[str] = []
        self._tokens: list[Token] = []

    def copy(self) -> Writer:
        twin = copy(self)
        twin.items, twin._text, twin._tokens = list(self.items), list(self._text), list(self._tokens)
        return twin

    def say(self, events: Sequence[Event]) -> bytes:
        out = b"" if self.number else self.begin()
        for event in events:
            if isinstance(event, Piece):
                out += self._piece(event)
            elif isinstance(event, Ended):
                out += self.close("incomplete" if event.finish_reason == "length" else "completed")
        return out

    def finish(self, response: dict[str, Any], kind: str | None = None) -> bytes:
        out = b"" if self.number else self.begin()
        return out + self._event(kind or f"response.{response['status']}", response=response)

    def begin(self) -> bytes:
        created = self._event("response.created", response=self._queued or self._response)
        if self._queued:
            created += self._event("response.queued", response=self._queued)
        return created + self._event("response.in_progress", response=self._response)

    def _event(self, kind: str, **fields: Any) -> bytes:
        self.number += 1
        return wire.named_event({"type": kind, "sequence_number": self.number - 1, **fields})

    def _piece(self, piece: Piece) -> bytes:
        out = b""
        if piece.kind == "call":
            return self._open("custom" if piece.text in self._custom else "call", piece)
        if piece.kind != "arguments" and self._kind != piece.kind:
            out = self._open(piece.kind, piece)
        self._text.append(piece.text)
        self._tokens += piece.tokens
        where = self._where()
        if piece.kind == "reasoning":
            return out + self._event(
                "response.reasoning_summary_text.delta", **where, summary_index=0, delta=piece.text
            )
        if piece.kind == "content":
            shown = logprobs(piece.tokens)["content"]
            return out + self._event(
                "response.output_text.delta", **where, content_index=0, delta=piece.text, logprobs=shown
            )
        if self._kind == "custom":
            return out  # its text is read out of the JSON when that is whole
        return out + self._event("response.function_call_arguments.delta", **where, delta=piece.text)

    def _where(self) -> dict[str, Any]:
        return {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}

    def _open(self, kind: str, piece: Piece) -> bytes:
        out = self.close("completed")
        n = len(self.items)
        if kind == "reasoning":
            item: dict[str, Any] = {"type": "reasoning", "id": f"rs_{self._unique}_{n}", "summary": []}
        elif kind == "content":
            item = {"type": "message", "id": f"msg_{self._unique}_{n}", "status": "in_progress", "role": "assistant"}
            item["content"] = []
        elif kind == "custom":
            item = {
                "type": "custom_tool_call", "id": f"ctc_{self._unique}_{n}", "status": "in_progress", "call_id": piece.id,
                "name": piece.text, "input": "",
            }  # fmt: skip
        else:
            item = {
                "type": "function_call", "id": f"fc_{self._unique}_{n}", "status": "in_progress", "call_id": piece.id,
                "name": piece.text, "arguments": "",
            }  # fmt: skip
        self.items.append(item)
        self._kind, self._text, self._tokens = kind, [], []
        out += self._event("response.output_item.added", output_index=n, item=item)
        if kind == "reasoning":
            part = {"type": "summary_text", "text": ""}
            out += self._event("response.reasoning_summary_part.added", **self._where(), summary_index=0, part=part)
        elif kind == "content":
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            out += self._event("response.content_part.added", **self._where(), content_index=0, part=part)
        return out

    def close(self, status: str) -> bytes:
        """Ends the open item."""
        if self._kind is None:
            return b""
        kind, text, where = self._kind, "".join(self._text), self._where()
        self._kind = None
        item = dict(self.items[-1])
        if kind == "reasoning":
            part = {"type": "summary_text", "text": text}
            item["summary"] = [part]
            if self._seal:
                item["encrypted_content"] = sealed(text)
            out = self._event("response.reasoning_summary_text.done", **where, summary_index=0, text=text)
            out += self._event("response.reasoning_summary_part.done", **where, summary_index=0, part=part)
        elif kind == "content":
            shown = logprobs(self._tokens)["content"]
            part = {"type": "output_text", "text": text, "annotations": [], "logprobs": shown}
            item |= {"status": status, "content": [part]}
            out = self._event("response.output_text.done", **where, content_index=0, text=text, logprobs=shown)
            out += self._event("response.content_part.done", **where, content_index=0, part=part)
        elif kind == "custom":
            said = custom_tools.text_of(text)
            item |= {"status": status, "input": said}
            out = self._event("response.custom_tool_call_input.delta", **where, delta=said) if said else b""
            out += self._event("response.custom_tool_call_input.done", **where, input=said)
        else:
            item |= {"status": status, "arguments": text}
            out = self._event("response.function_call_arguments.done", **where, name=item["name"], arguments=text)
        self.items[-1] = item
        return out + self._event("response.output_item.done", output_index=len(self.items) - 1, item=item)
