"""The service's database: one SQLite file by default, PostgreSQL for several workers and machines.

SQL is written by hand, once, with `?` placeholders; what differs between the two lives in `sqlite.py` and
`postgres.py` and nowhere else. What must never happen is written into the schema (`migrations/`), so no caller can get
it wrong.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

from tidelock.service import migrations
from tidelock.tokens.errors import UserError

T = TypeVar("T")


class StorageDown(Exception):
    """The database cannot be reached or refuses to work. Nothing of the transaction was kept. Money fails closed."""


class Conflict(Exception):
    """A row breaks a constraint of the schema. Nothing of the transaction was kept."""


class Unstorable(Exception):
    """A text that this kind of database cannot hold or look for. Nothing of the transaction was kept."""


class Transaction(Protocol):
    """Everything done through it commits together or not at all."""

    for_update: str  # ends a SELECT whose rows nobody else may change until we commit

    def __call__(self, sql: str, args: Sequence[Any] = ()) -> Any:
        """Executes one statement; the result has `fetchone`, `fetchall` and `rowcount`."""

    def insert(self, table: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Inserts many rows at once."""

    def update(self, table: str, keys: Sequence[str], values: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Sets `values` of the rows found by `keys`, for many rows (keys first) at once."""


class Reading:
    """One moment of the books: `read(sql, args)` gives all rows, `read.stream(sql, args)` one after the other, so that
    memory does not grow with the table."""

    def __init__(self, tx: Any) -> None:
        self._tx = tx

    def __call__(self, sql: str, args: Sequence[Any] = ()) -> list[Any]:
        return self._tx(sql, args).fetchall()

    def stream(self, sql: str, args: Sequence[Any] = ()) -> Iterator[Any]:
        return self._tx.stream(sql, args)


class Backend(Protocol):
    """What a kind of database has to bring. Rows are read by name or by position."""

    name: str
    writers: int  # transactions that may usefully run at the same time
    list_tables: str  # a query

    def transaction(self, durable: bool) -> AbstractContextManager[Transaction]: ...
    def read(self, sql: str, args: Sequence[Any]) -> list[Any]: ...
    def snapshot(self) -> AbstractContextManager[Transaction]:
        """A transaction that only reads; it has `stream` besides, which fetches rows as they are taken."""

    def migration(self) -> AbstractContextManager[Transaction]:
        """A transaction that no other process can run beside ours."""

    def oldest(self, table: str, most: int) -> str:
        """What to select from to find old rows without reading the whole table: the first that were written, or all where
        an index by age does that."""

    def append_only(self, table: str) -> Iterable[str]:
        """Statements after which rows of the table can be neither changed nor removed."""

    def close(self) -> None: ...


class Database:
    """Usable from any thread. Opening it brings its schema up to date."""

    def __init__(self, target: str | Path, version: int | None = None) -> None:
        """`target` is a file (made if missing), `:memory:`, or a `postgresql://` URL. `version`: of the schema, for
        restoring an old backup.

        Raises UserError if it is no database of ours or cannot be opened.
        """
        self.target = str(target)
        try:
            self._backend = _backend(self.target)
            try:
                migrations.run(self._backend, version)
            except BaseException:
                self._backend.close()
                raise
        except (StorageDown, Conflict) as error:
            raise UserError(f"cannot open the service database {_shown(self.target)}: {error}") from error
        self.name, self.writers, self.list_tables = self._backend.name, self._backend.writers, self._backend.list_tables
        self.oldest = self._backend.oldest
        self._readers = ThreadPoolExecutor(4, thread_name_prefix="db-read")

    def migrate(self) -> None:
        migrations.run(self._backend)

    def transaction(self, durable: bool = True) -> AbstractContextManager[Transaction]:
        """Yields `execute(sql, args)`. Raises StorageDown or Conflict, and then nothing has happened.

        durable: on the disk when it is over. False: at least safe from the end of any process, the database's included;
        from that of the machine with the next durable one.
        """
        return self._backend.transaction(durable)

    def read(self, sql: str, args: Sequence[Any] = ()) -> list[Any]:
        return self._backend.read(sql, args)

    @contextmanager
    def snapshot(self) -> Iterator[Reading]:
        """Yields a `read` whose answers all describe the same moment."""
        with self._backend.snapshot() as tx:
            yield Reading(tx)

    async def fetch(self, sql: str, args: Sequence[Any] = ()) -> list[Any]:
        """`read` that leaves the event loop free."""
        return await asyncio.get_running_loop().run_in_executor(self._readers, self._backend.read, sql, args)

    async def run(self, job: Callable[[Transaction], T]) -> T:
        """Runs `job` in a transaction of its own, off the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._readers, self._run, job)

    def _run(self, job: Callable[[Transaction], T]) -> T:
        with self.transaction() as tx:
            return job(tx)

    def close(self) -> None:
        self._readers.shutdown(wait=True)
        self._backend.close()


def service_database(directory: str | Path) -> str:
    """Where a service directory keeps its books: the URL in its file `database` if it has one, else `service.sqlite`."""
    named = Path(directory) / "database"
    if not named.exists():
        return str(Path(directory) / "service.sqlite")
    try:
        url = named.read_text().strip()
    except OSError as error:
        raise UserError(f"cannot read {named}: {error.strerror}") from error
    if not url.startswith(("postgresql://", "postgres://")):
        raise UserError(f"{named} should hold one line, postgresql://USER:PASSWORD@HOST/NAME")
    return url


def _backend(target: str) -> Backend:
    if target.startswith(("postgresql://", "postgres://")):
        from tidelock.service.postgres import Postgres

        return Postgres(target)
    from tidelock.service.sqlite import Sqlite

    return Sqlite(target)


def _shown(target: str) -> str:
    """The target without a password."""
    head, at, tail = target.rpartition("@")
    return f"{head.rpartition(':')[0]}:…@{tail}" if at and head.count(":") > 1 else target
