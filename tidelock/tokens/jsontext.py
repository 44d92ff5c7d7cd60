"""JSON as templates write and read it: compact when written, strict when read.

What a model samples must never crash a reader later, so whatever could not be written again (NaN, infinities, lone
surrogates, bottomless nesting) is refused on the way in.
"""

from __future__ import annotations

import json
from typing import Any

MAX_NESTING = 100  # far above any real argument, far below where Python's own encoder gives up


def dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def load(text: str) -> Any:
    """The value of `text`. Raises ValueError, and nothing else, unless `dump` can write it back as valid UTF-8 JSON."""
    try:
        value = json.loads(text)
        if _nesting(value) > MAX_NESTING:
            raise ValueError(f"nested deeper than {MAX_NESTING}")
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value


def _nesting(value: Any) -> int:
    depth, level = 0, [value]
    while level := [inner for outer in level for inner in _inside(outer)]:
        depth += 1
    return depth


def _inside(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []
