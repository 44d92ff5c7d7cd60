"""The tools of all families. Runs inside the sandbox worker, so it knows nothing but the standard library and the
sandbox's word for a wrong call.
"""

from __future__ import annotations

import ast
import operator
from typing import Any

from tidelock.sandbox.toolset import ToolFault

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}

# (from, to) -> factor; both directions of a pair where the result stays whole are listed by `convert`.
UNITS = {
    ("km", "m"): 1000, ("m", "cm"): 100, ("cm", "mm"): 10, ("kg", "g"): 1000,
    ("weeks", "days"): 7, ("days", "hours"): 24, ("hours", "minutes"): 60, ("minutes", "seconds"): 60,
}  # fmt: skip


def evaluate(expression: str) -> int:
    """Integers with + - * and parentheses; nothing else."""

    def value(node: ast.expr) -> int:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return node.value
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](value(node.left), value(node.right))
        raise ToolFault(f"cannot evaluate {expression!r}")

    if len(expression) > 200:
        raise ToolFault("expression too long")
    try:
        return value(ast.parse(expression, mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ToolFault(f"cannot evaluate {expression!r}") from None


def _entry(table: dict[str, Any], key: Any, what: str) -> Any:
    if not isinstance(key, str) or key not in table:
        raise ToolFault(f"no such {what}: {key}")
    return table[key]


def _whole(value: Any) -> int:
    """A whole number, given as one or spelled as one."""
    try:
        if isinstance(value, bool):
            raise ValueError
        return int(value)
    except (TypeError, ValueError):
        raise ToolFault(f"not a whole number: {value}") from None


def calculator(world: dict, expression: Any) -> str:
    return str(evaluate(str(expression)))


def get(world: dict, key: Any) -> str:
    return str(_entry(world.get("store", {}), key, "key"))


def follow(world: dict, node: Any) -> str:
    return str(_entry(world.get("graph", {}), node, "node"))


def read(world: dict, record: Any) -> str:
    return str(_entry(world.get("records", {}), record, "record"))


def write(world: dict, record: Any, value: Any) -> str:
    _entry(world.get("records", {}), record, "record")
    world["records"][record] = _whole(value)
    return "ok"


def convert(world: dict, value: Any, unit: Any, to: Any) -> str:
    if not isinstance(unit, str) or not isinstance(to, str) or (unit, to) not in UNITS:
        raise ToolFault(f"cannot convert {unit} to {to}")
    return str(_whole(value) * UNITS[unit, to])


FUNCTIONS = {f.__name__: f for f in (calculator, get, follow, read, write, convert)}


class FamilyTools:
    def call(self, world: dict[str, Any], name: str, arguments: dict[str, Any]) -> str:
        if name not in FUNCTIONS:
            raise ToolFault(f"no such tool: {name}")
        try:
            return FUNCTIONS[name](world, **arguments)
        except TypeError:
            raise ToolFault(f"wrong arguments for {name}: {', '.join(arguments) or 'none'}") from None


TOOLSET = FamilyTools()
