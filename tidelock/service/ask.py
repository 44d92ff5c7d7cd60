"""The one internal request. Every surface turns its own wire format into an `Ask`; nothing behind it knows which.

The checks here are those that hold on every surface: the order of messages, tool declarations, the limits.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from tidelock.service.errors import invalid_request
from tidelock.tokens.directives import EFFORTS, thinking_effort
from tidelock.tokens.message import Message, ToolSpec
from tidelock.tokens.policy import SamplingParams
from tidelock.tokens.template import canonical

MAX_TOOLS = 128
MAX_MESSAGES, MAX_CALLS = 10_000, 1000  # of a request; calls of one message
MAX_CHOICES = 5
MAX_STOPS, MAX_STOP_BYTES = 5, 32
TOOL_NAME = re.compile(r"[a-zA-Z_][a-zA-Z0-9_-]{2,63}")  # Kimi's rule
ANY_TOOL_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,128}")  # what other APIs take
SESSION, SANDBOX, CONSENT = "session_id", "sandbox_level", "training_consent"  # in a request's metadata


class Origin(Struct, frozen=True, gc=False):
    """Where a request belongs in the trace and what may be done with it; from its metadata, on every surface."""

    session: str = "default"
    sandbox: str = "unknown"
    consent: bool | None = None  # None: the request says nothing

    @staticmethod
    def of(metadata: dict[str, Any] | None) -> Origin:
        metadata = metadata or {}
        stated = metadata.get(CONSENT)
        if stated not in (None, "true", "false"):
            raise invalid_request(f'metadata.{CONSENT} must be "true" or "false"', f"metadata.{CONSENT}")
        session, sandbox = str(metadata.get(SESSION, "default")), str(metadata.get(SANDBOX, "unknown"))
        return Origin(session, sandbox, None if stated is None else stated == "true")


class Ask(Struct, frozen=True, dict=True):
    """A validated request.

    messages: canonical, tools declared in their system messages. opening: what the answer must start with (Kimi's
    `partial`, Anthropic's prefill). params: sampling; its `max_tokens` and `constraint` are filled in when it runs.
    tool_choice: "auto" | "none" | "required" | the name of the one tool to call. schema: JSON Schema of the answer.
    """

    model: str  # as the client spelled it
    messages: tuple[Message, ...]
    params: SamplingParams
    max_tokens: int | None = None
    to_fit: bool = False  # more than the context has room for is taken as the room there is, and not refused
    n: int = 1
    stream: bool = False
    apart: bool = False  # not answered here and now: its surface says how (see `endpoint.Translation.detach`)
    logprobs: bool = False
    thinking: bool = True
    effort: str | None = None
    tool_choice: str = "auto"
    parallel_tools: bool = True
    schema: dict[str, Any] | None = None
    opening: Message | None = None
    origin: Origin = Origin()

    @cached_property
    def tools(self) -> tuple[ToolSpec, ...]:
        return tuple(tool for message in self.messages for tool in message.tools)


def conversation(
    messages: Sequence[Message], tools: Sequence[ToolSpec], effort: str | None, where: str = "messages"
) -> tuple[Message, ...]:
    """The messages in their canonical form, led by the global tools and, if it is stated, the effort to think with.
    Raises a 400 that names what is out of order."""
    _check_order(messages, where)
    check_tool_names([*tools, *(tool for message in messages for tool in message.tools)])
    out = list(messages)
    if tools and out and out[0].role == "system" and not out[0].tools:
        out[0] = replace(out[0], tools=tuple(tools))
    elif tools:
        out = [Message("system", tools=tuple(tools)), *out]
    if effort in EFFORTS:
        out.insert(1 if tools else 0, thinking_effort(effort))
    return tuple(canonical(out))


def check_tool_names(tools: Sequence[ToolSpec]) -> None:
    names = [tool.name for tool in tools]
    if len(names) > MAX_TOOLS:
        raise invalid_request(f"at most {MAX_TOOLS} tools, got {len(names)}", "tools")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise invalid_request(f"tool names repeat: {', '.join(twice)}", "tools")


def check_tool_choice(choice: str, tools: Sequence[ToolSpec]) -> None:
    if choice in ("auto", "none"):
        return
    if not tools:
        raise invalid_request(f"tool_choice {choice!r} needs tools", "tool_choice")
    if choice != "required" and choice not in {tool.name for tool in tools}:
        raise invalid_request(f"tool_choice names {choice!r}, which is not among the tools", "tool_choice")


def stop_strings(given: str | Sequence[str] | None, field: str = "stop") -> tuple[str, ...]:
    stops = (given,) if isinstance(given, str) else tuple(given or ())
    if len(stops) > MAX_STOPS:
        raise invalid_request(f"at most {MAX_STOPS} stop strings, got {len(stops)}", field)
    for stop in stops:
        if not 0 < len(stop.encode("utf-8", "replace")) <= MAX_STOP_BYTES:
            raise invalid_request(f"a stop string has 1 to {MAX_STOP_BYTES} bytes", field)
    return stops


def _check_order(messages: Sequence[Message], where: str) -> None:
    """Every tool result answers a call of the assistant message before it, once."""
    open_calls: set[str] = set()
    if len(messages) > MAX_MESSAGES:
        raise invalid_request(f"at most {MAX_MESSAGES} messages, got {len(messages)}", where)
    for n, message in enumerate(messages):
        if message.role == "tool":
            if not message.tool_call_id:
                raise invalid_request("a tool message needs tool_call_id", f"{where}[{n}].tool_call_id")
            if message.tool_call_id not in open_calls:
                reason = f"{message.tool_call_id!r} answers no open call of the assistant message before it"
                raise invalid_request(reason, f"{where}[{n}].tool_call_id")
            open_calls.remove(message.tool_call_id)
            continue
        if open_calls:
            reason = f"tool calls {sorted(open_calls)} have no result before this message"
            raise invalid_request(reason, f"{where}[{n}]")
        ids = [call.id for call in message.tool_calls]
        if len(ids) > MAX_CALLS:
            raise invalid_request(f"at most {MAX_CALLS} tool calls in a message, got {len(ids)}", f"{where}[{n}].tool_calls")
        if len(set(ids)) != len(ids):
            raise invalid_request("tool call ids repeat", f"{where}[{n}].tool_calls")
        open_calls = set(ids)
    if open_calls:
        raise invalid_request(f"tool calls {sorted(open_calls)} have no result", where)
