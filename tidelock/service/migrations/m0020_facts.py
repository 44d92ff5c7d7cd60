"""What the founder's analytics need and the books do not know: who bills a customer in which currency, what money and
machines cost, which plans were sold for which time, what was refused, and how long each model computed."""

from __future__ import annotations

from typing import Any

from tidelock.service.migrations import script

SCHEMA = """
CREATE TABLE billing (
    customer TEXT PRIMARY KEY REFERENCES customers (customer),
    entity TEXT NOT NULL,   -- the company of ours that bills them
    currency TEXT NOT NULL
);
CREATE TABLE fx_rates (
    month TEXT NOT NULL,        -- UTC, like 2026-03
    currency TEXT NOT NULL,
    -- nano-USD for one unit of the currency; the bound keeps (rate * rate) within 64 bits
    nano_usd BIGINT NOT NULL CHECK (nano_usd BETWEEN 1 AND 3000000000),
    PRIMARY KEY (month, currency)
);
CREATE TABLE plan_terms (
    reference TEXT PRIMARY KEY,  -- the payment's id
    customer TEXT NOT NULL REFERENCES customers (customer),
    plan TEXT NOT NULL,
    starts DOUBLE PRECISION NOT NULL,
    ends DOUBLE PRECISION NOT NULL,
    months BIGINT NOT NULL CHECK (months >= 1),
    price_nano BIGINT NOT NULL CHECK (price_nano >= 0),  -- for the whole term, without tax
    CHECK (starts < ends)
);
CREATE TABLE refusals (
    hour BIGINT NOT NULL,   -- its first second since 1970
    model TEXT NOT NULL,
    cause TEXT NOT NULL,
    requests BIGINT NOT NULL CHECK (requests >= 1),
    PRIMARY KEY (hour, model, cause)
);
CREATE TABLE compute (
    hour BIGINT NOT NULL,
    model TEXT NOT NULL,
    milliseconds BIGINT NOT NULL CHECK (milliseconds >= 0),  -- during which the model had requests in it, over all workers
    PRIMARY KEY (hour, model)
);
CREATE TABLE compute_rates (
    model TEXT NOT NULL,
    starts DOUBLE PRECISION NOT NULL,  -- in force until the next one's start
    nano_usd BIGINT NOT NULL CHECK (nano_usd >= 0),  -- for a second of one worker
    PRIMARY KEY (model, starts)
);
"""


def up(tx: Any, backend: Any) -> None:
    script(tx, SCHEMA)
