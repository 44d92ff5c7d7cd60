"""The Responses API's requests: items in, one `Ask` out.

A conversation may be given whole, or as what follows a stored response. Tools that only their vendor can run (web
search and the like) are not offered to the model.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any, Literal

import msgspec
from msgspec.structs import replace

from tidelock.service import wire
from tidelock.service.ask import MAX_CALLS, Ask, Origin, check_tool_choice, conversation
from tidelock.service.errors import ApiError, invalid_request
from tidelock.service.keys import Key
from tidelock.service.kimi import TOP_P
from tidelock.service.media import stand_in
from tidelock.service.state import ServiceState
from tidelock.service.surfaces.chat_request import check_model
from tidelock.tokens.message import DIRECTIVES, Message, ToolSpec
from tidelock.tokens.policy import SamplingParams

KIND = "response"
ROLES = ("user", "assistant", "system", "developer")
MEDIA = {"input_image": "image", "input_file": "file"}
EARLIER = "The conversation so far, in short:"


class Part(msgspec.Struct, gc=False):
    """Text under one of its names, or an image or file by URL, data or id."""

    type: str
    text: str | None = None
    refusal: str | None = None
    image_url: str | None = None
    file_url: str | None = None
    file_data: str | None = None
    file_id: str | None = None
    detail: str | None = None


class Item(msgspec.Struct, gc=False):
    """Any input item; which fields it must have depends on its type."""

    type: str = "message"
    id: str | None = None
    role: str | None = None
    content: str | list[Part] | None = None
    summary: list[Part] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[Part] | None = None
    encrypted_content: str | None = None


class Tool(msgspec.Struct, gc=False):
    type: str
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Reasoning(msgspec.Struct, gc=False):
    effort: str | None = None
    summary: str | None = None


class Format(msgspec.Struct, gc=False):
    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None
    description: str | None = None


class TextConfig(msgspec.Struct, gc=False):
    format: Format | None = None
    verbosity: str | None = None


class StreamOptions(msgspec.Struct, gc=False):
    include_obfuscation: bool | None = None


class InputTokensRequest(msgspec.Struct, gc=False):
    """The body of `POST /v1/responses/input_tokens`."""

    model: str | None = None
    input: str | list[Item] | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    tools: list[Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    text: TextConfig | None = None
    metadata: dict[str, str] | None = None  # `session_id` says which conversation this goes on


class CompactRequest(InputTokensRequest):
    """The body of `POST /v1/responses/compact`."""


class Compacted(msgspec.Struct, gc=False):
    """What a compaction item holds: the users' last words and the summary of everything."""

    users: list[str]
    summary: str


class ResponsesRequest(InputTokensRequest, kw_only=True):
    """The body of `POST /v1/responses`."""

    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    include: list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    store: bool | None = None
    background: bool | None = None
    generate: bool | None = None  # false, on a connection: nothing yet
    truncation: str | None = None
    service_tier: str | None = None
    max_tool_calls: int | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    user: str | None = None


_compacted_decoder = msgspec.json.Decoder(Compacted)

# What was answered on this connection, by response id; of a socket alone, where it need not be stored to be continued.
Here = dict[str, dict[str, Any]]
HERE: ContextVar[Here | None] = ContextVar("here", default=None)
RECALLED = 16  # responses of a connection


def read(state: ServiceState, key: Key, request: ResponsesRequest, lenient: bool) -> Ask:
    """Raises ApiError."""
    for field, high in (("temperature", 2), ("top_p", 1), ("top_logprobs", 20)):
        value = getattr(request, field)
        if value is not None and not 0 <= value <= high:
            raise invalid_request(f"{field} must be between 0 and {high}", field)
    if request.max_output_tokens is not None and request.max_output_tokens < 1:
        raise invalid_request("max_output_tokens must be at least 1", "max_output_tokens")
    if request.background and request.store is False:
        raise invalid_request("a background response is stored; leave `store: false` out", "store")
    if request.top_p == 0:
        raise invalid_request("top_p must be above 0", "top_p")
    params = SamplingParams(
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=(1.0 if lenient else TOP_P) if request.top_p is None else request.top_p,
        top_logprobs=request.top_logprobs or 0,
    )
    return replace(
        to_ask(state, key, request, params, lenient),
        max_tokens=request.max_output_tokens,
        to_fit=lenient,
        stream=bool(request.stream),
        apart=bool(request.background) or warms_up(request),
        logprobs="message.output_text.logprobs" in (request.include or ()),
    )


def warms_up(request: ResponsesRequest) -> bool:
    """Whether it only makes ready what a later one on its connection goes on with."""
    return request.generate is False and HERE.get() is not None


def to_ask(
    state: ServiceState, key: Key, body: InputTokensRequest, params: SamplingParams, lenient: bool
) -> Ask:
    if body.model is None and not lenient:
        raise invalid_request("a request needs a model", "model")
    check_model(state, body.model or state.model, lenient)
    given = _history(state, key, body.previous_response_id)
    items = body.input if isinstance(body.input, list) else [Item(role="user", content=body.input or "")]
    early = isinstance(body, ResponsesRequest) and warms_up(body)
    if body.input is None and not given and not lenient and not early:
        raise invalid_request("a request needs input", "input")
    given += [] if early and not body.input else _messages(items, lenient)
    if not given and not early:
        raise invalid_request("input must not be empty", "input")
    if body.instructions:
        given.insert(0, Message("system", body.instructions))
    tools = [
        ToolSpec(tool.name or "", tool.description or "", tool.parameters or {"type": "object"})
        for tool in body.tools or ()
        if tool.type == "function"
    ]
    form = (body.text.format if body.text else None) or Format()
    if form.type == "json_schema" and (not form.name or form.schema is None):
        raise invalid_request("text.format of type json_schema needs a name and a schema", "text.format")
    reasoning = body.reasoning or Reasoning()
    ask = Ask(
        model=body.model or state.model,
        messages=conversation(given, tools, reasoning.effort, "input"),
        params=params,
        thinking=reasoning.effort != "none",
        effort=reasoning.effort,
        tool_choice=_tool_choice(body.tool_choice),
        parallel_tools=body.parallel_tool_calls is not False,
        schema={"text": None, "json_object": {"type": "object"}, "json_schema": form.schema}[form.type],
        origin=Origin.of(body.metadata),
    )
    if not (lenient and not ask.tools):
        check_tool_choice(ask.tool_choice, ask.tools)
    return ask


