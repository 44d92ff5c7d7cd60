"""What recognising a plan's fee over its term needs: the term as it was sold, in whole seconds, and what of its price was
credited to another plan when that took its place."""

from __future__ import annotations

from math import floor
from typing import Any

from tidelock.service.migrations import script

SCHEMA = """
ALTER TABLE plan_terms ADD COLUMN begins_s BIGINT NOT NULL DEFAULT 0;
-- where it was to end when it was sold, and where it did, if earlier
ALTER TABLE plan_terms ADD COLUMN planned_s BIGINT NOT NULL DEFAULT 0;
ALTER TABLE plan_terms ADD COLUMN cut_s BIGINT;
ALTER TABLE plan_terms ADD COLUMN credited_nano BIGINT NOT NULL DEFAULT 0;
"""


def up(tx: Any, backend: Any) -> None:
    script(tx, SCHEMA)
    for reference, starts, ends in tx("SELECT reference, starts, ends FROM plan_terms").fetchall():
        tx("UPDATE plan_terms SET begins_s = ?, planned_s = ? WHERE reference = ?", (floor(starts), floor(ends), reference))
