"""An organisation can be suspended: its keys are refused and its clocks stand still until that is lifted."""

from __future__ import annotations

from typing import Any

from tidelock.service.migrations import script

SCHEMA = """
-- since when (NULL: it is not), and why, as its keys are told
ALTER TABLE organizations ADD COLUMN suspended DOUBLE PRECISION;
ALTER TABLE organizations ADD COLUMN suspended_for TEXT NOT NULL DEFAULT '';
"""


def up(tx: Any, backend: Any) -> None:
    script(tx, SCHEMA)
