"""Tools whose input is text and no JSON, as the Responses API has them: to the model functions of one string.

Of the formats such a tool may ask for, free text and a regular expression are held to; a grammar of another syntax is only
told to the model, and only on a lenient server.
"""

from __future__ import annotations

import json
import re
from typing import Any

import msgspec

from tidelock.service.errors import invalid_request
from tidelock.tokens.message import ToolCall, ToolSpec

INPUT = "input"  # the one argument
# As much of a cut text as is whole: an escape or a surrogate that lacks its end is left out.
UNIT = r"\\u[0-9a-fA-F]{4}"
WHOLE = rf'[^"\\]|\\["\\/bfnrt]|(?!\\u[dD][89abAB]){UNIT}|{UNIT}{UNIT}'
CUT = re.compile(rf'\s*\{{\s*"{INPUT}"\s*:\s*"((?:{WHOLE})*)')


class TextFormat(msgspec.Struct, gc=False):
    type: str = "text"
    syntax: str | None = None
    definition: str | None = None


def spec(name: str, description: str, form: TextFormat | None, where: str, lenient: bool) -> ToolSpec:
    """Raises a 400 for a format that nothing here can hold an answer to."""
    form = form or TextFormat()
    text: dict[str, Any] = {"type": "string"}
    if form.type == "grammar" and form.syntax == "regex":
        text["pattern"] = f"^(?:{form.definition or ''})$"
    elif form.type == "grammar" and lenient:
        description = f"{description}\n\n`{INPUT}` follows this {form.syntax} grammar:\n{form.definition or ''}".strip()
    elif form.type != "text":
        raise invalid_request(f"a format of type {form.type} ({form.syntax}) is not held to here", f"{where}.format")
    parameters = {"type": "object", "properties": {INPUT: text}, "required": [INPUT], "additionalProperties": False}
    return ToolSpec(name, description, parameters)


def call(call_id: str, name: str, text: str) -> ToolCall:
    return ToolCall(call_id, name, {INPUT: text})


def text_of(arguments: str) -> str:
    """The text that is in a call's arguments, cut or whole; all of them, if the model did not keep to the one argument."""
    try:
        whole = json.loads(arguments)
    except ValueError:
        begun = CUT.match(arguments)
        return json.loads(f'"{begun[1]}"', strict=False) if begun else ""
    found = whole.get(INPUT) if isinstance(whole, dict) else None
    return found if isinstance(found, str) else arguments
