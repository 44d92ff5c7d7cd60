"""The SQLite half of the dialect seam: WAL, one writing connection, one for reading beside it.

`synchronous = FULL`: a commit that was answered survives power loss. Many money operations share one commit
(`till.py`), so this costs little.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from functools import lru_cache
from itertools import chain
from typing import Any, NoReturn

from tidelock.service.db import Conflict, StorageDown


CACHE_KIB = 64 << 10  # of pages, for each connection; SQLite's own 2 MiB are read again and again once the books outgrow them
CHECKPOINT_PAGES = 4000  # of the log before they are written where they belong: the busy ones are, once for many changes


class Sqlite:
    name = "sqlite"
    writers = 1
    list_tables = "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'"

    def __init__(self, path: str) -> None:
        self._path = path
        self.write_lock, self._read_lock = threading.RLock(), threading.RLock()
        with _errors():
            self._writer, self._durable = self._connect(), True
            self._reader = self._writer
            if path == ":memory:":
                self._read_lock = self.write_lock
            else:
                self._writer.execute("PRAGMA journal_mode = WAL")
                self._reader = self._connect()
                self._reader.execute("PRAGMA query_only = ON")

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self._path, timeout=30, isolation_level=None, check_same_thread=False, cached_statements=1024
        )
        connection.row_factory = sqlite3.Row
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
        connection.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
        connection.execute("PRAGMA foreign_keys = ON")
        return connection

    def transaction(self, durable: bool = True) -> _Writing:
        return _Writing(self, durable)

    migration = transaction  # BEGIN IMMEDIATE already keeps every other writer out

    def begin(self, durable: bool) -> sqlite3.Connection:
        """With the write lock held."""
        if durable is not self._durable:  # in WAL mode NORMAL leaves out nothing but the flush at the end
            self._writer.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            self._durable = durable
        self._writer.execute("BEGIN IMMEDIATE")
        return self._writer

    def read(self, sql: str, args: Sequence[Any]) -> list[sqlite3.Row]:
        with self._read_lock, _errors():
            return self._reader.execute(sql, args).fetchall()

    @contextmanager
    def snapshot(self) -> Iterator[_Transaction]:
        """On a connection of its own, so that a long look at the books (audit, backup, analytics) keeps nobody waiting."""
        if self._path == ":memory:":
            with self._read_lock, _errors():
                yield from _frozen(self._reader)
            return
        with _errors(), closing(self._connect()) as connection:
            connection.execute("PRAGMA query_only = ON")
            yield from _frozen(connection)

    def oldest(self, table: str, most: int) -> str:
        return f"(SELECT * FROM {table} ORDER BY rowid LIMIT {most})"

    def append_only(self, table: str) -> list[str]:
        return [
            f"CREATE TRIGGER {table}_{verb}_never BEFORE {verb} ON {table} "
            f"BEGIN SELECT RAISE(ABORT, '{table} is append-only'); END"
            for verb in ("update", "delete")
        ]

    def close(self) -> None:
        with self.write_lock, self._read_lock:
            self._reader.close()
            self._writer.close()


def _frozen(connection: sqlite3.Connection) -> Iterator[_Transaction]:
    connection.execute("BEGIN")
    try:
        yield _Transaction(connection)
    finally:
        connection.execute("COMMIT")


class _Writing:
    """A transaction that writes, as a statement: `contextmanager` would be three generators deep, twice a request."""

    def __init__(self, backend: Sqlite, durable: bool) -> None:
        self._backend, self._durable = backend, durable

    def __enter__(self) -> _Transaction:
        self._backend.write_lock.acquire()
        try:
            self._connection = self._backend.begin(self._durable)
        except BaseException as error:
            self._backend.write_lock.release()
            _raise_ours(error)
        return _Transaction(self._connection)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        try:
            if kind is None:
                try:
                    self._connection.execute("COMMIT")
                    return
                except BaseException as failed:
                    error = failed
            if self._connection.in_transaction:
                with _errors():
                    self._connection.execute("ROLLBACK")
        finally:
            self._backend.write_lock.release()
        if kind is None or isinstance(error, sqlite3.Error):
            _raise_ours(error)


class _Transaction:
    for_update = ""  # BEGIN IMMEDIATE locked everything

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._execute = connection.execute

    def __call__(self, sql: str, args: Sequence[Any] = ()) -> sqlite3.Cursor:
        return self._execute(sql, args)

    def stream(self, sql: str, args: Sequence[Any] = ()) -> Iterator[sqlite3.Row]:
        return iter(self._execute(sql, args))

    def insert(self, table: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        if len(rows) == 1:
            self._execute(_insert(table, tuple(columns), 1), rows[0])
            return
        for part in _powers_of_two(rows):
            self._execute(_insert(table, tuple(columns), len(part)), list(chain.from_iterable(part)))

    def update(self, table: str, keys: Sequence[str], values: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        if not rows:
            return
        keys, values, at = tuple(keys), tuple(values), 0
        while len(rows) - at > FEW:
            size = max(SMALLEST, min(64, 1 << (len(rows) - at).bit_length() - 1))
            part = [*rows[at : at + size], *[rows[at]] * (at + size - len(rows))]  # the same row twice changes nothing
            self._execute(_update(table, keys, values, size), list(chain.from_iterable(part)))
            at += size
        for row in rows[at:]:
            self._execute(_update_one(table, keys, values), row)


# `executemany` gives the interpreter lock away and takes it back at every row, and beside a busy event loop each taking
# back waits. So many rows are one statement; in lots of a few sizes, so that SQLite has each of them prepared already.
# But an update from fewer than eight rows costs 30 us (SQLite 3.40), from eight 8 us, and of one row by itself 1.5 us.
FEW, SMALLEST = 3, 8


def _powers_of_two(rows: Sequence[Sequence[Any]], most: int = 64) -> Iterator[Sequence[Sequence[Any]]]:
    """The rows in lots of 64, 32, 16 … 1."""
    at, size = 0, most
    while at < len(rows):
        while size > len(rows) - at:
            size //= 2
        yield rows[at : at + size]
        at += size


@lru_cache(maxsize=512)
def _insert(table: str, columns: tuple[str, ...], rows: int) -> str:
    return f"INSERT INTO {table} ({', '.join(columns)}) VALUES {_marks(len(columns), rows)}"


@lru_cache(maxsize=512)
def _update_one(table: str, keys: tuple[str, ...], values: tuple[str, ...]) -> str:
    """Numbered, because a row has its keys first."""
    set_to = ", ".join(f"{value} = ?{n}" for n, value in enumerate(values, len(keys) + 1))
    return f"UPDATE {table} SET {set_to} WHERE " + " AND ".join(f"{key} = ?{n}" for n, key in enumerate(keys, 1))


@lru_cache(maxsize=512)
def _update(table: str, keys: tuple[str, ...], values: tuple[str, ...], rows: int) -> str:
    found = " AND ".join(f"{table}.{key} = new.column{n}" for n, key in enumerate(keys, 1))
    set_to = ", ".join(f"{value} = new.column{n}" for n, value in enumerate(values, len(keys) + 1))
    return f"UPDATE {table} SET {set_to} FROM (VALUES {_marks(len(keys) + len(values), rows)}) AS new WHERE {found}"


def _marks(columns: int, rows: int) -> str:
    return ", ".join([f"({', '.join('?' * columns)})"] * rows)


@contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        _raise_ours(error)


def _raise_ours(error: BaseException) -> NoReturn:
    if isinstance(error, sqlite3.IntegrityError):
        raise Conflict(str(error)) from error
    wrong = isinstance(error, sqlite3.ProgrammingError) or getattr(error, "sqlite_errorname", "") == "SQLITE_ERROR"
    if not isinstance(error, sqlite3.DatabaseError) or wrong:  # if our SQL is wrong, waiting will not help
        raise error
    raise StorageDown(str(error)) from error
