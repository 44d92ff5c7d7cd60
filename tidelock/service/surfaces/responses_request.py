"""The Responses API's requests: items in, one `Ask` out.

A conversation may be given whole, as what follows a stored response, or as what is said next in a stored conversation.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any, Literal

import msgspec
from msgspec.structs import replace

from tidelock.service.ask import Ask, Origin, check_tool_choice, conversation
from tidelock.service.errors import ApiError, invalid_request
from tidelock.service.keys import Key
from tidelock.service.kimi import TOP_P
from tidelock.service.state import ServiceState
from tidelock.service.surfaces import conversations
from tidelock.service.surfaces.chat_request import check_model
from tidelock.service.surfaces.responses_items import KIND, Item, messages_of, resolved
from tidelock.service.surfaces.responses_tools import Tool, offered, tool_choice
from tidelock.tokens.message import DIRECTIVES, Message
from tidelock.tokens.policy import SamplingParams


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
    verbosity: Literal["low", "medium", "high"] | None = None


class StreamOptions(msgspec.Struct, gc=False):
    include_obfuscation: bool | None = None


class ConversationId(msgspec.Struct, gc=False):
    id: str


class InputTokensRequest(msgspec.Struct, gc=False):
    """The body of `POST /v1/responses/input_tokens`."""

    model: str | None = None
    input: str | list[Item] | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    conversation: str | ConversationId | None = None
    tools: list[Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    text: TextConfig | None = None
    metadata: dict[str, str] | None = None  # `session_id` says which conversation this goes on

    @property
    def conversation_id(self) -> str | None:
        return self.conversation.id if isinstance(self.conversation, ConversationId) else self.conversation


class CompactRequest(InputTokensRequest):
    """The body of `POST /v1/responses/compact`."""


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
    prompt: dict[str, Any] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    service_tier: str | None = None
    max_tool_calls: int | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    user: str | None = None


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
    if request.background and request.conversation is not None:
        raise invalid_request("a background response is in no conversation; go on from it by `previous_response_id`", "conversation")
    if request.prompt is not None and not lenient:
        raise invalid_request("no prompts are kept here; say what you want in `instructions` and `input`", "prompt")
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
    """A lenient server also answers a body that says nothing at all, as some clients' own tests send it."""
    if body.model is None and not (lenient and body.input is None):
        raise invalid_request("a request needs a model", "model")
    check_model(state, body.model or state.model, lenient)
    early = isinstance(body, ResponsesRequest) and warms_up(body)
    given = _given(state, key, body, lenient, early)
    if not given and not early:
        raise invalid_request("input must not be empty", "input")
    if body.instructions:
        given.insert(0, Message("system", body.instructions))
    tools = offered(body.tools or (), body.tool_choice, lenient)
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
        tool_choice=tool_choice(body.tool_choice),
        parallel_tools=body.parallel_tool_calls is not False,
        schema={"text": None, "json_object": {"type": "object"}, "json_schema": form.schema}[form.type],
        origin=Origin.of(body.metadata),
    )
    if not (lenient and not ask.tools):
        check_tool_choice(ask.tool_choice, ask.tools)
    return ask


def _given(
    state: ServiceState, key: Key, body: InputTokensRequest, lenient: bool, early: bool = False
) -> list[Message]:
    """What was said before, wherever it is kept, and what is said now."""
    if body.conversation is not None and body.previous_response_id is not None and not lenient:
        raise invalid_request("a request goes on from a conversation or from a response, not from both", "conversation")
    earlier = conversations.items(state, key, body.conversation_id) if body.conversation_id is not None else []
    said = _history(state, key, body.previous_response_id) if body.conversation_id is None else []
    if body.input is None and not said and not earlier and not lenient and not early:
        raise invalid_request("a request needs input", "input")
    new = body.input if isinstance(body.input, list) else [Item(role="user", content=body.input or "")]
    if early and not body.input:
        new = []
    return said + messages_of([*earlier, *resolved(state, key, new)], lenient)


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
