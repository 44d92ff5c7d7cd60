"""What each periodic reconciliation found; messages to webhooks, kept until they are delivered."""

from __future__ import annotations

from typing import Any

from tidelock.service.migrations import script

SCHEMA = """
CREATE TABLE reconciliations (
    slot BIGINT NOT NULL,   -- which period of time it was due in: who writes the row does the work
    part TEXT NOT NULL,     -- 'books', or the worker whose traces were compared
    started DOUBLE PRECISION NOT NULL,
    finished DOUBLE PRECISION,
    discrepancies BIGINT NOT NULL,
    missing BIGINT NOT NULL,
    drift_nano BIGINT NOT NULL,
    report TEXT NOT NULL,   -- JSON
    PRIMARY KEY (slot, part)
);
CREATE TABLE webhooks (
    customer TEXT PRIMARY KEY,  -- '' for the operator's own
    url TEXT NOT NULL,
    secret TEXT NOT NULL,       -- what we sign with
    created DOUBLE PRECISION NOT NULL
);
CREATE TABLE notices (
    id TEXT PRIMARY KEY,
    customer TEXT NOT NULL,
    kind TEXT NOT NULL,
    body TEXT NOT NULL,         -- as it is sent, JSON
    attempts BIGINT NOT NULL,
    due DOUBLE PRECISION NOT NULL,
    created DOUBLE PRECISION NOT NULL,
    delivered DOUBLE PRECISION
);
CREATE INDEX notices_to_send ON notices (due) WHERE delivered IS NULL;
"""


def up(tx: Any, backend: Any) -> None:
    script(tx, SCHEMA)
