"""System messages that steer how a model answers: how much to think, whether to call tools, in what form to reply.

K3 puts the effort after the tool declaration, where it is part of the conversation, and the other two after the last
message: they are of one request, and the next one does not repeat them (`Trace.elsewhere` says what follows from that).
The effort's text is K3's (model reference, section 6.7). The texts of the other two are our own: the reference names the
messages but does not quote them. The K2 line has no such messages: there they are system messages under their name, as its
templates write any other role.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from .errors import UserError
from .message import Message

EFFORTS = ("low", "medium", "high", "max")
EFFORT = (
    "`thinking_effort` guides on how much to think in your thinking channel (not including the response channel), "
    "supported values include `low`, `medium`, `high`, and `max`.\nNow the system is invoked with `thinking_effort={}`."
)
TOOL_CHOICES = {"required": "This turn must call at least one tool.", "none": "This turn must not call any tool."}
NAMED_TOOL = "This turn must call the tool `{}` and no other."
JSON_OBJECT = "The response of this turn must be one JSON object and nothing else."
SCHEMA = " It must match this JSON Schema:\n\n```json\n{}\n```"

OF_ONE_REQUEST = ("tool-choice", "response-format")
NAMED = re.compile(re.escape(NAMED_TOOL).replace(r"\{\}", "(.*)"), re.DOTALL)
FITTING = re.compile(re.escape(JSON_OBJECT + SCHEMA).replace(r"\{\}", "(.*)"), re.DOTALL)


def thinking_effort(level: str) -> Message:
    """Raises UserError for a level that is none of `EFFORTS`."""
    if level not in EFFORTS:
        raise UserError(f"unknown thinking effort {level!r}; choose one of {', '.join(EFFORTS)}")
    return Message("system", EFFORT.format(level), name="thinking-effort")


def tool_choice(choice: str) -> Message:
    """`choice`: "required", "none", or the name of the tool to call."""
    return Message("system", TOOL_CHOICES.get(choice) or NAMED_TOOL.format(choice), name="tool-choice")


def response_format(schema: dict[str, Any] | None = None) -> Message:
    """The reply is to be a JSON object, of `schema` if one is given."""
    if schema is None:
        return Message("system", JSON_OBJECT, name="response-format")
    text = json.dumps(schema, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return Message("system", JSON_OBJECT + SCHEMA.format(text), name="response-format")


def is_of_one_request(message: Message) -> bool:
    return message.role == "system" and message.name in OF_ONE_REQUEST


def as_parameters(messages: Iterable[Message]) -> dict[str, Any]:
    """What these directives of one request say as `tool_choice` and `response_format` of the Chat Completions API."""
    choices = {text: choice for choice, text in TOOL_CHOICES.items()}
    out: dict[str, Any] = {}
    for message in messages:
        if message.name == "tool-choice":
            if (choice := choices.get(message.content)) is not None:
                out["tool_choice"] = choice
            elif named := NAMED.fullmatch(message.content):
                out["tool_choice"] = {"type": "function", "function": {"name": named[1]}}
        elif message.name == "response-format":
            said = FITTING.fullmatch(message.content)
            fitting = {"name": "answer", "strict": True, "schema": json.loads(said[1])} if said else None
            out["response_format"] = {"type": "json_schema", "json_schema": fitting} if said else {"type": "json_object"}
    return out
