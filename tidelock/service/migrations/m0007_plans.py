"""Plans, who has one, who waits for one, and how much of a pocket may be spent within a window of time."""

from __future__ import annotations

from typing import Any

from tidelock.service.migrations import script

KINDS = "'cash', 'extra', 'plan', 'voucher', 'held', 'revenue', 'fees', 'breakage', 'refunds', 'outside', 'contra', 'receivable'"

# SQLite cannot change a constraint: the table is made anew.
SQLITE = f"""
CREATE TABLE accounts_next (
    customer TEXT NOT NULL REFERENCES customers (customer),
    kind TEXT NOT NULL CHECK (kind IN ({KINDS})),
    lot TEXT NOT NULL,
    expires DOUBLE PRECISION,
    balance_nano BIGINT NOT NULL,
    PRIMARY KEY (customer, kind, lot),
    CONSTRAINT balance_nano_not_negative CHECK (kind IN ('outside', 'contra', 'receivable') OR balance_nano >= 0)
);
INSERT INTO accounts_next SELECT customer, kind, lot, expires, balance_nano FROM accounts;
DROP TABLE accounts;
ALTER TABLE accounts_next RENAME TO accounts;
"""
POSTGRES = f"""
ALTER TABLE accounts DROP CONSTRAINT accounts_kind_check;
ALTER TABLE accounts ADD CONSTRAINT accounts_kind_check CHECK (kind IN ({KINDS}));
"""

SCHEMA = """
CREATE TABLE plans (
    name TEXT PRIMARY KEY,
    price_nano BIGINT NOT NULL CHECK (price_nano >= 0),      -- a month
    credits_nano BIGINT NOT NULL CHECK (credits_nano > 0),   -- a month
    five_hours_nano BIGINT CHECK (five_hours_nano > 0),      -- of credits, at most
    week_nano BIGINT CHECK (week_nano > 0),
    seats BIGINT NOT NULL,
    sold BIGINT NOT NULL,
    CONSTRAINT never_oversold CHECK (sold BETWEEN 0 AND seats)
);
CREATE TABLE subscriptions (
    id TEXT PRIMARY KEY,
    customer TEXT NOT NULL REFERENCES customers (customer),
    plan TEXT NOT NULL REFERENCES plans (name),
    next_plan TEXT NOT NULL,   -- from the next period on, its seat already taken; '' for the same
    cancelled BIGINT NOT NULL, -- 1: ends with the period
    anchor DOUBLE PRECISION NOT NULL,  -- periods begin at its monthly anniversaries
    period BIGINT NOT NULL,
    grants BIGINT NOT NULL,    -- allocations so far
    state TEXT NOT NULL CHECK (state IN ('active', 'ended', 'lapsed'))
);
CREATE UNIQUE INDEX one_plan_each ON subscriptions (customer) WHERE state = 'active';
CREATE TABLE plan_queue (
    plan TEXT NOT NULL REFERENCES plans (name),
    customer TEXT NOT NULL REFERENCES customers (customer),
    created DOUBLE PRECISION NOT NULL,
    PRIMARY KEY (plan, customer)
);
CREATE TABLE allowances (
    customer TEXT NOT NULL,
    pocket TEXT NOT NULL CHECK (pocket IN ('plan', 'extra')),
    span TEXT NOT NULL CHECK (span IN ('5h', '7d', 'month')),
    limit_nano BIGINT NOT NULL CHECK (limit_nano >= 0),
    anchor DOUBLE PRECISION NOT NULL,
    started DOUBLE PRECISION NOT NULL,
    ends DOUBLE PRECISION NOT NULL,
    used_nano BIGINT NOT NULL CHECK (used_nano >= 0),
    PRIMARY KEY (customer, pocket, span)
);
"""


def up(tx: Any, backend: Any) -> None:
    script(tx, SQLITE if backend.name == "sqlite" else POSTGRES)
    script(tx, SCHEMA)
