"""The Responses API: items in, items out, streamed as typed events; answers stored unless `store` is false.

A thought goes out as a reasoning item whose summary is the thought itself, the one form that all clients know. Tools
that only their vendor can run (web search and the like) are not offered to the model.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import msgspec
from starlette.requests import Request

from tidelock.service import run, wire
from tidelock.service.answer import Bill, Ended, Event, Piece, Usage
from tidelock.service.ask import Ask, Origin, check_tool_choice, conversation
from tidelock.service.auth import authenticate
from tidelock.service.errors import ApiError, invalid_request
from tidelock.service.http import is_lenient, read_body
from tidelock.service.keys import Key
from tidelock.service.kimi import TOP_P
from tidelock.service.run import Turn
from tidelock.service.state import ServiceState
from tidelock.service.surfaces.chat import check_model
from tidelock.service.surfaces.responses_stream import Writer
from tidelock.tokens.message import DIRECTIVES, Message, ToolSpec
from tidelock.tokens.policy import SamplingParams

KIND = "response"
ROLES = ("user", "assistant", "system", "developer")


class Part(msgspec.Struct):
    type: str
    text: str | None = None
    refusal: str | None = None


class Item(msgspec.Struct):
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


class Tool(msgspec.Struct):
    type: str
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Reasoning(msgspec.Struct):
    effort: str | None = None
    summary: str | None = None


class Format(msgspec.Struct):
    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None
    description: str | None = None


class TextConfig(msgspec.Struct):
    format: Format | None = None
    verbosity: str | None = None


class StreamOptions(msgspec.Struct):
    include_obfuscation: bool | None = None


class InputTokensRequest(msgspec.Struct):
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
    metadata: dict[str, str] | None = None
    truncation: str | None = None
    service_tier: str | None = None
    max_tool_calls: int | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    user: str | None = None


_decoder = msgspec.json.Decoder(ResponsesRequest)
_count_decoder = msgspec.json.Decoder(InputTokensRequest)


async def count(state: ServiceState, request: Request) -> dict[str, Any]:
    """`POST /v1/responses/input_tokens`"""
    key = authenticate(state, request)
    body = wire.decode(await read_body(request, state.max_body_bytes), _count_decoder)
    ask = _ask(state, key, body, SamplingParams(), is_lenient(state, request))
    return {"object": "response.input_tokens", "input_tokens": await run.count_tokens(state, key, ask)}


async def retrieve(state: ServiceState, request: Request) -> Any:
    key = authenticate(state, request)
    return state.objects.get(KIND, key.customer, request.path_params["id"])["response"]


async def delete(state: ServiceState, request: Request) -> dict[str, Any]:
    key = authenticate(state, request)
    response_id = request.path_params["id"]
    state.objects.delete(KIND, key.customer, response_id)
    return {"id": response_id, "object": "response", "deleted": True}


async def cancel(state: ServiceState, request: Request) -> Any:
    """Only a background response can still be running; ours are done when they are stored."""
    key = authenticate(state, request)
    stored = state.objects.get(KIND, key.customer, request.path_params["id"])["response"]
    if not stored["background"]:
        raise invalid_request("only a response that was created with background: true can be cancelled", "id")
    return stored


async def input_items(state: ServiceState, request: Request) -> dict[str, Any]:
    key = authenticate(state, request)
    items = state.objects.get(KIND, key.customer, request.path_params["id"])["input"]
    if request.query_params.get("order", "desc") != "asc":
        items = items[::-1]
    first, last = (items[0]["id"], items[-1]["id"]) if items else ("", "")
    return {"object": "list", "data": items, "first_id": first, "last_id": last, "has_more": False}


def read(state: ServiceState, key: Key, request: ResponsesRequest, lenient: bool) -> Ask:
    """Raises ApiError."""
    for field, high in (("temperature", 2), ("top_p", 1), ("top_logprobs", 20)):
        value = getattr(request, field)
        if value is not None and not 0 <= value <= high:
            raise invalid_request(f"{field} must be between 0 and {high}", field)
    if request.max_output_tokens is not None and request.max_output_tokens < 1:
        raise invalid_request("max_output_tokens must be at least 1", "max_output_tokens")
    if request.background and not lenient:
        raise invalid_request("background responses are not run here; leave `background` out", "background")
    if request.top_p == 0:
        raise invalid_request("top_p must be above 0", "top_p")
    params = SamplingParams(
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=(1.0 if lenient else TOP_P) if request.top_p is None else request.top_p,
        top_logprobs=request.top_logprobs or 0,
    )
    return replace(
        _ask(state, key, request, params, lenient),
        max_tokens=request.max_output_tokens,
        to_fit=lenient,
        stream=bool(request.stream),
        logprobs="message.output_text.logprobs" in (request.include or ()),
        origin=Origin.of(request.metadata),
    )


def _ask(
    state: ServiceState, key: Key, body: InputTokensRequest, params: SamplingParams, lenient: bool
) -> Ask:
    if body.model is None and not lenient:
        raise invalid_request("a request needs a model", "model")
    check_model(state, body.model or state.model, lenient)
    given = _history(state, key, body.previous_response_id, lenient)
    items = body.input if isinstance(body.input, list) else [Item(role="user", content=body.input or "")]
    if body.input is None and not given and not lenient:
        raise invalid_request("a request needs input", "input")
    given += _messages(items)
    if not given:
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
    )
    if not (lenient and not ask.tools):
        check_tool_choice(ask.tool_choice, ask.tools)
    return ask


def _history(state: ServiceState, key: Key, response_id: str | None, lenient: bool) -> list[Message]:
    """The conversation that ends in a stored response; its instructions and tools are not carried over."""
    if response_id is None:
        return []
    try:
        stored = state.objects.get(KIND, key.customer, response_id)
    except ApiError:
        if lenient:
            return []
        raise invalid_request(f"no previous response {response_id!r}", "previous_response_id",
                              "previous_response_not_found") from None  # fmt: skip
    messages = state.traces.messages(stored["node"])
    messages = [m for m in messages if m.name not in DIRECTIVES]
    if messages[0].role == "system":
        messages[0] = replace(messages[0], tools=())
        if stored["response"]["instructions"] or not messages[0].content:
            del messages[0]
    return messages


def _messages(items: Sequence[Item]) -> list[Message]:
    """Items of one assistant turn (thought, text, calls) become one message."""
    out: list[Message] = []
    turn = Message("assistant")
    for n, item in enumerate(items):
        where = f"input[{n}]"
        if item.type == "reasoning":
            if turn.content or turn.tool_calls:
                out, turn = [*out, turn], Message("assistant")
            turn = replace(turn, reasoning=turn.reasoning + (_text(item.content) or _text(item.summary)))
        elif item.type == "message" and item.role == "assistant":
            if turn.content or turn.tool_calls:
                out, turn = [*out, turn], Message("assistant")
            turn = replace(turn, content=_text(item.content, f"{where}.content"))
        elif item.type == "function_call":
            if not item.call_id or not item.name:
                raise invalid_request("a function_call needs call_id and name", where)
            call = wire.parse_call(item.call_id, item.name, item.arguments or "{}", f"{where}.arguments")
            turn = replace(turn, tool_calls=(*turn.tool_calls, call))
        else:
            if turn != Message("assistant"):
                out, turn = [*out, turn], Message("assistant")
            out.append(_input(item, where))
    return out if turn == Message("assistant") else [*out, turn]


def _input(item: Item, where: str) -> Message:
    if item.type == "function_call_output":
        if not item.call_id:
            raise invalid_request("a function_call_output needs call_id", f"{where}.call_id")
        return Message("tool", _text(item.output, f"{where}.output"), tool_call_id=item.call_id)
    if item.type != "message":
        raise invalid_request(f"items of type {item.type!r} are not taken here", f"{where}.type")
    if item.role not in ROLES:
        raise invalid_request(f"{item.role!r} is no role; use one of {', '.join(ROLES)}", f"{where}.role")
    return Message("user" if item.role == "user" else "system", _text(item.content, f"{where}.content"))


def _text(content: str | list[Part] | None, where: str = "") -> str:
    if isinstance(content, str):
        return content
    for n, part in enumerate(content or ()):
        if part.text is None and part.refusal is None:
            raise invalid_request(f"this model reads text; it cannot take {part.type!r}", f"{where}[{n}]")
    return "".join(part.text or part.refusal or "" for part in content or ())


def _tool_choice(given: str | dict[str, Any] | None) -> str:
    if given is None or given in ("auto", "none", "required"):
        return given or "auto"
    if isinstance(given, dict) and given.get("type") == "function" and isinstance(given.get("name"), str):
        return given["name"]
    if isinstance(given, dict) and given.get("type") == "allowed_tools" and given.get("mode") in ("auto", "required"):
        return given["mode"]
    raise invalid_request("tool_choice must be auto, none, required or name a function", "tool_choice")


def usage(used: Usage) -> dict[str, Any]:
    return {
        "input_tokens": used.prompt_tokens,
        "input_tokens_details": {"cached_tokens": used.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": used.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": used.reasoning_tokens},
        "total_tokens": used.prompt_tokens + used.completion_tokens,
        "cost_nano_usd": used.nano_usd,
    }


def input_docs(request: ResponsesRequest) -> list[dict[str, Any]]:
    """The input as items with ids, for those who list it later."""
    given = request.input
    items = [Item(role="user", content=given or "")] if not isinstance(given, list) else given
    docs = []
    for n, item in enumerate(items):
        doc = {k: v for k, v in msgspec.to_builtins(item).items() if v is not None}
        if item.type == "message":
            kind = "output_text" if item.role == "assistant" else "input_text"
            text = _text(item.content)
            part = {"type": kind, "text": text, **({"annotations": []} if kind == "output_text" else {})}
            doc |= {"content": [part], "status": "completed"}
        docs.append({"id": f"item_{n}", **doc})
    return docs


class Responses:
    """See `endpoint.Translation`."""

    anthropic = False
    keep_alive = wire.COMMENT

    def __init__(self, state: ServiceState, key: Key, request: Request | None, body: bytes) -> None:
        self._state, self._key = state, key
        self.request: ResponsesRequest = wire.decode(body, _decoder)
        self.ask = read(state, key, self.request, is_lenient(state, request))

    def begin(self, turn: Turn) -> None:
        self._id = "resp_" + turn.request_id.removeprefix("req_")
        self._created = int(time.time())
        self._writer = Writer(turn.request_id.removeprefix("req_"), self.response("in_progress"))

    def whole(self, ended: Sequence[Ended], bill: Bill) -> dict[str, Any]:
        self._writer.say([*_pieces(ended[0]), ended[0]])
        return self._finished(ended[0], bill)

    def say(self, events: Sequence[Event]) -> bytes:
        out = self._writer.say(events)
        if isinstance(events[-1], Bill):
            end = next(event for event in events if isinstance(event, Ended))
            out += self._writer.finish(self._finished(end, events[-1])) + wire.DONE
        return out

    def fail(self, error: ApiError) -> bytes:
        """The typed failure, and last the event whose `error` the official clients raise."""
        charged = usage(error.bill.usage) if error.bill else None
        failed = self.response("failed", error={"code": _failure_code(error), "message": error.message}, usage=charged)
        return self._writer.finish(failed, "response.failed") + wire.event(error.body())

    def _finished(self, end: Ended, bill: Bill) -> dict[str, Any]:
        cut = end.finish_reason == "length"
        response = self.response(
            "incomplete" if cut else "completed",
            output=self._writer.items,
            usage=usage(bill.usage),
            incomplete_details={"reason": "max_output_tokens"} if cut else None,
            completed_at=None if cut else int(time.time()),
            trace={"node": bill.nodes[0]},
        )
        if self.request.store is not False:
            doc = {"id": self._id, "node": bill.nodes[0], "response": response, "input": input_docs(self.request)}
            self._state.objects.put(KIND, self._key.customer, doc)
        return response

    def response(self, status: str, **changes: Any) -> dict[str, Any]:
        request = self.request
        text = request.text or TextConfig()
        form = text.format or Format()
        shown = {"type": form.type}
        if form.type == "json_schema":
            shown |= {"name": form.name, "schema": form.schema, "strict": form.strict is not False}
            shown["description"] = form.description
        reasoning = request.reasoning or Reasoning()
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "completed_at": None,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "instructions": request.instructions,
            "model": self.ask.model,
            "output": [],
            "previous_response_id": request.previous_response_id,
            "tools": [_tool_doc(tool) for tool in request.tools or () if tool.type == "function"],
            "tool_choice": request.tool_choice or "auto",
            "parallel_tool_calls": self.ask.parallel_tools,
            "max_output_tokens": request.max_output_tokens,
            "max_tool_calls": request.max_tool_calls,
            "temperature": self.ask.params.temperature,
            "top_p": self.ask.params.top_p,
            "presence_penalty": 0,
            "frequency_penalty": 0,
            "top_logprobs": request.top_logprobs or 0,
            "text": {"format": shown, "verbosity": text.verbosity or "medium"},
            "reasoning": {"effort": reasoning.effort, "summary": reasoning.summary},
            "truncation": request.truncation or "disabled",
            "store": request.store is not False,
            "background": bool(request.background),
            "service_tier": "default",
            "metadata": request.metadata or {},
            "safety_identifier": request.safety_identifier,
            "prompt_cache_key": request.prompt_cache_key,
            "user": request.user,
            "usage": None,
            **changes,
        }


def _failure_code(error: ApiError) -> str:
    """The words by which clients decide whether to try again."""
    if error.kind == "exceeded_current_quota_error":
        return "insufficient_quota"
    return "rate_limit_exceeded" if error.status == 429 else "server_error"


def _tool_doc(tool: Tool) -> dict[str, Any]:
    return {
        "type": "function", "name": tool.name, "description": tool.description,
        "parameters": tool.parameters or {"type": "object"}, "strict": tool.strict is not False,
    }  # fmt: skip


def _pieces(end: Ended) -> list[Event]:
    message = end.message
    pieces = [Piece(0, "reasoning", message.reasoning)] if message.reasoning else []
    if message.content:
        pieces.append(Piece(0, "content", message.content, tokens=end.tokens))
    for n, call in enumerate(message.tool_calls):
        pieces += [Piece(0, "call", call.name, n, call.id), Piece(0, "arguments", wire.to_json(call.arguments), n)]
    return pieces
