"""How the tools are declared to the model: short, because every episode pays for them."""

from __future__ import annotations

from tidelock.tokens.message import ToolSpec


def _spec(name: str, description: str, **parameters: str) -> ToolSpec:
    properties = {key: {"type": kind} for key, kind in parameters.items()}
    return ToolSpec(name, description, {"type": "object", "properties": properties, "required": list(parameters)})


CALCULATOR = _spec("calculator", "Evaluate an expression.", expression="string")
GET = _spec("get", "Value of a key.", key="string")
FOLLOW = _spec("follow", "Next node.", node="string")
READ = _spec("read", "Read a record.", record="string")
WRITE = _spec("write", "Write a record.", record="string", value="string")
CONVERT = _spec("convert", "Convert units.", value="string", unit="string", to="string")
