"""Anthropic Messages: answers in typed blocks, whole or as a stream of them. What a request may say is in
`messages_request`. Input tokens exclude those read from the cache.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from typing import Any

import msgspec
from starlette.requests import Request

from tidelock.service import run, wire
from tidelock.service.answer import Bill, Ended, Event, Piece, Usage
from tidelock.service.auth import authenticate
from tidelock.service.errors import ApiError
from tidelock.service.http import is_lenient, read_body
from tidelock.service.keys import Key
from tidelock.service.run import Turn
from tidelock.service.state import ServiceState
from tidelock.service.surfaces.messages_request import CountRequest, MessagesRequest, read, to_ask, version_of
from tidelock.tokens.policy import SamplingParams

STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
PING = wire.named_event({"type": "ping"})

_decoder = msgspec.json.Decoder(MessagesRequest)
_count_decoder = msgspec.json.Decoder(CountRequest)


async def count(state: ServiceState, request: Request) -> dict[str, int]:
    """`POST /v1/messages/count_tokens`"""
    key = authenticate(state, request)
    body = wire.decode(await read_body(request, state.max_body_bytes), _count_decoder)
    version_of(request)
    ask = to_ask(state, body, SamplingParams(), None, is_lenient(state, request))
    return {"input_tokens": await run.count_tokens(state, key, ask)}


def usage(used: Usage) -> dict[str, Any]:
    """Input as this API counts it: fresh, written to the cache and read from it add up to the prompt."""
    return {
        "input_tokens": used.prompt_tokens - used.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": used.cached_tokens,
        "cache_creation": {"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 0},
        "output_tokens": used.completion_tokens,
        "output_tokens_details": {"thinking_tokens": used.reasoning_tokens},
        "server_tool_use": None,
        "inference_geo": None,
        "service_tier": "standard",
        "cost_nano_usd": used.nano_usd,
    }


def _signature(thought: str) -> str:
    """Clients must send a thought back with its signature. Ours only tells whether it came back unchanged."""
    return base64.b64encode(hashlib.blake2b(thought.encode("utf-8", "surrogatepass"), digest_size=24).digest()).decode()


def _tool_id(call_id: str) -> str:
    return "toolu_" + re.sub("[^a-zA-Z0-9_-]", "_", call_id.removeprefix("functions."))


def _text(text: str) -> dict[str, Any]:
    """Citations must be there, says Anthropic's document, and may be null; the AI SDK takes them missing or a list."""
    return {"type": "text", "text": text, "citations": []}


def _tool_use(call_id: str, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"type": "tool_use", "id": _tool_id(call_id), "name": name, "input": arguments, "caller": {"type": "direct"}}


def _stop_reason(end: Ended) -> str:
    return "stop_sequence" if end.stop is not None else STOP_REASONS[end.finish_reason]


class Messages:
    """See `endpoint.Translation`."""

    anthropic = True
    keep_alive = PING

    def __init__(self, state: ServiceState, key: Key, request: Request | None, body: bytes) -> None:
        self.ask = read(state, wire.decode(body, _decoder), version_of(request), is_lenient(state, request))
        self._block = -1  # index of the open content block
        self._kind: str | None = None  # what it holds
        self._thought = ""

    def begin(self, turn: Turn) -> None:
        self._turn = turn
        self._id = "msg_" + turn.request_id.removeprefix("req_")

    def whole(self, ended: Sequence[Ended], bill: Bill) -> dict[str, Any]:
        end = ended[0]
        message = end.message
        content: list[dict[str, Any]] = []
        if message.reasoning:
            signature = _signature(message.reasoning)
            content.append({"type": "thinking", "thinking": message.reasoning, "signature": signature})
        if message.content:
            content.append(_text(message.content))
        content += [_tool_use(call.id, call.name, call.arguments) for call in message.tool_calls]
        return {
            **self._message(content, usage(bill.usage)),
            "stop_reason": _stop_reason(end),
            "stop_sequence": end.stop,
            "trace": {"node": bill.nodes[0]},
        }

    def say(self, events: Sequence[Event]) -> bytes:
        out = b""
        if self._block < 0 and self._kind is None:
            started = self._message([], usage(Usage(self._turn.prompt_tokens, 0)))
            out, self._kind = wire.named_event({"type": "message_start", "message": started}), ""
        for piece in _merged(events):
            out += self._piece(piece)
        if isinstance(events[-1], Bill):
            end = next(event for event in events if isinstance(event, Ended))
            delta = {"stop_reason": _stop_reason(end), "stop_sequence": end.stop, "stop_details": None, "container": None}
            last = {"type": "message_delta", "delta": delta, "usage": usage(events[-1].usage)}
            last["trace"] = {"node": events[-1].nodes[0]}
            out += self._close() + wire.named_event(last) + wire.named_event({"type": "message_stop"})
        return out

    def fail(self, error: ApiError) -> bytes:
        """What was charged until then stands beside the error."""
        _, body = error.anthropic(self._turn.request_id)
        return wire.named_event({**body, **({"usage": usage(error.bill.usage)} if error.bill else {})})

    def _message(self, content: list[dict[str, Any]], used: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": self._id, "type": "message", "role": "assistant", "model": self.ask.model, "content": content,
            "stop_reason": None, "stop_sequence": None, "stop_details": None, "container": None, "usage": used,
        }  # fmt: skip

    def _piece(self, piece: Piece) -> bytes:
        if piece.kind == "call":
            return self._open("arguments", _tool_use(piece.id, piece.text, {}))
        if piece.kind == "reasoning":
            opened = b"" if self._kind == "reasoning" else self._open(
                "reasoning", {"type": "thinking", "thinking": "", "signature": ""}
            )  # fmt: skip
            self._thought += piece.text
            return opened + self._delta({"type": "thinking_delta", "thinking": piece.text})
        if piece.kind == "content":
            opened = b"" if self._kind == "content" else self._open("content", _text(""))
            return opened + self._delta({"type": "text_delta", "text": piece.text})
        return self._delta({"type": "input_json_delta", "partial_json": piece.text})

    def _open(self, kind: str, block: dict[str, Any]) -> bytes:
        out = self._close()
        self._block, self._kind, self._thought = self._block + 1, kind, ""
        return out + wire.named_event({"type": "content_block_start", "index": self._block, "content_block": block})

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return wire.named_event({"type": "content_block_delta", "index": self._block, "delta": delta})

    def _close(self) -> bytes:
        if self._block < 0:
            return b""
        out = b""
        if self._kind == "reasoning":
            out = self._delta({"type": "signature_delta", "signature": _signature(self._thought)})
        return out + wire.named_event({"type": "content_block_stop", "index": self._block})


def _merged(events: Sequence[Event]) -> list[Piece]:
    """Neighbouring pieces of the same text as one."""
    out: list[Piece] = []
    for event in events:
        if not isinstance(event, Piece):
            continue
        last = out[-1] if out else None
        if last is not None and event.kind != "call" and (event.kind, event.call) == (last.kind, last.call):
            out[-1] = Piece(event.choice, event.kind, last.text + event.text, event.call, tokens=last.tokens + event.tokens)
        else:
            out.append(event)
    return out
