"""The Responses API's tools: those that the model is told of, and which of them it may or must call.

Tools that only their vendor can run (web search and the like) are not offered to the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from tidelock.service.errors import invalid_request
from tidelock.service.surfaces import custom_tools
from tidelock.service.surfaces.custom_tools import TextFormat
from tidelock.tokens.message import ToolSpec


class Tool(msgspec.Struct, gc=False):
    type: str
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    format: TextFormat | None = None


def offered(tools: Sequence[Tool], choice: str | dict[str, Any] | None, lenient: bool) -> list[ToolSpec]:
    """The tools as the model hears of them: of those that `allowed_tools` leaves out, not at all."""
    allowed = None
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        allowed = {tool.get("name") for tool in choice.get("tools") or () if isinstance(tool, dict)}
    specs = [_spec(tool, f"tools[{n}]", lenient) for n, tool in enumerate(tools) if tool.type in ("function", "custom")]
    return [spec for spec in specs if allowed is None or spec.name in allowed]


def _spec(tool: Tool, where: str, lenient: bool) -> ToolSpec:
    if tool.type == "custom":
        return custom_tools.spec(tool.name or "", tool.description or "", tool.format, where, lenient)
    return ToolSpec(tool.name or "", tool.description or "", tool.parameters or {"type": "object"})


def custom_names(tools: Sequence[Tool]) -> frozenset[str]:
    return frozenset(tool.name or "" for tool in tools if tool.type == "custom")


def docs(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """As an answer repeats them."""
    return [_doc(tool) for tool in tools if tool.type in ("function", "custom")]


def _doc(tool: Tool) -> dict[str, Any]:
    if tool.type == "custom":
        form = msgspec.to_builtins(tool.format or TextFormat())
        shown = {"description": tool.description} if tool.description is not None else {}
        return {"type": "custom", "name": tool.name, "format": {k: v for k, v in form.items() if v is not None}, **shown}
    return {
        "type": "function", "name": tool.name, "description": tool.description,
        "parameters": tool.parameters or {"type": "object"}, "strict": tool.strict is not False,
    }  # fmt: skip


def tool_choice(given: str | dict[str, Any] | None) -> str:
    """"auto", "none", "required" or a name. Raises a 400."""
    if given is None or given in ("auto", "none", "required"):
        return given or "auto"
    kind = given.get("type") if isinstance(given, dict) else None
    if kind in ("function", "custom") and isinstance(given.get("name"), str):
        return given["name"]
    if kind == "allowed_tools" and given.get("mode") in ("auto", "required"):
        return given["mode"]
    raise invalid_request("tool_choice must be auto, none, required or name a tool", "tool_choice")
