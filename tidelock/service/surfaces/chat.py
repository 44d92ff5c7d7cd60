"""Chat Completions, in Kimi's dialect: `reasoning_content` beside `content`, tools in system messages, `partial`,
and usage in all the places its clients read it. What a request may say is in `chat_request`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import msgspec
from starlette.requests import Request

from tidelock.service import wire
from tidelock.service.answer import Bill, Ended, Event, Piece, Token, Usage
from tidelock.service.errors import ApiError
from tidelock.service.http import is_lenient
from tidelock.service.keys import Key
from tidelock.service.run import Turn
from tidelock.service.state import ServiceState
from tidelock.service.surfaces.chat_request import ChatRequest, read
from tidelock.tokens.message import Message

_decoder = msgspec.json.Decoder(ChatRequest)


def usage(used: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": used.prompt_tokens,
        "completion_tokens": used.completion_tokens,
        "total_tokens": used.prompt_tokens + used.completion_tokens,
        "cached_tokens": used.cached_tokens,
        "prompt_tokens_details": {"cached_tokens": used.cached_tokens, "cache_write_tokens": 0, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": used.reasoning_tokens, "audio_tokens": 0,
            "accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0,
        },
        "cost_nano_usd": used.nano_usd,
    }  # fmt: skip


def logprobs(tokens: Sequence[Token]) -> dict[str, Any]:
    def entry(data: bytes, logprob: float) -> dict[str, Any]:
        return {"token": data.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(data)}

    return {
        "content": [{**entry(t.data, t.logprob), "top_logprobs": [entry(*top) for top in t.top]} for t in tokens],
        "refusal": None,
    }


def answer(message: Message) -> dict[str, Any]:
    """An assistant message as the client sees it."""
    out: dict[str, Any] = {
        "role": "assistant", "content": message.content or (None if message.tool_calls else ""), "refusal": None,
        "annotations": [],
    }  # fmt: skip
    if message.reasoning:
        out["reasoning_content"] = message.reasoning
    if message.tool_calls:
        out["tool_calls"] = [
            {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": wire.to_json(c.arguments)}}
            for c in message.tool_calls
        ]
    return out


def _runs(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Neighbours that belong together: of one kind, and of a tool call its name and arguments."""
    runs: list[list[Piece]] = []
    for piece in pieces:
        last = runs[-1][-1] if runs else None
        same = last is not None and piece.call == last.call
        if same and (piece.kind == last.kind != "call" or (last.kind, piece.kind) == ("call", "arguments")):
            runs[-1].append(piece)
        else:
            runs.append([piece])
    return runs


class Chat:
    """See `endpoint.Translation`."""

    anthropic = False
    keep_alive = wire.COMMENT

    def __init__(self, state: ServiceState, key: Key, request: Request | None, body: bytes) -> None:
        self._state, self._key = state, key
        self.request: ChatRequest = wire.decode(body, _decoder)
        self.ask = read(state, self.request, is_lenient(state, request))
        self._usage_chunk = bool(self.request.stream_options and self.request.stream_options.include_usage)
        self._opened: set[int] = set()  # choices that have been introduced

    def begin(self, turn: Turn) -> None:
        self._turn = turn
        self._head = {
            "id": "chatcmpl-" + turn.request_id.removeprefix("req_"),
            "object": "chat.completion.chunk" if self.ask.stream else "chat.completion",
            "created": int(time.time()),
            "model": self.ask.model,
        }

    def whole(self, ended: Sequence[Ended], bill: Bill) -> dict[str, Any]:
        choices = [
            {
                "index": end.choice,
                "message": answer(end.message),
                "logprobs": logprobs(end.tokens) if self.ask.logprobs else None,
                "finish_reason": end.finish_reason,
            }
            for end in ended
        ]
        trace = {"node": bill.nodes[0], "nodes": list(bill.nodes)}
        completion = {
            **self._head, "choices": choices, "usage": usage(bill.usage), "service_tier": "default",
            "system_fingerprint": f"fp_{self._state.weights_version}", "trace": trace,
        }  # fmt: skip
        if self.request.store:
            self._store(completion)
        return completion

    def _store(self, completion: dict[str, Any]) -> None:
        given = [
            {"id": f"{completion['id']}-{n}", "role": m.role, "content": m.text, "content_parts": None, "name": m.name}
            for n, m in enumerate(self.request.messages)
        ]
        stored = {**completion, "metadata": self.request.metadata or {}}
        doc = {"id": completion["id"], "completion": stored, "messages": given}
        self._state.objects.keep("chat completion", self._key.customer, doc)

    def say(self, events: Sequence[Event]) -> bytes:
        out = b"".join(self._delta(choice, [e for e in events if isinstance(e, Piece) and e.choice == choice])
                       for choice in range(self.ask.n))  # fmt: skip
        bill = events[-1] if isinstance(events[-1], Bill) else None
        return out if bill is None else out + self._last([e for e in events if isinstance(e, Ended)], bill)

    def fail(self, error: ApiError) -> bytes:
        """The official clients raise on any event with a truthy `error`. What was charged until then stands beside it."""
        return wire.event({**error.body(), **({"usage": usage(error.bill.usage)} if error.bill else {})})

    def _delta(self, choice: int, pieces: Sequence[Piece]) -> bytes:
        """A chunk for each thing there is to say about a choice: a thought, some content, one tool call. Many clients look
        at no more than that in a chunk, because OpenAI's have no more."""
        out = b""
        if choice not in self._opened:
            self._opened.add(choice)
            out = self._chunk(choice, {"role": "assistant", "content": ""})
        for run in _runs(pieces):
            first, tokens = run[0], [token for piece in run for token in piece.tokens]
            if first.kind in ("content", "reasoning"):
                field = "content" if first.kind == "content" else "reasoning_content"
                delta: dict[str, Any] = {field: "".join([piece.text for piece in run])}
            else:
                call: dict[str, Any] = {"index": first.call}
                if first.kind == "call":
                    call |= {"id": first.id, "type": "function"}
                function = {"name": first.text} if first.kind == "call" else {}
                rest = run[1:] if first.kind == "call" else run
                function["arguments"] = "".join([piece.text for piece in rest])
                delta = {"tool_calls": [{**call, "function": function}]}
            out += self._chunk(choice, delta, tokens)
        return out

    def _chunk(
        self, choice: int, delta: dict[str, Any], tokens: Sequence[Token] = (), finish_reason: str | None = None, **more: Any
    ) -> bytes:
        shown = logprobs(tokens) if tokens else None
        entry = {"index": choice, "delta": delta, "logprobs": shown, "finish_reason": finish_reason, **more}
        chunk = {**self._head, "choices": [entry]}
        if self._usage_chunk:
            chunk["usage"] = None
        if finish_reason is not None:
            chunk["trace"] = self._trace
        return wire.event(chunk)

    def _last(self, ended: Sequence[Ended], bill: Bill) -> bytes:
        used = usage(bill.usage)
        self._trace = {"node": bill.nodes[0], "nodes": list(bill.nodes)}
        out = b""
        for end in ended:
            more = {"usage": used} if end is ended[-1] else {}  # on a choice is where Kimi's own clients read it
            out += self._chunk(end.choice, {}, (), end.finish_reason, **more)
        if self._usage_chunk:
            out += wire.event({**self._head, "choices": [], "usage": used, "trace": self._trace})
        return out + wire.DONE
