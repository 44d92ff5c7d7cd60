"""Anthropic Messages, at both versions of that API.

2023-06-01 takes `temperature`, `top_p` and `top_k`; 2026-10-21 refuses them. Input tokens exclude those read from the
cache; content comes in typed blocks; a trailing assistant message is the beginning of the answer.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
from starlette.requests import Request

from tidelock.service import run, wire
from tidelock.service.answer import Bill, Ended, Event, Piece, Usage
from tidelock.service.ask import Ask, Origin, check_tool_choice, conversation, stop_strings
from tidelock.service.auth import authenticate
from tidelock.service.errors import ApiError, invalid_request
from tidelock.service.http import is_lenient, read_body
from tidelock.service.keys import Key
from tidelock.service.kimi import TOP_P
from tidelock.service.media import stand_in
from tidelock.service.run import Turn
from tidelock.service.state import ServiceState
from tidelock.service.surfaces.chat import check_model
from tidelock.tokens.message import Message, ToolCall, ToolSpec
from tidelock.tokens.policy import SamplingParams

SAMPLED, FIXED = "2023-06-01", "2026-10-21"  # API versions: with and without sampling parameters
MIN_BUDGET = 1024
STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
PING = wire.named_event({"type": "ping"})


class Text(msgspec.Struct, tag_field="type", tag="text"):
    text: str


class ThinkingBlock(msgspec.Struct, tag_field="type", tag="thinking"):
    thinking: str
    signature: str = ""


class ToolUse(msgspec.Struct, tag_field="type", tag="tool_use"):
    id: str
    name: str
    input: dict[str, Any]


class Source(msgspec.Struct):
    type: Literal["base64", "url", "file", "text"]
    media_type: str = ""
    data: str = ""
    url: str = ""
    file_id: str = ""


class Image(msgspec.Struct, tag_field="type", tag="image"):
    source: Source
    kind = "image"


class Document(msgspec.Struct, tag_field="type", tag="document"):
    source: Source
    kind = "file"


class ToolResult(msgspec.Struct, tag_field="type", tag="tool_result"):
    tool_use_id: str
    content: str | list[Text | Image | Document] | None = None
    is_error: bool | None = None


class WireMessage(msgspec.Struct):
    role: Literal["user", "assistant", "system"]
    content: str | list[Text | ThinkingBlock | ToolUse | ToolResult | Image | Document]

    @property
    def blocks(self) -> list[Any]:
        return [Text(self.content)] if isinstance(self.content, str) else self.content


class Tool(msgspec.Struct):
    name: str
    input_schema: dict[str, Any] | None = None
    description: str = ""
    type: str | None = None


class ToolChoice(msgspec.Struct):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(msgspec.Struct):
    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: int | None = None


class OutputFormat(msgspec.Struct):
    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(msgspec.Struct):
    effort: str | None = None
    format: OutputFormat | None = None


class CountRequest(msgspec.Struct):
    """The body of `POST /v1/messages/count_tokens`."""

    model: str
    messages: Annotated[list[WireMessage], msgspec.Meta(min_length=1)]
    system: str | list[Text] | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None


class MessagesRequest(CountRequest, kw_only=True):
    """The body of `POST /v1/messages`."""

    max_tokens: int
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    metadata: dict[str, Any] | None = None


_decoder = msgspec.json.Decoder(MessagesRequest)
_count_decoder = msgspec.json.Decoder(CountRequest)


async def count(state: ServiceState, request: Request) -> dict[str, int]:
    """`POST /v1/messages/count_tokens`"""
    key = authenticate(state, request)
    body = wire.decode(await read_body(request, state.max_body_bytes), _count_decoder)
    _version(request)
    ask = _ask(state, body, SamplingParams(), None, is_lenient(state, request))
    return {"input_tokens": await run.count_tokens(state, key, ask)}


def read(state: ServiceState, request: MessagesRequest, version: str, lenient: bool) -> Ask:
    """Raises ApiError."""
    _check_sampling(request, version)
    if request.max_tokens < 1:
        raise invalid_request("max_tokens must be at least 1", "max_tokens")
    thinking = request.thinking
    if thinking is not None and thinking.type == "enabled" and not lenient:
        if not MIN_BUDGET <= (thinking.budget_tokens or 0) < request.max_tokens:
            reason = f"thinking.budget_tokens must be at least {MIN_BUDGET} and below max_tokens"
            raise invalid_request(reason, "thinking.budget_tokens")
    params = SamplingParams(
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=(1.0 if lenient else TOP_P) if request.top_p is None else request.top_p,
        top_k=request.top_k or 0,
        stop=stop_strings(request.stop_sequences, "stop_sequences"),
    )
    return _ask(state, request, params, request, lenient)


def _version(request: Request) -> str:
    version = request.headers.get("anthropic-version", SAMPLED)
    if version not in (SAMPLED, FIXED):
        raise invalid_request(f"anthropic-version: {version!r} is not a version; use {SAMPLED} or {FIXED}")
    return version


def _check_sampling(request: MessagesRequest, version: str) -> None:
    for field, high in (("temperature", 1), ("top_p", 1), ("top_k", None)):
        value = getattr(request, field)
        if value is None:
            continue
        if version == FIXED:
            raise invalid_request(f"{field}: not taken by anthropic-version {FIXED}", field)
        if value < 0 or (high is not None and value > high):
            bounds = f"between 0 and {high}" if high else "0 or more"
            raise invalid_request(f"{field} must be {bounds}", field)
    if request.top_p == 0:
        raise invalid_request("top_p must be above 0", "top_p")


def _ask(
    state: ServiceState, body: CountRequest, params: SamplingParams, full: MessagesRequest | None, lenient: bool
) -> Ask:
    check_model(state, body.model, lenient)
    given = [m for n, message in enumerate(body.messages) for m in _messages(message, f"messages[{n}]", lenient)]
    if not given:
        raise invalid_request("messages: all are empty", "messages")
    opening = None
    if given[-1].role == "assistant" and not given[-1].tool_calls:
        opening = given.pop()
    system = body.system if isinstance(body.system, str) else "\n\n".join(t.text for t in body.system or ())
    if system:
        given.insert(0, Message("system", system))
    tools = [_tool(tool, n) for n, tool in enumerate(body.tools or ())]
    choice, config = body.tool_choice, body.output_config or OutputConfig()
    ask = Ask(
        model=body.model,
        messages=conversation(given, tools, config.effort),
        params=params,
        max_tokens=full.max_tokens if full else None,
        to_fit=lenient,
        stream=bool(full and full.stream),
        thinking=body.thinking is None or body.thinking.type != "disabled",
        effort=config.effort,
        tool_choice=_tool_choice(choice),
        parallel_tools=not (choice and choice.disable_parallel_tool_use),
        schema=config.format.schema if config.format else None,
        opening=opening,
        origin=Origin.of(full.metadata if full else None),
    )
    check_tool_choice(ask.tool_choice, ask.tools)
    return ask


def _messages(given: WireMessage, where: str, lenient: bool) -> list[Message]:
    text = _text(given.blocks, f"{where}.content", lenient)
    kinds = {"user": (Text, ToolResult, Image, Document), "assistant": (Text, ThinkingBlock, ToolUse), "system": (Text,)}[given.role]
    for n, block in enumerate(given.blocks):
        if not isinstance(block, kinds):
            kind = block.__struct_config__.tag
            raise invalid_request(f"a {given.role} message cannot hold a {kind} block", f"{where}.content[{n}]")
    if given.role == "assistant":
        reasoning = "".join(block.thinking for block in given.blocks if isinstance(block, ThinkingBlock))
        calls = tuple(ToolCall(b.id, b.name, b.input) for b in given.blocks if isinstance(b, ToolUse))
        return [Message("assistant", text, reasoning, calls)] if text or reasoning or calls else []
    results = [
        Message("tool", _text([Text(b.content)] if isinstance(b.content, str) else b.content or (), f"{where}.content[{n}].content",
                              lenient), tool_call_id=b.tool_use_id)
        for n, b in enumerate(given.blocks) if isinstance(b, ToolResult)
    ]  # fmt: skip
    return [*results, Message(given.role, text)] if text or not results else results


def _text(blocks: Sequence[Any], where: str, lenient: bool) -> str:
    """What of the blocks is text. Raises a 400 that names an image or a document."""
    out = []
    for n, block in enumerate(blocks):
        if isinstance(block, Text):
            out.append(block.text)
        elif isinstance(block, Image | Document):
            out.append(_seen(block, f"{where}[{n}]", lenient))
    return "".join(out)


def _seen(block: Image | Document, where: str, lenient: bool) -> str:
    source = block.source
    if isinstance(block, Document) and source.type == "text":
        return source.data
    url = {"base64": f"data:{source.media_type};base64,{source.data}", "url": source.url}.get(source.type)
    if url is None and not source.file_id:
        raise invalid_request("a source of type file needs a file_id", where)
    return stand_in(block.kind, url, where, lenient)


def _tool(tool: Tool, n: int) -> ToolSpec:
    if tool.type not in (None, "custom"):
        raise invalid_request(f"tools of type {tool.type!r} are not run here", f"tools[{n}].type")
    if tool.input_schema is None:
        raise invalid_request("a tool needs input_schema", f"tools[{n}].input_schema")
    if not re.fullmatch(r"[a-zA-Z0-9_-]{1,128}", tool.name):
        raise invalid_request(f"{tool.name!r} is no tool name", f"tools[{n}].name")
    return ToolSpec(tool.name, tool.description, tool.input_schema)


def _tool_choice(choice: ToolChoice | None) -> str:
    if choice is None:
        return "auto"
    if choice.type == "tool":
        if not choice.name:
            raise invalid_request("tool_choice of type tool needs a name", "tool_choice.name")
        return choice.name
    return {"any": "required"}.get(choice.type, choice.type)


def usage(used: Usage) -> dict[str, Any]:
    """Input as this API counts it: fresh, written to the cache and read from it add up to the prompt."""
    return {
        "input_tokens": used.prompt_tokens - used.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": used.cached_tokens,
        "cache_creation": {"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 0},
        "output_tokens": used.completion_tokens,
        "output_tokens_details": {"thinking_tokens": used.reasoning_tokens},
        "service_tier": "standard",
        "cost_nano_usd": used.nano_usd,
    }


def _signature(thought: str) -> str:
    """Clients must send a thought back with its signature. Ours only tells whether it came back unchanged."""
    return base64.b64encode(hashlib.blake2b(thought.encode("utf-8", "surrogatepass"), digest_size=24).digest()).decode()


def _tool_id(call_id: str) -> str:
    return "toolu_" + re.sub("[^a-zA-Z0-9_-]", "_", call_id.removeprefix("functions."))


def _stop_reason(end: Ended) -> str:
    return "stop_sequence" if end.stop is not None else STOP_REASONS[end.finish_reason]


class Messages:
    """See `endpoint.Translation`."""

    anthropic = True
    keep_alive = PING

    def __init__(self, state: ServiceState, key: Key, request: Request, body: bytes) -> None:
        self.ask = read(state, wire.decode(body, _decoder), _version(request), is_lenient(state, request))
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
            content.append({"type": "text", "text": message.content})
        for call in message.tool_calls:
            content.append({"type": "tool_use", "id": _tool_id(call.id), "name": call.name, "input": call.arguments})
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
            delta = {"stop_reason": _stop_reason(end), "stop_sequence": end.stop}
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
            "stop_reason": None, "stop_sequence": None, "usage": used,
        }  # fmt: skip

    def _piece(self, piece: Piece) -> bytes:
        if piece.kind == "call":
            block = {"type": "tool_use", "id": _tool_id(piece.id), "name": piece.text, "input": {}}
            return self._open("arguments", block)
        if piece.kind == "reasoning":
            opened = b"" if self._kind == "reasoning" else self._open(
                "reasoning", {"type": "thinking", "thinking": "", "signature": ""}
            )  # fmt: skip
            self._thought += piece.text
            return opened + self._delta({"type": "thinking_delta", "thinking": piece.text})
        if piece.kind == "content":
            opened = b"" if self._kind == "content" else self._open("content", {"type": "text", "text": ""})
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
