"""An append-only file of JSON records that survives being killed at any byte.

One record a line: crc32 in hex, a space, JSON. Opening is recovering: a torn last record is cut off; a damaged record
anywhere else is somebody's edit or a failing disk and is reported, never skipped.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
import time
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from .errors import UserError

_fast = msgspec.json.Encoder().encode


def encode_record(record: dict[str, Any]) -> bytes:
    return _line(json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass"))


def _line(body: bytes) -> bytes:
    return b"%08x %s\n" % (zlib.crc32(body), body)


def encode_finite(record: dict[str, Any]) -> bytes:
    """As `encode_record`, several times faster, for a record without NaN or infinities (they would become null)."""
    try:
        return _line(_fast(record))
    except (UnicodeEncodeError, OverflowError, TypeError):  # lone surrogates, integers beyond 64 bits, NumPy's numbers
        return encode_record(record)


def decode_record(line: bytes) -> dict[str, Any] | None:
    """The record of one line (without its newline), or None when it is damaged."""
    if len(line) < 10 or line[8:9] != b" ":
        return None
    body = line[9:]
    try:
        if int(line[:8], 16) != zlib.crc32(body):
            return None
        return json.loads(body.decode("utf-8", "surrogatepass"))
    except ValueError:
        return None


def read_journal(path: str | Path) -> list[dict[str, Any]]:
    """Every whole record, without opening for writing. Raises UserError on a damaged record that is not the last."""
    return _read(Path(path))[0]


def _read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """(records, length in bytes of the sound part)."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        data = b""
    records, at, number = [], 0, 0
    while at < len(data):
        number += 1
        end = data.find(b"\n", at)
        record = None if end < 0 else decode_record(data[at:end])
        if record is None:
            if end >= 0 and end + 1 < len(data):
                raise UserError(
                    f"damaged journal: {path}, record {number} fails its checksum and is not the last; restore a copy"
                )
            break
        records.append(record)
        at = end + 1
    return records, at


def read_kind(path: str | Path, kind: str, start: int = 0, end: int | None = None) -> Iterator[tuple[dict[str, Any], int]]:
    """(record, where the next one begins) for the records of one kind between two offsets, a line at a time: memory does
    not grow with the file. Only what begins with this kind is decoded. Stops at a torn end; raises UserError on damage."""
    head = b'{"kind":"%s"' % kind.encode()
    with open(path, "rb") as file:
        file.seek(start)
        at = start
        while (end is None or at < end) and (line := file.readline()).endswith(b"\n"):
            at += len(line)
            if line[9 : 9 + len(head)] == head:
                record = decode_record(line[:-1])
                if record is None:
                    raise UserError(f"damaged journal: {path}, the record that ends at byte {at} fails its checksum")
                yield record, at


class Journal:
    """The single writer of a journal file, usable from any thread. Every append is on disk when it returns.

    Raises UserError when another process has it open for writing or a record inside it is damaged.
    """

    def __init__(self, path: str | Path, patience_s: float = 0.0) -> None:
        """`patience_s`: how long to wait for another writer to go away, e.g. one that is being stopped."""
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._appending = threading.Lock()
        self._file = open(self.path, "ab", buffering=0)
        try:
            self._wait_for_lock(patience_s)
            self.records, self._sound = _read(self.path)
            self._cut()
            _sync_directory(self.path.parent)
        except BaseException:
            self._file.close()
            raise

    def append(self, record: dict[str, Any]) -> None:
        self.append_many([record])

    def append_many(self, records: Iterable[dict[str, Any] | bytes]) -> None:
        """One fsync for all of them; bytes are records already encoded. When it fails (a full disk), none of them is left in the file."""
        data = memoryview(b"".join(r if isinstance(r, bytes) else encode_record(r) for r in records))
        if not data:
            return
        with self._appending:
            try:
                written = 0
                while written < len(data):
                    written += self._file.write(data[written:])
                os.fsync(self._file.fileno())
            except OSError:
                self._cut()
                raise
            self._sound += len(data)

    def close(self) -> None:
        self._file.close()

    def _wait_for_lock(self, patience_s: float) -> None:
        deadline = time.monotonic() + patience_s
        while not self._locked():
            if time.monotonic() >= deadline:
                raise UserError(f"{self.path} is being written by another process; stop it or use another directory")
            time.sleep(0.05)

    def _locked(self) -> bool:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError:
            return False

    def _cut(self) -> None:
        """Drop what is behind the sound part: a torn record would damage the one appended after it."""
        self._file.truncate(self._sound)


def _sync_directory(path: Path) -> None:
    """A new file's name is durable only when its directory is."""
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
