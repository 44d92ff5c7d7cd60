"""Backup and restore of a service database as one compressed text file, the same for SQLite and PostgreSQL, so that it
is also the way from one to the other.

The file: a line that says what it is (schema version, the root of the hash chains), a line per table with its columns
and its number of rows, the rows, and at the end the digest of all that. It is taken of one moment while requests go on.
The pepper of the keys is a file of its own, kept apart on purpose; without it no key works.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

from tidelock.service import migrations
from tidelock.service.audit import Audit, audit_and_root
from tidelock.service.db import Conflict, Database
from tidelock.tokens.errors import UserError

FORMAT = "tidelock service backup 1"
ROWS_PER_INSERT = 500


def backup(db: Database, path: str | Path) -> tuple[Audit, str]:
    """Writes the file whole or not at all; returns the audit and the chains' root of what it holds.
    Raises UserError if the books are not sound (a damaged backup would replace a good one) or the file cannot be written."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    with db.snapshot() as read:
        found, root = audit_and_root(read)
        if not found.sound:
            raise UserError(f"the books are not sound, so they are not backed up: {found}")
        version = read("SELECT MAX(version) FROM migrations")[0][0]
        try:
            with open(temporary, "wb") as raw, gzip.open(raw, "wb", compresslevel=6) as file:
                out = _Digested(file)
                out.line({"format": FORMAT, "version": version, "root": root})
                for table in _tables(db, read):
                    count = read(f"SELECT COUNT(*) FROM {table}")[0][0]
                    rows = read.stream(f"SELECT * FROM {table}")
                    first = next(rows, None)
                    out.line({"table": table, "columns": list(first.keys()) if first is not None else [], "rows": count})
                    for row in chain(() if first is None else (first,), rows):
                        out.line(list(row))
                file.write(json.dumps({"sha256": out.digest.hexdigest()}).encode() + b"\n")
            with open(temporary, "rb") as done:
                os.fsync(done.fileno())
            os.replace(temporary, path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise UserError(f"cannot write {path}: {error.strerror}") from error
    return found, root


def restore(path: str | Path, target: str) -> tuple[Audit, str]:
    """Fills an empty database from the file and checks it; returns its audit and root, equal to the backup's.

    A file of an older schema is brought up to date. Raises UserError if the file is damaged, the database is not empty,
    or the books come out otherwise than they went in; an SQLite file then does not appear at all.
    """
    path = Path(path)
    header = _checked(path)
    is_file = "://" not in target
    if is_file and Path(target).exists():
        raise UserError(f"{target} exists; a backup is restored into a new file")
    working = f"{target}.restoring" if is_file else target
    if is_file:
        _remove(working)
    db = Database(working, version=header["version"])
    try:
        _fill(db, path)
        db.migrate()
        with db.snapshot() as read:
            found, root = audit_and_root(read)
        if not found.sound or root != header["root"]:
            raise UserError(f"the restored books are not those of the backup: {found}")
        db.close()
        if is_file:
            os.replace(working, target)  # closing the last connection has folded the write-ahead log into the file
        return found, root
    except BaseException:
        db.close()
        if is_file:
            _remove(working)
        raise


def _fill(db: Database, path: Path) -> None:
    """Tables refer to each other: whatever cannot go in yet is tried again, with the file read once more, after the others."""
    done, left = {"migrations"}, -1
    while left:
        before, left = left, 0
        for table, columns, rows in _sections(path):
            if table in done or not columns:
                continue
            if before < 0 and db.read(f"SELECT 1 FROM {table} LIMIT 1"):
                raise UserError("the database is not empty; a backup is restored into a new one")
            try:
                with db.transaction() as tx:
                    while some := list(islice(rows, ROWS_PER_INSERT)):
                        tx.insert(table, columns, some)
                done.add(table)
            except Conflict as error:
                left, reason = left + 1, error
        if left == before:
            raise UserError(f"the backup does not fit its own schema: {reason}")


def _tables(db: Database, read: Any) -> list[str]:
    return sorted(row[0] for row in read(db.list_tables))


def _checked(path: Path) -> dict[str, Any]:
    """The header of a file that is whole. Raises UserError."""
    try:
        digest, last, header = hashlib.sha256(), None, {}
        with gzip.open(path, "rb") as file:
            for line in file:
                if last is not None:
                    digest.update(last)
                    header = header or json.loads(last)
                last = line
        if json.loads(last or b"null").get("sha256") != digest.hexdigest() or header.get("format") != FORMAT:
            raise ValueError("its digest does not fit")
        if header["version"] > max(migrations.steps()):
            raise UserError(f"{path} was made by a newer program (schema {header['version']})")
        return header
    except (OSError, EOFError, ValueError, AttributeError, KeyError) as error:
        raise UserError(f"{path} is no backup, or a damaged one: {error}") from error


def _sections(path: Path) -> Iterator[tuple[str, list[str], Iterator[list[Any]]]]:
    """(table, columns, rows); rows that were not taken are passed over."""
    with gzip.open(path, "rb") as file:
        next(file)
        for line in file:
            section = json.loads(line)
            if "table" not in section:
                return
            rows = map(json.loads, islice(file, section["rows"]))
            yield section["table"], section["columns"], rows
            for _ in rows:
                pass


def _remove(path: str) -> None:
    for suffix in ("", "-wal", "-shm"):
        Path(path + suffix).unlink(missing_ok=True)


class _Digested:
    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.digest = file, hashlib.sha256()

    def line(self, value: Any) -> None:
        data = json.dumps(value, separators=(",", ":")).encode() + b"\n"
        self.digest.update(data)
        self._file.write(data)
