"""The service's one SQLite file: keys, prices, holds, usage and the double-entry ledger.

What must never happen is written into the schema, so no caller can get it wrong: entries cannot be changed or
removed, and a wallet cannot go below zero. The statements that move money live in `ledger`.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tidelock.tokens.errors import UserError

MIGRATIONS = (
    """
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
    """,
    """
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
    """,
)


class Database:
    """One connection, usable from any thread; other processes may open the same file (SQLite serialises writers)."""

    def __init__(self, path: str | Path) -> None:
        """Opens or creates the file and brings its schema up to date. Raises UserError if it is no such database."""
        self._lock = threading.RLock()
        try:
            self._connection = sqlite3.connect(path, timeout=30, isolation_level=None, check_same_thread=False)
            self._connection.row_factory = sqlite3.Row
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = FULL")  # a commit that was answered survives power loss
            self._connection.execute("PRAGMA foreign_keys = ON")
            self._migrate()
        except sqlite3.Error as error:
            raise UserError(f"cannot open the service database {path}: {error}") from error

    def _migrate(self) -> None:
        with self.transaction() as write:
            write("CREATE TABLE IF NOT EXISTS migrations (version INTEGER PRIMARY KEY)")
            done = write("SELECT COALESCE(MAX(version), 0) FROM migrations").fetchone()[0]
            if done > len(MIGRATIONS):
                raise UserError(f"the service database is of a newer version ({done}) than this program knows")
            for version, script in enumerate(MIGRATIONS[done:], start=done + 1):
                for statement in _statements(script):
                    write(statement)
                write("INSERT INTO migrations VALUES (?)", (version,))

    @contextmanager
    def transaction(self) -> Iterator[Any]:
        """Yields `execute(sql, args)`; everything in the block commits together or not at all."""
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection.execute
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")

    def read(self, sql: str, args: Sequence[Any] = ()) -> list[sqlite3.Row]:
        with self._lock:
            return self._connection.execute(sql, args).fetchall()

    def close(self) -> None:
        with self._lock:
            self._connection.close()


def _statements(script: str) -> Iterator[str]:
    """Splits a script at its statement ends; `executescript` would commit the transaction we are in."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""
