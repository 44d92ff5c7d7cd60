"""What recognising a plan's fee over its term needs: the term as it was sold, in whole seconds, and what of its price was
credited to another plan when that took its place. And
terms of a year, several seats, top-ups that happen by themselves, and budgets."""

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
CREATE TABLE auto_topups (
    customer TEXT PRIMARY KEY REFERENCES customers (customer),
    below_nano BIGINT NOT NULL CHECK (below_nano > 0),
    charge_nano BIGINT NOT NULL CHECK (charge_nano > 0),
    per_day BIGINT NOT NULL CHECK (per_day > 0),
    month_nano BIGINT NOT NULL CHECK (month_nano >= charge_nano),
    method TEXT NOT NULL,      -- whom the provider charges
    active BIGINT NOT NULL CHECK (active IN (0, 1)),
    failures BIGINT NOT NULL,  -- in a row
    created DOUBLE PRECISION NOT NULL
);
CREATE TABLE auto_charges (
    id TEXT PRIMARY KEY,       -- what makes asking twice one charge
    customer TEXT NOT NULL REFERENCES customers (customer),
    nano_usd BIGINT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('due', 'asked', 'paid', 'failed')),
    attempts BIGINT NOT NULL,
    due DOUBLE PRECISION NOT NULL,
    payment TEXT NOT NULL,     -- the provider's id, once known
    error TEXT NOT NULL,
    created DOUBLE PRECISION NOT NULL
);
CREATE UNIQUE INDEX one_charge_at_a_time ON auto_charges (customer) WHERE state IN ('due', 'asked');
CREATE INDEX auto_charges_of_customer ON auto_charges (customer, created);
CREATE TABLE budgets (
    customer TEXT NOT NULL REFERENCES customers (customer),
    scope TEXT NOT NULL,       -- '' for the organisation, else a project's or a key's id
    soft_nano BIGINT CHECK (soft_nano > 0),   -- a month (UTC): who crosses it is told
    hard_nano BIGINT CHECK (hard_nano >= 0),  -- nothing is begun beyond it
    month BIGINT NOT NULL,     -- the one that spent_nano is of, counted from year 0
    spent_nano BIGINT NOT NULL CHECK (spent_nano >= 0),
    held_nano BIGINT NOT NULL CHECK (held_nano >= 0),  -- by requests that run
    told BIGINT NOT NULL,      -- bits: the soft one was told of, the hard one was
    PRIMARY KEY (customer, scope)
);
ALTER TABLE holds ADD COLUMN budgets TEXT NOT NULL DEFAULT '';
"""


def up(tx: Any, backend: Any) -> None:
    script(tx, SCHEMA)
    for reference, starts, ends in tx("SELECT reference, starts, ends FROM plan_terms").fetchall():
        tx("UPDATE plan_terms SET begins_s = ?, planned_s = ? WHERE reference = ?", (floor(starts), floor(ends), reference))
