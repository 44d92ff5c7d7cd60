"""What recognising a plan's fee over its term needs: the term as it was sold, in whole seconds, and what of its price was
credited to another plan when that took its place. And
terms of a year, and several seats."""

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
-- a term of 1 or 12 months, and from how many to how many seats one customer has
ALTER TABLE plans ADD COLUMN months BIGINT NOT NULL DEFAULT 1;
ALTER TABLE plans ADD COLUMN least BIGINT NOT NULL DEFAULT 1;
ALTER TABLE plans ADD COLUMN most BIGINT NOT NULL DEFAULT 1;
ALTER TABLE subscriptions ADD COLUMN quantity BIGINT NOT NULL DEFAULT 1;
ALTER TABLE subscriptions ADD COLUMN next_quantity BIGINT NOT NULL DEFAULT 0;
ALTER TABLE subscriptions ADD COLUMN months BIGINT NOT NULL DEFAULT 1;
ALTER TABLE subscriptions ADD COLUMN term BIGINT NOT NULL DEFAULT 0;
UPDATE subscriptions SET term = period;
UPDATE subscriptions SET next_quantity = 1 WHERE next_plan <> '';
"""


def up(tx: Any, backend: Any) -> None:
    script(tx, SCHEMA)
    for reference, starts, ends in tx("SELECT reference, starts, ends FROM plan_terms").fetchall():
        tx("UPDATE plan_terms SET begins_s = ?, planned_s = ? WHERE reference = ?", (floor(starts), floor(ends), reference))
