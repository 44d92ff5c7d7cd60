"""A chat request: its structs, and the one `Ask` it becomes. Unknown fields are ignored, as Kimi's own API does."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from tidelock.service import kimi, mfjs, wire
from tidelock.service.ask import Ask, Origin, check_tool_choice, conversation, stop_strings
from tidelock.service.errors import invalid_request, not_found
from tidelock.service.media import stand_in
from tidelock.service.state import ServiceState
from tidelock.tokens.message import Message, ToolSpec
from tidelock.tokens.policy import SamplingParams


class TextPart(msgspec.Struct, gc=False, tag_field="type", tag="text"):
    text: str


class RefusalPart(msgspec.Struct, gc=False, tag_field="type", tag="refusal"):
    refusal: str

    @property
    def text(self) -> str:
        return self.refusal


class Link(msgspec.Struct, gc=False):
    url: str


class ImagePart(msgspec.Struct, gc=False, tag_field="type", tag="image_url"):
    image_url: str | Link
    kind = "image"
    text = "[image]"

    @property
    def url(self) -> str:
        return self.image_url if isinstance(self.image_url, str) else self.image_url.url


class VideoPart(msgspec.Struct, gc=False, tag_field="type", tag="video_url"):
    video_url: str | Link
    kind = "video"
    text = "[video]"

    @property
    def url(self) -> str:
        return self.video_url if isinstance(self.video_url, str) else self.video_url.url


class File(msgspec.Struct, gc=False):
    file_data: str | None = None
    file_id: str | None = None
    filename: str | None = None


class FilePart(msgspec.Struct, gc=False, tag_field="type", tag="file"):
    file: File
    kind = "file"
    text = "[file]"

    @property
    def url(self) -> str | None:
        return self.file.file_data


class FunctionCall(msgspec.Struct, gc=False):
    name: str
    arguments: str = "{}"


class WireToolCall(msgspec.Struct, gc=False):
    id: str
    function: FunctionCall
    type: Literal["function", "builtin_function"] = "function"


class Function(msgspec.Struct, gc=False):
    name: str
    description: str = ""
    parameters: dict[str, Any] = {}
    strict: bool | None = None


class Tool(msgspec.Struct, gc=False):
    type: Literal["function", "builtin_function"]
    function: Function


class WireMessage(msgspec.Struct, gc=False):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart | RefusalPart | ImagePart | VideoPart | FilePart] | None = None
    reasoning_content: str | None = None
    tool_calls: list[WireToolCall] | None = None
    tool_call_id: str | None = None
    tools: list[Tool] | None = None
    name: str | None = None
    partial: bool | None = None

    @property
    def text(self) -> str:
        content = self.content
        return content if isinstance(content, str) else "".join(part.text for part in content or ())


class StreamOptions(msgspec.Struct, gc=False):
    include_usage: bool = False


class JsonSchema(msgspec.Struct, gc=False):
    name: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, gc=False):
    type: str
    json_schema: JsonSchema | None = None


class Thinking(msgspec.Struct, gc=False):
    type: Literal["enabled", "disabled"] | None = None
    keep: str | None = None
    effort: str | None = None


class ChatRequest(msgspec.Struct, gc=False):
    """The body of `POST /v1/chat/completions`."""

    model: str
    messages: Annotated[list[WireMessage], msgspec.Meta(min_length=1)]
    tools: list[Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: ResponseFormat | None = None
    thinking: Thinking | None = None
    reasoning_effort: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None


def read(state: ServiceState, request: ChatRequest, lenient: bool) -> Ask:
    """Raises ApiError."""
    check_model(state, request.model, lenient)
    kimi.check(request, lenient)
    given = [_message(message, f"messages[{n}]", lenient) for n, message in enumerate(request.messages)]
    opening = given.pop() if request.messages[-1].partial else None
    allowed = _allowed(request.tool_choice) if lenient else None
    tools = [ToolSpec(t.function.name, t.function.description, t.function.parameters) for t in request.tools or ()
             if allowed is None or t.function.name in allowed]  # fmt: skip
    messages = conversation(given, tools, kimi.effort(request))
    ask = Ask(
        model=request.model,
        messages=messages,
        params=SamplingParams(
            temperature=kimi.temperature(request, lenient),
            top_p=kimi.top_p(request, lenient),
            presence_penalty=request.presence_penalty or 0.0,
            frequency_penalty=request.frequency_penalty or 0.0,
            logit_bias=_logit_bias(request, state, lenient),
            stop=stop_strings(request.stop),
            seed=None if request.seed is None else request.seed % 2**63,  # clients may send any integer
            top_logprobs=request.top_logprobs or 0,
        ),
        max_tokens=_limit(request),
        to_fit=lenient,
        n=request.n or 1,
        stream=bool(request.stream),
        logprobs=bool(request.logprobs),
        thinking=kimi.thinks(request, lenient),
        effort=kimi.effort(request),
        tool_choice=_tool_choice(request.tool_choice, lenient),
        parallel_tools=request.parallel_tool_calls is not False,
        schema=_schema(request.response_format),
        opening=opening,
        origin=Origin.of(request.metadata),
    )
    check_tool_choice(ask.tool_choice, ask.tools)
    return ask


def check_model(state: ServiceState, model: str, lenient: bool) -> None:
    """A lenient server answers to any name: agents ask for the models they were written for."""
    if model != state.model and not lenient:
        raise not_found(f"no model {model!r} here; /v1/models lists them", "model", "model_not_found")


def _limit(request: ChatRequest) -> int | None:
    """Tokens of answer asked for; the older `max_tokens` means the same. 0 says nothing."""
    for field in ("max_completion_tokens", "max_tokens"):
        value = getattr(request, field)
        if value is not None and value < 0:
            raise invalid_request(f"{field} must be at least 1", field)
        if value:
            return value
    return None


def _message(given: WireMessage, where: str, lenient: bool) -> Message:
    text = _text(given, where, lenient)
    if given.role == "assistant":
        calls = tuple(
            wire.parse_call(c.id, c.function.name, c.function.arguments, f"{where}.tool_calls[{n}].function.arguments")
            for n, c in enumerate(given.tool_calls or ())
        )
        return Message("assistant", text, reasoning=given.reasoning_content or "", tool_calls=calls)
    if given.content is None and not given.tools:
        raise invalid_request(f"a {given.role} message needs content", f"{where}.content")
    if given.role == "tool":
        return Message("tool", text, tool_call_id=given.tool_call_id)
    if given.role == "user":
        return Message("user", text, name=given.name)
    tools = tuple(ToolSpec(t.function.name, t.function.description, t.function.parameters) for t in given.tools or ())
    return Message("system", text, tools=tools)


def _text(given: WireMessage, where: str, lenient: bool) -> str:
    """Raises a 400 that names the part that is no text."""
    if not isinstance(given.content, list):
        return given.content or ""
    seen = ImagePart | VideoPart | FilePart
    return "".join(
        stand_in(part.kind, part.url, f"{where}.content[{n}]", lenient) if isinstance(part, seen) else part.text
        for n, part in enumerate(given.content)
    )


def _allowed(choice: str | dict[str, Any] | None) -> set[str] | None:
    """The names that OpenAI's `allowed_tools` leaves; None if the choice is of another kind."""
    given = choice.get("allowed_tools") if isinstance(choice, dict) and choice.get("type") == "allowed_tools" else None
    if not isinstance(given, dict):
        return None
    functions = [tool.get("function") for tool in given.get("tools") or () if isinstance(tool, dict)]
    return {str(function.get("name")) for function in functions if isinstance(function, dict)}


