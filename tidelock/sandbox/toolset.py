"""What tool code and its host agree on."""

from __future__ import annotations

from typing import Any, Protocol


class ToolFault(Exception):
    """The call was wrong (unknown tool, bad argument, missing key). The model is told; nothing else happens."""


class SandboxError(Exception):
    """The sandbox itself cannot do what was asked of it."""


class Toolset(Protocol):
    """Tools over a world: plain JSON data that a call may change in place."""

    def call(self, world: dict[str, Any], name: str, arguments: dict[str, Any]) -> str:
        """The result as text. Raises ToolFault for a call that makes no sense."""
        ...
