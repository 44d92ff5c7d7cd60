"""What an answer is held to while it is sampled: a JSON Schema, a call of a tool, or no call. The engine does the holding,
and the model is told of it, so that it need not be held against what it was about to say.

A free answer (tool_choice "auto", no format) is not held to anything: its calls are the model's own.
"""

from __future__ import annotations

import functools
import json
from typing import Any

from tidelock.service.ask import Ask
from tidelock.service.errors import invalid_request
from tidelock.tokens.directives import response_format, tool_choice
from tidelock.tokens.errors import UserError
from tidelock.tokens.message import Message, ToolSpec
from tidelock.tokens.policy import Constraint
from tidelock.tokens.template import Template

ANY_OBJECT = {"type": "object"}


def held(ask: Ask) -> bool:
    return ask.schema is not None or ask.tool_choice != "auto" and bool(ask.tools)


def _terms(ask: Ask) -> tuple[str, dict[str, Any] | None]:
    """(tool choice, schema), each as far as it holds: a format is for an answer, so with one there is to be no call unless a
    call is required; and then there is no answer to have a format."""
    if ask.schema is not None and (ask.tool_choice in ("auto", "none") or not ask.tools):
        return "none", ask.schema
    return ask.tool_choice, None


def told(ask: Ask) -> tuple[Message, ...]:
    """What the model is told after the last message. It is of this request alone."""
    if not held(ask):
        return ()
    choice, schema = _terms(ask)
    out = [tool_choice(choice)] if ask.tools else []
    if schema is not None:
        out.append(response_format(None if schema == ANY_OBJECT else schema))
    return tuple(out)


def constraint(template: Template, ask: Ask) -> Constraint | None:
    """Raises a 400 for a schema that cannot be held to."""
    if not held(ask):
        return None
    if ask.opening is not None:
        raise invalid_request("a partial answer cannot be held to a format or a tool", "messages")
    choice, schema = _terms(ask)
    tools = () if choice == "none" else ask.tools
    content = None if schema is None else json.dumps(schema)
    declared = json.dumps([[t.name, t.parameters] for t in tools])
    try:
        return _built(template, declared, choice, content, ask.thinking, ask.parallel_tools)
    except UserError as error:
        raise invalid_request(f"the schema cannot be used: {error}", "tools" if tools else "response_format") from error


@functools.lru_cache(maxsize=256)
def _built(template: Template, tools: str, choice: str, content: str | None, thinking: bool, parallel: bool) -> Constraint:
    specs = [ToolSpec(name, "", parameters) for name, parameters in json.loads(tools)]
    answer = None if content is None else Constraint("json_schema", content)
    return template.constraint(specs, choice, answer, thinking=thinking, parallel=parallel)
