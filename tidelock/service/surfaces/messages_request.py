"""A request of Anthropic's Messages API: its structs, and the one `Ask` it becomes, at both versions of that API.

2023-06-01 takes `temperature`, `top_p` and `top_k`; 2026-10-21 refuses them. A trailing assistant message is the
beginning of the answer. Who does not speak of thinking gets Kimi's default, a thought first; on a lenient server
Anthropic's, none, because clients written for that API take the first block for the answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
from starlette.requests import Request

from tidelock.service.ask import Ask, Origin, check_tool_choice, conversation, stop_strings
from tidelock.service.errors import invalid_request
from tidelock.service.kimi import TOP_P
from tidelock.service.media import stand_in
from tidelock.service.state import ServiceState
from tidelock.service.surfaces.chat_request import check_model
from tidelock.tokens.message import Message, ToolCall, ToolSpec
from tidelock.tokens.policy import SamplingParams

SAMPLED, FIXED = "2023-06-01", "2026-10-21"  # API versions: with and without sampling parameters
MIN_BUDGET = 1024


class Text(msgspec.Struct, gc=False, tag_field="type", tag="text"):
    text: str


class ThinkingBlock(msgspec.Struct, gc=False, tag_field="type", tag="thinking"):
    thinking: str
    signature: str = ""


class RedactedThinking(msgspec.Struct, gc=False, tag_field="type", tag="redacted_thinking"):
    """Another model's, from a conversation that began elsewhere: nobody here can read it, and it is left out."""

    data: str = ""


class ToolUse(msgspec.Struct, gc=False, tag_field="type", tag="tool_use"):
    id: str
    name: str
    input: dict[str, Any]


class Source(msgspec.Struct, gc=False):
    type: Literal["base64", "url", "file", "text"]
    media_type: str = ""
    data: str = ""
    url: str = ""
    file_id: str = ""


class Image(msgspec.Struct, gc=False, tag_field="type", tag="image"):
    source: Source
    kind = "image"


class Document(msgspec.Struct, gc=False, tag_field="type", tag="document"):
    source: Source
    kind = "file"


class ToolResult(msgspec.Struct, gc=False, tag_field="type", tag="tool_result"):
    tool_use_id: str
    content: str | list[Text | Image | Document] | None = None
    is_error: bool | None = None


class WireMessage(msgspec.Struct, gc=False):
    role: Literal["user", "assistant", "system"]
    content: str | list[Text | ThinkingBlock | RedactedThinking | ToolUse | ToolResult | Image | Document]

    @property
    def blocks(self) -> list[Any]:
        return [Text(self.content)] if isinstance(self.content, str) else self.content


class Tool(msgspec.Struct, gc=False):
    name: str
    input_schema: dict[str, Any] | None = None
    description: str = ""
    type: str | None = None


class ToolChoice(msgspec.Struct, gc=False):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(msgspec.Struct, gc=False):
    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: int | None = None


class OutputFormat(msgspec.Struct, gc=False):
    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(msgspec.Struct, gc=False):
    effort: str | None = None
    format: OutputFormat | None = None


class CountRequest(msgspec.Struct, gc=False):
    """The body of `POST /v1/messages/count_tokens`."""

    model: str
    messages: Annotated[list[WireMessage], msgspec.Meta(min_length=1)]
    system: str | list[Text] | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None  # where the format stood before `output_config` had it
    metadata: dict[str, Any] | None = None  # `session_id` says which conversation this goes on


class MessagesRequest(CountRequest, kw_only=True):
    """The body of `POST /v1/messages`."""

    max_tokens: int
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None


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
    return to_ask(state, request, params, request, lenient)


def version_of(request: Request | None) -> str:
    if request is None:  # in a batch
        return SAMPLED
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


def to_ask(
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
    form = config.format or body.output_format
    ask = Ask(
        model=body.model,
        messages=conversation(given, tools, config.effort),
        params=params,
        max_tokens=full.max_tokens if full else None,
        to_fit=lenient,
        stream=bool(full and full.stream),
        thinking=not lenient if body.thinking is None else body.thinking.type != "disabled",
        effort=config.effort,
        tool_choice=_tool_choice(choice),
        parallel_tools=not (choice and choice.disable_parallel_tool_use),
        schema=form.schema if form else None,
        opening=opening,
        origin=Origin.of(body.metadata),
    )
    check_tool_choice(ask.tool_choice, ask.tools)
    return ask


KINDS = {
    "user": (Text, ToolResult, Image, Document), "assistant": (Text, ThinkingBlock, RedactedThinking, ToolUse),
    "system": (Text,),
}  # fmt: skip


def _messages(given: WireMessage, where: str, lenient: bool) -> list[Message]:
    text = _text(given.blocks, f"{where}.content", lenient)
    kinds = KINDS[given.role]
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
