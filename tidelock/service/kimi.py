"""Kimi's rules for a chat request, beyond the types of its fields: what it refuses, fixes and lets win.

`lenient` is for clients written against other APIs: parameters that Kimi fixes are honoured, and names it does not
know are let through.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tidelock.service import mfjs
from tidelock.service.ask import ANY_TOOL_NAME, MAX_CHOICES, TOOL_NAME
from tidelock.service.errors import invalid_request
from tidelock.tokens.directives import EFFORTS

if TYPE_CHECKING:
    from tidelock.service.surfaces.chat_request import ChatRequest, Tool, WireMessage

TEMPERATURES = (0.0, 0.6, 1.0)  # greedy, the default without thinking, the default with it
TOP_P = 0.95
DEFAULT_EFFORT = "max"
FORMATS = ("text", "json_object", "json_schema")


def check(request: ChatRequest, lenient: bool) -> None:
    """Raises a 400 that names the field."""
    _check_ranges(request)
    if not lenient:
        _check_fixed(request)
        _check_messages(request.messages)
    _check_partial(request.messages)
    _check_thinking(request, lenient)
    _check_format(request, lenient)
    _check_tools(request, lenient)


def temperature(request: ChatRequest, lenient: bool) -> float:
    if request.temperature is not None:
        return request.temperature
    return 1.0 if lenient or thinks(request, lenient) else 0.6


def top_p(request: ChatRequest, lenient: bool) -> float:
    return (1.0 if lenient else TOP_P) if request.top_p is None else request.top_p


def thinks(request: ChatRequest, lenient: bool) -> bool:
    if request.thinking is not None and request.thinking.type is not None:
        return request.thinking.type == "enabled"
    return not (lenient and request.reasoning_effort == "none")


def effort(request: ChatRequest) -> str | None:
    """`thinking.effort` wins; `reasoning_effort` counts where it is absent. Unknown words are ignored, as Kimi does.

    Who switches thinking on in Kimi's own words and names no effort gets Kimi's default. Of a request that does not
    speak of thinking nothing is made up: the model thinks as it was trained to.
    """
    given = request.thinking
    stated = given.effort if given is not None else None
    stated = request.reasoning_effort if stated is None else stated
    if stated in EFFORTS:
        return stated
    return DEFAULT_EFFORT if given is not None and given.type != "disabled" else None


RANGES = {
    "temperature": (0, 2), "top_p": (0, 1), "n": (1, MAX_CHOICES), "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2), "top_logprobs": (0, 20),
}  # fmt: skip
FIXED = {"temperature": TEMPERATURES, "top_p": (TOP_P,), "n": (1,), "presence_penalty": (0,), "frequency_penalty": (0,)}


def _check_ranges(request: ChatRequest) -> None:
    for field, (low, high) in RANGES.items():
        value = getattr(request, field)
        if value is not None and not low <= value <= high:
            raise invalid_request(f"{field} must be between {low} and {high}, got {value:g}", field)
    if request.top_p == 0:
        raise invalid_request("top_p must be above 0", "top_p")
    if request.top_logprobs and not request.logprobs:
        raise invalid_request("top_logprobs needs logprobs: true", "top_logprobs")


def _check_fixed(request: ChatRequest) -> None:
    """Models of the K series fix how they are sampled; only the fixed values may be said."""
    for field, allowed in FIXED.items():
        value = getattr(request, field)
        if value is not None and value not in allowed:
            words = " or ".join(f"{a:g}" for a in allowed)
            raise invalid_request(f"{field} is fixed for this model: only {words} is allowed, got {value:g}", field)
    for field in ("max_tokens", "max_completion_tokens"):
        if getattr(request, field) == 0:
            raise invalid_request(f"{field} must be at least 1", field)


def _check_messages(messages: list[WireMessage]) -> None:
    for n, message in enumerate(messages):
        said = message.text or message.tool_calls or message.tools or message.reasoning_content or message.partial
        if not said and message.role != "tool":
            raise invalid_request(f"the message at position {n} with role {message.role!r} must not be empty",
                                  f"messages[{n}].content")  # fmt: skip
    if messages[-1].role == "assistant" and not messages[-1].partial:
        raise invalid_request("the last message must not be the assistant's, unless it is `partial`", "messages")


def _check_partial(messages: list[WireMessage]) -> None:
    for n, message in enumerate(messages):
        if message.partial and (message.role != "assistant" or n != len(messages) - 1 or message.tool_calls):
            raise invalid_request("only the last message may be partial: an assistant's, without tool calls",
                                  f"messages[{n}].partial")  # fmt: skip


def _check_thinking(request: ChatRequest, lenient: bool) -> None:
    if request.thinking is not None and thinks(request, lenient) and request.thinking.keep not in (None, "all"):
        raise invalid_request('thinking.keep must be "all"', "thinking.keep")


def _check_format(request: ChatRequest, lenient: bool) -> None:
    given = request.response_format
    if given is None:
        return
    if given.type not in FORMATS:
        raise invalid_request(f"response_format.type must be one of {', '.join(FORMATS)}", "response_format.type")
    if given.type != "json_schema":
        return
    if given.json_schema is None:
        raise invalid_request("response_format needs json_schema", "response_format.json_schema")
    if not given.json_schema.name:
        raise invalid_request("a schema needs a name", "response_format.json_schema.name")
    if given.json_schema.schema is None:
        raise invalid_request("response_format needs a schema", "response_format.json_schema.schema")
    if given.json_schema.strict is not False and not lenient:
        _check_mfjs(given.json_schema.schema, "response_format.json_schema.schema")


def _check_tools(request: ChatRequest, lenient: bool) -> None:
    for n, tool in enumerate(request.tools or ()):
        _check_tool(tool, f"tools[{n}]", lenient)
    for m, message in enumerate(request.messages):
        if message.tools is None:
            continue
        where = f"messages[{m}]"
        if message.role not in ("system", "developer"):
            raise invalid_request("only a system message may declare tools", f"{where}.tools")
        if message.text and message.tools:
            raise invalid_request("a system message has either content or tools", f"{where}.content")
        for n, tool in enumerate(message.tools):
            _check_tool(tool, f"{where}.tools[{n}]", lenient)


def _check_tool(tool: Tool, where: str, lenient: bool) -> None:
    name = tool.function.name
    if tool.type == "builtin_function":
        allowed = name.startswith("$") and TOOL_NAME.fullmatch(name[1:])
    else:
        allowed = (ANY_TOOL_NAME if lenient else TOOL_NAME).fullmatch(name)
    if not allowed:
        raise invalid_request(f"{name!r} is no tool name: {TOOL_NAME.pattern}", f"{where}.function.name")
    if tool.function.strict and not lenient:
        _check_mfjs(tool.function.parameters, f"{where}.function.parameters")


def _check_mfjs(schema: dict, where: str) -> None:
    fault = mfjs.fault(schema)
    if fault is not None:
        raise invalid_request(f"the schema is not Moonshot-flavored JSON Schema: {fault}", where)
