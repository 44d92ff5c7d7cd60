"""What clients store with the service, and the queue of their batches."""

from __future__ import annotations

from typing import Any

from tidelock.service.migrations import script

SCHEMA = """
CREATE TABLE objects (
    id TEXT PRIMARY KEY,
    kind TEXT NOT NULL,
    customer TEXT NOT NULL,
    created_us BIGINT NOT NULL,
    body TEXT NOT NULL
);
CREATE INDEX objects_of_customer ON objects (kind, customer, created_us);
CREATE TABLE batch_queue (
    id TEXT PRIMARY KEY,
    customer TEXT NOT NULL,
    key_id TEXT NOT NULL,
    created_us BIGINT NOT NULL,
    lease_us BIGINT NOT NULL  -- until when somebody works on it
);
"""


def up(tx: Any, backend: Any) -> None:
    script(tx, SCHEMA)
