"""What an answer is held to while it is sampled: a JSON Schema, a call of a tool, or no call. The engine does the holding.

A free answer (tool_choice "auto", no format) is not held to anything: its calls are the model's own.
"""

from __future__ import annotations

import functools
import json

from tidelock.service.ask import Ask
from tidelock.service.errors import invalid_request
from tidelock.tokens.errors import UserError
from tidelock.tokens.message import ToolSpec
from tidelock.tokens.policy import Constraint
from tidelock.tokens.template import Template


def held(ask: Ask) -> bool:
    return ask.schema is not None or ask.tool_choice != "auto" and bool(ask.tools)


def constraint(template: Template, ask: Ask) -> Constraint | None:
    """Raises a 400 for a schema that cannot be held to."""
    if not held(ask):
        return None
    if ask.opening is not None:
        raise invalid_request("a partial answer cannot be held to a format or a tool", "messages")
    choice, tools = ask.tool_choice, ask.tools
    if ask.schema is not None and choice == "auto":
        choice, tools = "none", ()  # the format is for an answer, so there has to be one
    content = json.dumps(ask.schema) if ask.schema is not None else None
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
