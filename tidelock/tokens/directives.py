"""System messages that steer how a model answers: how much to think, whether to call tools, in what form to reply.

They are messages like any other, so they stay where they were said and a conversation stays prefix-stable. K3 puts the
effort after the tool declaration and the other two after the last message. The effort's text is K3's (model reference,
section 6.7). The other two texts are our own: the reference names the messages but does not quote them.
"""

from __future__ import annotations

from typing import Any

from . import jsontext
from .errors import UserError
from .message import Message

EFFORTS = ("low", "medium", "high", "max")
EFFORT = (
    "`thinking_effort` guides on how much to think in your thinking channel (not including the response channel), "
    "supported values include `low`, `medium`, `high`, and `max`.\nNow the system is invoked with `thinking_effort={}`."
)
TOOL_CHOICES = {"required": "This turn must call at least one tool.", "none": "This turn must not call any tool."}


def thinking_effort(level: str) -> Message:
    """Raises UserError for a level that is none of `EFFORTS`."""
    if level not in EFFORTS:
        raise UserError(f"unknown thinking effort {level!r}; choose one of {', '.join(EFFORTS)}")
    return Message("system", EFFORT.format(level), name="thinking-effort")


def tool_choice(choice: str) -> Message:
    """Raises UserError for a choice that is none of `TOOL_CHOICES`."""
    if choice not in TOOL_CHOICES:
        raise UserError(f"unknown tool choice {choice!r}; choose one of {', '.join(TOOL_CHOICES)}")
    return Message("system", TOOL_CHOICES[choice], name="tool-choice")


def response_format(schema: dict[str, Any] | None = None) -> Message:
    """The reply is to be a JSON object, of `schema` if one is given."""
    text = "The response of this turn must be one JSON object and nothing else."
    if schema is not None:
        text += f" It must match this JSON Schema:\n\n```json\n{jsontext.dump(schema)}\n```"
    return Message("system", text, name="response-format")
