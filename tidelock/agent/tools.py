"""The product agent's own tools: files and commands in a workspace, and a calculator.

Runs in the confined tool worker, whose working directory is the workspace.
"""

from __future__ import annotations

import ast
import operator
import subprocess
from pathlib import Path
from typing import Any

from tidelock.sandbox.toolset import ToolFault
from tidelock.tokens.message import ToolSpec

TOOLSET_NAME = "tidelock.agent.tools:TOOLSET"
LIMIT = 20_000  # characters of a result
COMMAND_TIMEOUT_S = 20


def _spec(name: str, description: str, **parameters: str) -> ToolSpec:
    properties = {key: {"type": "string", "description": text} if text else {"type": "string"} for key, text in parameters.items()}
    return ToolSpec(name, description, {"type": "object", "properties": properties, "required": list(parameters)})


GROUPS = {
    "calculator": (_spec("calculator", "Evaluate an expression.", expression=""),),
    "files": (
        _spec("read_file", "Read a text file of the workspace.", path="relative path"),
        _spec("write_file", "Write a text file in the workspace.", path="relative path", content="the whole new content"),
        _spec("list_files", "List the files under a directory of the workspace.", path="relative path, . for all"),
    ),
    "shell": (_spec("run", "Run a shell command in the workspace.", command="as for sh -c"),),
}

OPERATORS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
}  # fmt: skip


def calculator(expression: str) -> str:
    def value(node: ast.expr) -> float:
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            return node.value
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -value(node.operand)
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](value(node.left), value(node.right))
        raise ToolFault(f"cannot evaluate {expression!r}")

    try:
        return str(value(ast.parse(expression, mode="eval").body))
    except (SyntaxError, ValueError, ArithmeticError, RecursionError):
        raise ToolFault(f"cannot evaluate {expression!r}") from None


def _inside(path: str) -> Path:
    root = Path.cwd().resolve()
    full = (root / path).resolve()
    if not full.is_relative_to(root):
        raise ToolFault(f"{path} is outside the workspace")
    return full


def read_file(path: str) -> str:
    return _inside(path).read_text(errors="replace")


def write_file(path: str, content: str) -> str:
    full = _inside(path)
    full.parent.mkdir(parents=True, exist_ok=True)
    full.write_text(content)
    return f"wrote {len(content)} characters to {path}"


def list_files(path: str = ".") -> str:
    root = Path.cwd().resolve()
    files = sorted(str(p.relative_to(root)) for p in _inside(path).rglob("*") if p.is_file())
    return "\n".join(files) or "no files"


def run(command: str) -> str:
    """Inherits the worker's confinement."""
    try:
        done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, errors="replace",
                              timeout=COMMAND_TIMEOUT_S, stdin=subprocess.DEVNULL)  # fmt: skip
    except subprocess.TimeoutExpired:
        raise ToolFault(f"the command did not finish within {COMMAND_TIMEOUT_S} s") from None
    output = done.stdout + done.stderr
    return output if done.returncode == 0 else f"{output}\nexit code {done.returncode}".strip()


FUNCTIONS = {f.__name__: f for f in (calculator, read_file, write_file, list_files, run)}


class WorkspaceTools:
    def call(self, world: dict[str, Any], name: str, arguments: dict[str, Any]) -> str:
        if name not in FUNCTIONS:
            raise ToolFault(f"no such tool: {name}")
        try:
            result = FUNCTIONS[name](**arguments)
        except TypeError:
            raise ToolFault(f"wrong arguments for {name}: {', '.join(arguments) or 'none'}") from None
        except OSError as e:
            raise ToolFault(str(e)) from None
        return result if len(result) <= LIMIT else result[:LIMIT] + "\n... (cut)"


TOOLSET = WorkspaceTools()
