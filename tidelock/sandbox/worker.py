"""The confined process: imports one toolset and answers calls, JSON lines in and out.

Confinement comes before the toolset is imported. Worlds live here, one per session; nothing is shared between sessions.
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

from .level import confine, verify
from .toolset import ToolFault


def answer(toolset: Any, worlds: dict[str, dict], request: dict[str, Any]) -> dict[str, Any]:
    session = request["session"]
    if request["op"] == "open":
        worlds[session] = request["world"]
        return {}
    if request["op"] == "close":
        return {"world": worlds.pop(session, None)}
    try:
        content = toolset.call(worlds[session], request["name"], request["arguments"])
        return {"content": str(content), "ok": True}
    except ToolFault as fault:
        return {"content": f"error: {fault}", "ok": False}


def main() -> None:
    where, workspace = sys.argv[1], sys.argv[2]
    out = sys.stdout
    sys.stdout = sys.stderr  # a tool's print must not break the protocol
    level = verify(confine([workspace]), workspace)
    module, _, attribute = where.partition(":")
    toolset = getattr(importlib.import_module(module), attribute)
    worlds: dict[str, dict] = {}
    print(json.dumps({"level": level}), file=out, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        reply = answer(toolset, worlds, request)
        print(json.dumps({"id": request["id"], **reply}), file=out, flush=True)


if __name__ == "__main__":
    main()
