"""The first release's schema, SQLite only. A new PostgreSQL database starts with the next step."""

from __future__ import annotations

import sqlite3
from typing import Any

SCRIPT = """
CREATE TABLE accounts (
    id INTEGER PRIMARY KEY,
    kind TEXT NOT NULL CHECK (kind IN ('cash', 'revenue', 'wallet', 'held')),
    customer TEXT NOT NULL,
    -- projection of SUM(entries.nano_usd), kept by the trigger below; only the cash boundary may be negative
    balance_nano INTEGER NOT NULL DEFAULT 0 CHECK (kind = 'cash' OR balance_nano >= 0),
    UNIQUE (kind, customer)
);
INSERT INTO accounts (id, kind, customer) VALUES (1, 'cash', ''), (2, 'revenue', '');

CREATE TABLE transactions (
    id INTEGER PRIMARY KEY,
    kind TEXT NOT NULL CHECK (kind IN ('topup', 'hold', 'settle', 'release')),
    reference TEXT NOT NULL,  -- request id, or the payment's id for a top-up
    created REAL NOT NULL,
    UNIQUE (kind, reference)
);
CREATE TABLE entries (
    id INTEGER PRIMARY KEY,
    transaction_id INTEGER NOT NULL REFERENCES transactions (id),
    account_id INTEGER NOT NULL REFERENCES accounts (id),
    nano_usd INTEGER NOT NULL CHECK (typeof(nano_usd) = 'integer')
);
CREATE INDEX entries_by_transaction ON entries (transaction_id);
CREATE TRIGGER entry_moves_balance AFTER INSERT ON entries BEGIN
    UPDATE accounts SET balance_nano = balance_nano + NEW.nano_usd WHERE id = NEW.account_id;
END;
CREATE TRIGGER entries_never_change BEFORE UPDATE ON entries BEGIN
    SELECT RAISE(ABORT, 'ledger entries are append-only');
END;
CREATE TRIGGER entries_never_leave BEFORE DELETE ON entries BEGIN
    SELECT RAISE(ABORT, 'ledger entries are append-only');
END;

CREATE TABLE holds (
    request_id TEXT PRIMARY KEY,
    customer TEXT NOT NULL,
    key_id TEXT NOT NULL,
    model TEXT NOT NULL,
    price_version TEXT NOT NULL,
    prompt_tokens INTEGER NOT NULL CHECK (prompt_tokens >= 0),
    max_tokens INTEGER NOT NULL CHECK (max_tokens >= 1),
    nano_usd INTEGER NOT NULL CHECK (nano_usd >= 0),
    state TEXT NOT NULL DEFAULT 'open' CHECK (state IN ('open', 'settled', 'released')),
    created REAL NOT NULL,
    expires REAL NOT NULL
);
CREATE INDEX open_holds ON holds (expires) WHERE state = 'open';

CREATE TABLE usage (
    request_id TEXT PRIMARY KEY REFERENCES holds (request_id),
    customer TEXT NOT NULL,
    key_id TEXT NOT NULL,
    model TEXT NOT NULL,
    price_version TEXT NOT NULL,
    prompt_tokens INTEGER NOT NULL,
    cached_tokens INTEGER NOT NULL CHECK (cached_tokens BETWEEN 0 AND prompt_tokens),
    completion_tokens INTEGER NOT NULL CHECK (completion_tokens >= 0),
    nano_usd INTEGER NOT NULL CHECK (nano_usd >= 0),
    finish_reason TEXT NOT NULL,
    created REAL NOT NULL
);

CREATE TABLE keys (
    id TEXT PRIMARY KEY,
    hash TEXT NOT NULL UNIQUE,
    hint TEXT NOT NULL,
    customer TEXT NOT NULL,
    name TEXT NOT NULL,
    role TEXT NOT NULL CHECK (role IN ('user', 'admin')),
    training_consent INTEGER NOT NULL,
    may_grant INTEGER NOT NULL,
    created REAL NOT NULL,
    revoked REAL
);

CREATE TABLE prices (
    version TEXT NOT NULL,
    model TEXT NOT NULL,
    input_nano INTEGER NOT NULL,
    cached_input_nano INTEGER NOT NULL,
    output_nano INTEGER NOT NULL,
    PRIMARY KEY (version, model)
);
"""


def up(tx: Any, backend: Any) -> None:
    if backend.name != "sqlite":
        return
    statement = ""
    for line in SCRIPT.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            tx(statement)
            statement = ""
