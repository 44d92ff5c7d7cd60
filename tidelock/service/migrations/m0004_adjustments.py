"""What re-rating added to or took off a bill: rows beside the usage, which itself never changes."""

from __future__ import annotations

from typing import Any

from tidelock.service.migrations import script

SCHEMA = """
CREATE TABLE adjustments (
    request_id TEXT NOT NULL REFERENCES usage (request_id),
    price_version TEXT NOT NULL,  -- what the request now costs is what this version says
    customer TEXT NOT NULL REFERENCES customers (customer),
    nano_usd BIGINT NOT NULL,     -- charged more (or, negative, given back) than before this row
    created DOUBLE PRECISION NOT NULL,
    PRIMARY KEY (request_id, price_version)
);
"""


def up(tx: Any, backend: Any) -> None:
    script(tx, SCHEMA)
    for statement in backend.append_only("adjustments"):
        tx(statement)
