"""What was metered is as append-only as what was paid for it: usage rows can be neither changed nor removed."""

from __future__ import annotations

from typing import Any


def up(tx: Any, backend: Any) -> None:
    for statement in backend.append_only("usage"):
        tx(statement)
