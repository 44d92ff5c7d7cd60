"""The PostgreSQL half of the dialect seam, on psycopg 3: a few connections, each statement sent without waiting for
the one before (pipeline mode), many rows in one statement (`unnest`).

psycopg and not asyncpg: rows sent as arrays, both do the same batches per second for the same processor time
(`benchmarks/ledger.py`), and one synchronous code path serves SQLite, PostgreSQL and the command line.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache
from typing import Any

from tidelock.service.db import Conflict, StorageDown, Unstorable
from tidelock.tokens.errors import UserError

try:
    import psycopg
    from psycopg.adapt import Loader
except ImportError as error:
    raise UserError("a postgresql:// database needs psycopg: pip install 'psycopg[binary]'") from error

ROWS_AT_A_TIME = 2000
# A network that swallows packets says nothing, and by itself TCP waits a quarter of an hour, or for two: money fails closed
# after seconds.
SILENCE = {"tcp_user_timeout": 10_000, "keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 2}
MIGRATION_LOCK = 0x7D1E  # any number, the same in every process


class Postgres:
    name = "postgres"
    writers = 2  # one commits while the other computes
    list_tables = "SELECT tablename FROM pg_tables WHERE schemaname = current_schema()"

    def __init__(self, url: str, most_connections: int = 8) -> None:
        self._url = url
        self._idle: list[psycopg.Connection] = []
        self._lock = threading.Lock()
        self._slots = threading.BoundedSemaphore(most_connections)
        self._types: dict[str, dict[str, str]] = {}  # column types by table, once the schema stands

    def _connect(self) -> psycopg.Connection:
        connection = psycopg.connect(
            self._url, autocommit=True, row_factory=_rows, connect_timeout=5, prepare_threshold=2, **SILENCE
        )
        connection.execute("SET lock_timeout = '10s'; SET idle_in_transaction_session_timeout = '60s'")
        connection.prepared_max = 500
        connection.adapters.register_loader("numeric", _Integer)
        return connection

    @contextmanager
    def _connection(self) -> Iterator[psycopg.Connection]:
        """One that nobody else uses; it goes back to the idle ones unless it broke."""
        with self._slots, _errors():
            with self._lock:
                connection = self._idle.pop() if self._idle else None
            if connection is None:
                connection = self._connect()
            try:
                yield connection
            except psycopg.OperationalError:
                connection.close()
                with self._lock:  # the server went away: the others are as dead
                    stale, self._idle = self._idle, []
                for other in stale:
                    other.close()
                raise
            finally:
                if not connection.closed:
                    with self._lock:
                        self._idle.append(connection)

    @contextmanager
    def transaction(self, durable: bool = True) -> Iterator[_Transaction]:
        """Always durable: `synchronous_commit = off` would keep what was committed in the memory of the database's own
        processes for a while. When those crash and we do not, a request goes on whose hold is gone, and nobody pays for it
        (the money torture, with the database killed, found such answers)."""
        with self._connection() as connection, connection.pipeline() as pipeline, connection.transaction():
            yield _Transaction(connection, self._types, pipeline)

    @contextmanager
    def migration(self) -> Iterator[_Transaction]:
        with self._connection() as connection, connection.transaction():
            connection.execute("SELECT pg_advisory_xact_lock(%s)", (MIGRATION_LOCK,))
            yield _Transaction(connection, {})

    def read(self, sql: str, args: Sequence[Any]) -> list[Row]:
        with self._connection() as connection:
            return connection.execute(_translated(sql), args).fetchall()

    @contextmanager
    def snapshot(self) -> Iterator[_Transaction]:
        with self._connection() as connection, connection.transaction():
            connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
            yield _Transaction(connection, self._types)

    def oldest(self, table: str, most: int) -> str:
        return table  # `migrations/m0024` has an index of block ranges by age, which costs a write nothing

    def append_only(self, table: str) -> list[str]:
        return [
            f"CREATE FUNCTION {table}_never() RETURNS trigger LANGUAGE plpgsql AS "
            f"'BEGIN RAISE EXCEPTION ''{table} is append-only'' USING ERRCODE = ''23000''; END'",
            f"CREATE TRIGGER {table}_never BEFORE UPDATE OR DELETE ON {table} "
            f"FOR EACH ROW EXECUTE FUNCTION {table}_never()",
            f"CREATE TRIGGER {table}_truncate_never BEFORE TRUNCATE ON {table} EXECUTE FUNCTION {table}_never()",
        ]

    def close(self) -> None:
        with self._lock:
            for connection in self._idle:
                connection.close()
            self._idle = []


class _Transaction:
    for_update = " FOR UPDATE"

    def __init__(
        self, connection: psycopg.Connection, types: dict[str, dict[str, str]], pipeline: psycopg.Pipeline | None = None
    ) -> None:
        self._connection, self._known, self._pipeline = connection, types, pipeline

    def __call__(self, sql: str, args: Sequence[Any] = ()) -> _Result:
        return _Result(self._connection.execute(_translated(sql), args), self._pipeline)

    def stream(self, sql: str, args: Sequence[Any] = ()) -> Iterator[Row]:
        """Through a cursor on the server, some rows at a time."""
        with self._connection.cursor(name=f"stream_{uuid.uuid4().hex}") as cursor:
            cursor.itersize = ROWS_AT_A_TIME
            cursor.execute(_translated(sql), args)
            yield from cursor

    def insert(self, table: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        if rows:
            types = self._types(table)
            arrays = ", ".join(f"%s::{types[column]}[]" for column in columns)
            sql = f"INSERT INTO {table} ({', '.join(columns)}) SELECT * FROM unnest({arrays})"
            self._connection.execute(sql, _arrays(rows, [types[column] for column in columns]))

    def update(self, table: str, keys: Sequence[str], values: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        if not rows:
            return
        types, columns = self._types(table), [*keys, *values]
        arrays = ", ".join(f"%s::{types[column]}[]" for column in columns)
        set_to = ", ".join(f"{value} = new.{value}" for value in values)
        found = " AND ".join(f"{table}.{key} = new.{key}" for key in keys)
        sql = f"UPDATE {table} SET {set_to} FROM unnest({arrays}) AS new({', '.join(columns)}) WHERE {found}"
        self._connection.execute(sql, _arrays(rows, [types[column] for column in columns]))

    def _types(self, table: str) -> dict[str, str]:
        if table not in self._known:
            sql = (
                "SELECT column_name, data_type FROM information_schema.columns "
                "WHERE table_schema = current_schema() AND table_name = %s"
            )
            self._known[table] = dict(self._connection.execute(sql, (table,)).fetchall())
        return self._known[table]


class _Result:
    """A statement that may still be under way; asking for its outcome waits for it."""

    def __init__(self, cursor: psycopg.Cursor, pipeline: psycopg.Pipeline | None) -> None:
        self._cursor, self._pipeline = cursor, pipeline
        self.fetchone, self.fetchall = cursor.fetchone, cursor.fetchall

    @property
    def rowcount(self) -> int:
        if self._pipeline is not None:
            self._pipeline.sync()
        return self._cursor.rowcount


def _arrays(rows: Sequence[Sequence[Any]], types: list[str]) -> list[list[Any]]:
    """Rows as columns; whole seconds in a column of floats become floats, because an array has one type."""
    columns = [list(column) for column in zip(*rows, strict=True)]
    for column, kind in zip(columns, types, strict=True):
        if kind == "double precision":
            column[:] = [None if value is None else float(value) for value in column]
    return columns


@lru_cache(maxsize=2048)
def _translated(sql: str) -> str:
    return sql.replace("%", "%%").replace("?", "%s")


class _Integer(Loader):
    """SUM of bigint is numeric; we have no numerics but those."""

    def load(self, data: Any) -> int:
        return int(bytes(data))


class Row(tuple):
    """A row that is read by position or by column name; `dict(row)` works."""

    names: tuple[str, ...]

    def keys(self) -> tuple[str, ...]:
        return self.names

    def __getitem__(self, key: Any) -> Any:
        return tuple.__getitem__(self, self.names.index(key) if isinstance(key, str) else key)


@cache
def _row_class(names: tuple[str, ...]) -> type[Row]:
    return type("Row", (Row,), {"names": names})


def _rows(cursor: psycopg.Cursor) -> Any:
    return _row_class(tuple(column.name for column in cursor.description or ()))


@contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except psycopg.IntegrityError as error:
        raise Conflict(str(error)) from error
    except psycopg.DataError as error:
        if "NUL" not in str(error):
            raise
        raise Unstorable("no text here may hold the character U+0000") from None
    except (psycopg.OperationalError, psycopg.InternalError) as error:
        raise StorageDown(str(error).strip()) from error
