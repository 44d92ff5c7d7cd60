"""Responses that run without their client, and the events of those that are streamed."""

from __future__ import annotations

from typing import Any

from tidelock.service.migrations import script

SCHEMA = """
CREATE TABLE background (
    id TEXT PRIMARY KEY,          -- of the response, whose document is among the objects
    customer TEXT NOT NULL,
    request_id TEXT NOT NULL,
    worker TEXT NOT NULL,         -- who runs it
    streamed BIGINT NOT NULL,     -- 1: its events are kept
    cancelled BIGINT NOT NULL,    -- 1: its client does not want it any more
    ended DOUBLE PRECISION        -- seconds since 1970; NULL: it runs
);
CREATE INDEX running_background ON background (worker) WHERE ended IS NULL;
CREATE TABLE background_events (
    id TEXT NOT NULL,
    first BIGINT NOT NULL,        -- sequence number of the first event
    events BIGINT NOT NULL,       -- how many
    body TEXT NOT NULL,           -- as they are sent
    PRIMARY KEY (id, first)
);
"""


def up(tx: Any, backend: Any) -> None:
    script(tx, SCHEMA)
