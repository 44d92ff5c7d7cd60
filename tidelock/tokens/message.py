"""The words of a conversation: messages, tool declarations, tool calls.

Plain frozen data; how they become token ids is the template's business (`xtml`, `chatml`).
"""

from __future__ import annotations

from typing import Any, Literal

from msgspec import Struct

Role = Literal["system", "user", "assistant", "tool"]
# Names a system message may have: what such a message steers (see `directives`).
DIRECTIVES = ("thinking-effort", "tool-choice", "response-format")


class ToolSpec(Struct, frozen=True, gc=False):
    """A tool as the model sees it. `parameters` is a JSON Schema object."""

    name: str
    description: str
    parameters: dict[str, Any]

    def openai(self) -> dict[str, Any]:
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": function}


class ToolCall(Struct, frozen=True, gc=False):
    """One call. `arguments` is the parsed JSON object; `id` is `functions.{name}:{n}`, where n counts every
    call of the conversation from 0 (K2 report, App. B), so it can be re-derived from the position alone."""

    id: str
    name: str
    arguments: dict[str, Any]


class Message(Struct, frozen=True, dict=True):
    """One message.

    system: `content`; one may carry `tools` (the first: the tool set of the conversation; a later one adds to it) or
    be named after one of `DIRECTIVES`.
    user: `content`.
    assistant: `reasoning` ("" = thought nothing), `content`, `tool_calls`.
    tool: `content` = the result, `tool_call_id`, `name` of the tool.

    `verbatim` holds the exact sampled ids of an assistant message whenever rendering its text would give other
    ids (malformed output, a cut turn, a non-canonical split). Templates then emit those ids as they are: text that
    was sampled is never re-tokenised.
    """

    role: Role
    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None
    tools: tuple[ToolSpec, ...] = ()
    verbatim: tuple[int, ...] | None = None