def _tool_choice(given: str | dict[str, Any] | None, lenient: bool) -> str:
    if given is None or given in ("auto", "none", "required"):
        return given or "auto"
    if isinstance(given, dict) and given.get("type") == "function":
        name = (given.get("function") or {}).get("name")
        return name if lenient and isinstance(name, str) else "auto"  # Kimi ignores the named form
    if lenient and _allowed(given) is not None:
        return "required" if given["allowed_tools"].get("mode") == "required" else "auto"
    raise invalid_request("tool_choice must be auto, none or required", "tool_choice")


def _schema(given: ResponseFormat | None) -> dict[str, Any] | None:
    """What the answer is held to. Not strict means that a schema may be anything, not that its sender hopes for nothing
    of it: what can be held to is, and of the rest an object remains."""
    if given is None or given.type == "text":
        return None
    if given.type == "json_object" or given.json_schema.strict is False and mfjs.fault(given.json_schema.schema) is not None:
        return {"type": "object"}
    return given.json_schema.schema


def _logit_bias(request: ChatRequest, state: ServiceState, lenient: bool) -> tuple[tuple[int, float], ...]:
    out = []
    for token, bias in (request.logit_bias or {}).items():
        known = token.isdecimal() and int(token) < state.template.tokenizer.vocab_size
        if not known and not lenient:
            raise invalid_request(f"logit_bias names {token!r}, which is no token id", "logit_bias")
        if not -100 <= bias <= 100:
            raise invalid_request("logit_bias values lie between -100 and 100", "logit_bias")
        if known:
            out.append((int(token), bias))
    return tuple(out)