def _history(state: ServiceState, key: Key, response_id: str | None) -> list[Message]:
    """The conversation that ends in a stored response; its instructions and tools are not carried over."""
    if response_id is None:
        return []
    try:
        stored = (HERE.get() or {}).get(response_id) or state.objects.get(KIND, key.customer, response_id)
    except ApiError:
        raise invalid_request(f"no previous response {response_id!r}", "previous_response_id",
                              "previous_response_not_found") from None  # fmt: skip
    if "messages" not in stored and (stored["node"] is None or state.traces.get(stored["node"]) is None):
        raise invalid_request(f"previous response {response_id!r} has no answer to go on from", "previous_response_id")
    messages = stored["messages"] if "messages" in stored else state.traces.messages(stored["node"])
    messages = [m for m in messages if m.role != "system" or m.name not in DIRECTIVES]
    if messages and messages[0].role == "system":
        messages[0] = replace(messages[0], tools=())
        if stored["response"]["instructions"] or not messages[0].content:
            del messages[0]
    return messages


def _messages(items: Sequence[Item], lenient: bool) -> list[Message]:
    """Items of one assistant turn (thought, text, calls) become one message."""
    out: list[Message] = []
    turn = Message("assistant")
    for n, item in enumerate(items):
        where = f"input[{n}]"
        if item.type == "reasoning":
            if turn.content or turn.tool_calls:
                out.append(turn)
                turn = Message("assistant")
            turn = replace(turn, reasoning=turn.reasoning + (text_of(item.content) or text_of(item.summary)))
        elif item.type == "message" and item.role == "assistant":
            if turn.content or turn.tool_calls:
                out.append(turn)
                turn = Message("assistant")
            turn = replace(turn, content=text_of(item.content, f"{where}.content", lenient))
        elif item.type == "function_call":
            if not item.call_id or not item.name:
                raise invalid_request("a function_call needs call_id and name", where)
            call = wire.parse_call(item.call_id, item.name, item.arguments or "{}", f"{where}.arguments")
            if len(turn.tool_calls) >= MAX_CALLS:
                raise invalid_request(f"at most {MAX_CALLS} calls in a turn", where)
            turn = replace(turn, tool_calls=(*turn.tool_calls, call))
        else:
            if turn != Message("assistant"):
                out.append(turn)
                turn = Message("assistant")
            out += _compacted(item, where) if item.type == "compaction" else [_input(item, where, lenient)]
    if turn != Message("assistant"):
        out.append(turn)
    return out


def _compacted(item: Item, where: str) -> list[Message]:
    """The conversation that an item made by `compaction` stands for."""
    try:
        held = _compacted_decoder.decode(base64.b64decode(item.encrypted_content or "", validate=True))
    except (ValueError, msgspec.DecodeError):
        raise invalid_request("encrypted_content was not made here", f"{where}.encrypted_content") from None
    return [*(Message("user", text) for text in held.users), Message("user", f"{EARLIER}\n{held.summary}")]


def _input(item: Item, where: str, lenient: bool) -> Message:
    if item.type == "function_call_output":
        if not item.call_id:
            raise invalid_request("a function_call_output needs call_id", f"{where}.call_id")
        return Message("tool", text_of(item.output, f"{where}.output", lenient), tool_call_id=item.call_id)
    if item.type != "message":
        raise invalid_request(f"items of type {item.type!r} are not taken here", f"{where}.type")
    if item.role not in ROLES:
        raise invalid_request(f"{item.role!r} is no role; use one of {', '.join(ROLES)}", f"{where}.role")
    return Message("user" if item.role == "user" else "system", text_of(item.content, f"{where}.content", lenient))


def text_of(content: str | list[Part] | None, where: str = "", lenient: bool = False) -> str:
    """Raises a 400 that names the part that is no text."""
    if isinstance(content, str):
        return content
    return "".join(_part(part, f"{where}[{n}]", lenient) for n, part in enumerate(content or ()))


def _part(part: Part, where: str, lenient: bool) -> str:
    if part.text is not None or part.refusal is not None:
        return part.text or part.refusal or ""
    kind = MEDIA.get(part.type)
    if kind is None:
        raise invalid_request(f"parts of type {part.type!r} are not taken here", where)
    url = part.image_url or part.file_url or part.file_data
    if url is None and not part.file_id:
        raise invalid_request(f"an {part.type} needs a URL or a file_id", where)
    return stand_in(kind, url, where, lenient)


def _tool_choice(given: str | dict[str, Any] | None) -> str:
    if given is None or given in ("auto", "none", "required"):
        return given or "auto"
    if isinstance(given, dict) and given.get("type") == "function" and isinstance(given.get("name"), str):
        return given["name"]
    if isinstance(given, dict) and given.get("type") == "allowed_tools" and given.get("mode") in ("auto", "required"):
        return given["mode"]
    raise invalid_request("tool_choice must be auto, none, required or name a function", "tool_choice")
