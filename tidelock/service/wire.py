"""The OpenAI chat-completions wire format: what clients send, what they get, and `tokens.Message` in between.

Fields that would change the answer and that we cannot honour are refused; unknown fields are ignored, as Kimi's own
API does. `reasoning_content` travels both ways beside `content`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import msgspec

from tidelock.service.errors import ApiError, invalid_request
from tidelock.tokens.message import Message, ToolCall, ToolSpec
from tidelock.tokens.template import canonical

MAX_TOOLS = 128


class TextPart(msgspec.Struct):
    text: str
    type: Literal["text"] = "text"


class FunctionCall(msgspec.Struct):
    name: str
    arguments: str = "{}"


class WireToolCall(msgspec.Struct):
    id: str
    function: FunctionCall
    type: Literal["function"] = "function"


class Function(msgspec.Struct):
    name: Annotated[str, msgspec.Meta(pattern="^[a-zA-Z_][a-zA-Z0-9_-]{0,63}$")]
    description: str = ""
    parameters: dict[str, Any] = {}


class Tool(msgspec.Struct):
    function: Function
    type: Literal["function"] = "function"


class WireMessage(msgspec.Struct):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    reasoning_content: str | None = None
    tool_calls: list[WireToolCall] | None = None
    tool_call_id: str | None = None
    name: str | None = None


class StreamOptions(msgspec.Struct):
    include_usage: bool = False


class ResponseFormat(msgspec.Struct):
    type: str


class ChatRequest(msgspec.Struct):
    model: str
    messages: Annotated[list[WireMessage], msgspec.Meta(min_length=1)]
    tools: Annotated[list[Tool], msgspec.Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: Any = None
    max_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None
    max_completion_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    seed: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    metadata: dict[str, str] | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    logprobs: bool | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    response_format: ResponseFormat | None = None

    @property
    def limit(self) -> int | None:
        """Tokens of answer asked for; the older `max_tokens` means the same."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def consent(self) -> bool | None:
        """What the request itself says about training; None if it says nothing."""
        stated = (self.metadata or {}).get("training_consent")
        if stated not in (None, "true", "false"):
            raise invalid_request('metadata.training_consent must be "true" or "false"', "metadata.training_consent")
        return None if stated is None else stated == "true"


_UNSUPPORTED = (
    ("n", lambda r: r.n not in (None, 1)),
    ("stop", lambda r: bool(r.stop)),
    ("logprobs", lambda r: bool(r.logprobs)),
    ("presence_penalty", lambda r: bool(r.presence_penalty)),
    ("frequency_penalty", lambda r: bool(r.frequency_penalty)),
    ("response_format", lambda r: r.response_format is not None and r.response_format.type != "text"),
    ("tool_choice", lambda r: r.tool_choice not in (None, "auto")),
)

_decoder = msgspec.json.Decoder(ChatRequest)
encode = msgspec.json.Encoder().encode


def decode_request(body: bytes) -> ChatRequest:
    """Raises a 400 that names the field."""
    request = decode(body, _decoder)
    for field, refused in _UNSUPPORTED:
        if refused(request):
            raise invalid_request(f"this value of `{field}` is not supported", field)
    return request


def decode(body: bytes, decoder: msgspec.json.Decoder) -> Any:
    """Raises a 400 that names the field, from msgspec's own path (`... - at `$.messages[0].role``)."""
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        reason, _, path = str(error).partition(" - at `$")
        raise invalid_request(reason, path.rstrip("`").lstrip(".") or None) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise invalid_request(f"the body is not JSON: {error}") from error


def to_messages(request: ChatRequest) -> list[Message]:
    """The conversation in our own words, with canonical call ids. Raises a 400 that names the message."""
    messages = [_message(wire, f"messages[{n}]") for n, wire in enumerate(request.messages)]
    _check_order(messages)
    if request.tools:
        messages = _with_tools(messages, request.tools)
    return canonical(messages)


def _message(wire: WireMessage, where: str) -> Message:
    content = wire.content
    text = content if isinstance(content, str) else "".join(part.text for part in content or ())
    if wire.role == "assistant":
        calls = tuple(_call(call, f"{where}.tool_calls[{n}]") for n, call in enumerate(wire.tool_calls or ()))
        return Message("assistant", text, reasoning=wire.reasoning_content or "", tool_calls=calls)
    if content is None:
        raise invalid_request(f"a {wire.role} message needs content", f"{where}.content")
    if wire.role == "tool":
        return Message("tool", text, tool_call_id=wire.tool_call_id)
    return Message("user" if wire.role == "user" else "system", text)


def _call(wire: WireToolCall, where: str) -> ToolCall:
    try:
        arguments = msgspec.json.decode(wire.function.arguments or "{}")
    except msgspec.DecodeError as error:
        raise invalid_request(f"tool call arguments are not JSON: {error}", f"{where}.function.arguments") from error
    if not isinstance(arguments, dict):
        raise invalid_request("tool call arguments must be a JSON object", f"{where}.function.arguments")
    return ToolCall(wire.id, wire.function.name, arguments)


def _check_order(messages: list[Message]) -> None:
    """Every tool result answers a call of the assistant message before it, once; the last word is not ours."""
    open_calls: set[str] = set()
    for n, message in enumerate(messages):
        if message.role == "tool":
            if not message.tool_call_id:
                raise invalid_request("a tool message needs tool_call_id", f"messages[{n}].tool_call_id")
            if message.tool_call_id not in open_calls:
                reason = f"{message.tool_call_id!r} answers no open call of the assistant message before it"
                raise invalid_request(reason, f"messages[{n}].tool_call_id")
            open_calls.remove(message.tool_call_id)
            continue
        if open_calls:
            reason = f"tool calls {sorted(open_calls)} have no result before this message"
            raise invalid_request(reason, f"messages[{n}]")
        ids = [call.id for call in message.tool_calls]
        if len(set(ids)) != len(ids):
            raise invalid_request("tool call ids repeat", f"messages[{n}].tool_calls")
        open_calls = set(ids)
    if open_calls:
        raise invalid_request(f"tool calls {sorted(open_calls)} have no result", "messages")
    if messages[-1].role == "assistant":
        raise invalid_request("the last message must not be the assistant's", "messages")


def _with_tools(messages: list[Message], tools: list[Tool]) -> list[Message]:
    names = [tool.function.name for tool in tools]
    if len(set(names)) != len(names):
        raise invalid_request("tool names repeat", "tools")
    specs = tuple(ToolSpec(t.function.name, t.function.description, t.function.parameters) for t in tools)
    if messages[0].role == "system":
        return [replace(messages[0], tools=specs), *messages[1:]]
    return [Message("system", tools=specs), *messages]


@dataclass(frozen=True)
class Usage:
    """What one request used. `nano_usd` is the exact charge."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    nano_usd: int

    def wire(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "cached_tokens": self.cached_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            "cost_nano_usd": self.nano_usd,
        }


def answer(message: Message) -> dict[str, Any]:
    """An assistant message as the client sees it."""
    wire: dict[str, Any] = {"role": "assistant", "content": message.content or (None if message.tool_calls else "")}
    if message.reasoning:
        wire["reasoning_content"] = message.reasoning
    if message.tool_calls:
        wire["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": _json(call.arguments)}}
            for call in message.tool_calls
        ]
    return wire


def _json(value: Any) -> str:
    return encode(value).decode()


def event(data: Any) -> bytes:
    return b"data: " + encode(data) + b"\n\n"


DONE = b"data: [DONE]\n\n"


def error_event(error: ApiError) -> bytes:
    """The official clients raise on any event with a truthy `error`."""
    return event(error.body())
