"""What the payment provider has said, what was booked of it, and invoices."""

from __future__ import annotations

from typing import Any

from tidelock.service.migrations import script

SCHEMA = """
CREATE TABLE payments (
    id TEXT PRIMARY KEY,          -- the provider's, or the reference of one booked by hand
    customer TEXT NOT NULL,       -- '' until the payment itself is heard of
    pocket TEXT NOT NULL CHECK (pocket IN ('cash', 'extra')),
    net_nano BIGINT NOT NULL CHECK (net_nano >= 0),  -- what is credited
    tax_nano BIGINT NOT NULL CHECK (tax_nano >= 0),
    refunded_nano BIGINT NOT NULL, -- of both, as last said
    disputes TEXT NOT NULL,        -- JSON {id: [nano, status]}, as last said
    taken_nano BIGINT NOT NULL CHECK (taken_nano >= 0),  -- of both, booked back because of those
    steps BIGINT NOT NULL,
    created DOUBLE PRECISION NOT NULL
);
CREATE INDEX payments_of_customer ON payments (customer, created);
CREATE TABLE payment_events (
    id TEXT PRIMARY KEY,
    type TEXT NOT NULL,
    payment TEXT NOT NULL,  -- '' for an event that means nothing to us
    digest TEXT NOT NULL,
    received DOUBLE PRECISION NOT NULL
);
CREATE TABLE invoices (
    id TEXT PRIMARY KEY,
    customer TEXT NOT NULL,
    number BIGINT NOT NULL,  -- 1, 2, 3 of this customer, without a gap
    kind TEXT NOT NULL CHECK (kind IN ('topup', 'credit', 'usage')),
    reference TEXT NOT NULL,
    net_nano BIGINT NOT NULL,
    tax_nano BIGINT NOT NULL,
    total_nano BIGINT NOT NULL,
    currency TEXT NOT NULL,
    billed_to TEXT NOT NULL,
    tax_id TEXT NOT NULL,
    lines TEXT NOT NULL,     -- JSON
    created DOUBLE PRECISION NOT NULL,
    UNIQUE (customer, number),
    UNIQUE (kind, reference),
    CHECK (net_nano + tax_nano = total_nano)
);
ALTER TABLE organizations ADD COLUMN tax_bps BIGINT NOT NULL DEFAULT 0 CHECK (tax_bps BETWEEN 0 AND 10000);
ALTER TABLE organizations ADD COLUMN tax_id TEXT NOT NULL DEFAULT '';
"""


def up(tx: Any, backend: Any) -> None:
    script(tx, SCHEMA)
    for table in ("payment_events", "invoices"):
        for statement in backend.append_only(table):
            tx(statement)
