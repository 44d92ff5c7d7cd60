"""How much of the service an organisation, a project or a key may use, and how much of that it has just used."""

from __future__ import annotations

from typing import Any

from tidelock.service.migrations import script

SCHEMA = """
CREATE TABLE settings (
    name TEXT PRIMARY KEY,
    value TEXT NOT NULL  -- JSON
);
CREATE TABLE caps (
    customer TEXT NOT NULL,
    scope TEXT NOT NULL,  -- '' for the organisation, else a project's or a key's id
    tier BIGINT,          -- of the ladder, whatever was recharged
    concurrency BIGINT CHECK (concurrency >= 0),
    requests BIGINT CHECK (requests >= 0),  -- a minute
    tokens BIGINT CHECK (tokens >= 0),      -- a minute
    day_tokens BIGINT CHECK (day_tokens >= 0),
    PRIMARY KEY (customer, scope)
);
CREATE TABLE limit_use (
    customer TEXT NOT NULL,
    scope TEXT NOT NULL,
    requests BIGINT NOT NULL CHECK (requests >= 0),  -- each times the milliseconds of its period
    tokens BIGINT NOT NULL CHECK (tokens >= 0),
    day_tokens BIGINT NOT NULL CHECK (day_tokens >= 0),
    at_ms BIGINT NOT NULL,
    PRIMARY KEY (customer, scope)
);
ALTER TABLE holds ADD COLUMN project TEXT NOT NULL DEFAULT '';
ALTER TABLE holds ADD COLUMN reserved TEXT NOT NULL DEFAULT '';
"""


def up(tx: Any, backend: Any) -> None:
    script(tx, SCHEMA)
