"""How long a request was in the engine's own line, in its prompt and in its answer, as the engine says."""

from __future__ import annotations

from typing import Any

from tidelock.service.migrations import script

SCHEMA = """
-- milliseconds; NULL: the engine does not tell
ALTER TABLE usage ADD COLUMN queue_ms BIGINT;
ALTER TABLE usage ADD COLUMN prefill_ms BIGINT;
ALTER TABLE usage ADD COLUMN decode_ms BIGINT;
"""


def up(tx: Any, backend: Any) -> None:
    script(tx, SCHEMA)
