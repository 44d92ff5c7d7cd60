"""What a receipt says beside the money: how long a request took, which were refused and why, and when a key was last used."""

from __future__ import annotations

from typing import Any

from tidelock.service.migrations import script

SCHEMA = """
-- milliseconds from arrival until the model was asked, its first token came, the bill was written; NULL: nobody measured
ALTER TABLE usage ADD COLUMN wait_ms BIGINT;
ALTER TABLE usage ADD COLUMN first_ms BIGINT;
ALTER TABLE usage ADD COLUMN total_ms BIGINT;
ALTER TABLE keys ADD COLUMN last_used DOUBLE PRECISION;
CREATE TABLE refused (
    request_id TEXT PRIMARY KEY,
    customer TEXT NOT NULL,
    key_id TEXT NOT NULL,
    model TEXT NOT NULL,
    cause TEXT NOT NULL,
    status BIGINT NOT NULL,  -- of the HTTP answer
    message TEXT NOT NULL,   -- of limits and balances only: never a word of what was asked
    created DOUBLE PRECISION NOT NULL
);
CREATE INDEX refused_of_customer ON refused (customer, created);
"""


def up(tx: Any, backend: Any) -> None:
    script(tx, SCHEMA)
