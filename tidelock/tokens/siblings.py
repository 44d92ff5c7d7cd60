"""The journals of a directory: one for each worker that serves from it, `trace.jsonl` and beside it `trace-1.jsonl` and
so on.

A worker writes only its own. What the others write it follows by a glance at each new line, which tells whose
conversation it belongs to; a line is read in earnest when that conversation comes here.
"""

from __future__ import annotations

import json
import re
import threading
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .journal import decode_record

# The first fields of a node's record, in the order they are written. A scope with an escape in it is JSON all the same.
NODE = re.compile(
    rb'[0-9a-f]{8} \{"kind":"node","node":\{"id":"([^"]+)","parent":(?:null|"[^"]+"),"scope":("(?:[^"\\]|\\.)*")'
)
RARE = re.compile(rb'[0-9a-f]{8} \{"kind":"(?:outcome|withdraw)"')
LARGEST_READ = 8 << 20


def journal_of(directory: str | Path, worker: int) -> Path:
    return Path(directory) / (f"trace-{worker}.jsonl" if worker else "trace.jsonl")


def journals(path: str | Path) -> list[Path]:
    """`path` and the journals of its siblings, where `path` is one of a family; otherwise it alone."""
    path = Path(path)
    if not re.fullmatch(r"trace(-\d+)?\.jsonl", path.name):
        return [path]
    found = {other for other in path.parent.glob("trace*.jsonl") if re.fullmatch(r"trace(-\d+)?\.jsonl", other.name)}
    return sorted(found | {path}, key=lambda other: (len(other.name), other.name))


class Siblings:
    """What the other journals hold, as far as it was looked at. Usable from any thread."""

    def __init__(self, own: Path) -> None:
        self._own = own
        self._lock = threading.Lock()
        self._at: dict[Path, int] = {}  # bytes looked at
        self._unread: dict[bytes, list[tuple[Path, int, int]]] = defaultdict(list)  # by scope: (file, from, to)
        self._scopes: dict[bytes, bytes] = {}  # node id -> scope, of what is unread

    def look(self) -> Iterator[dict[str, Any]]:
        """Looks at what was written since the last time. Yields the records that belong to no one conversation."""
        with self._lock:
            rare = []
            for path in journals(self._own):
                if path != self._own:
                    rare += self._look(path)
        yield from rare

    def scope_of(self, node_id: str) -> str | None:
        """Of a node that was not read yet."""
        scope = self._scopes.get(node_id.encode())
        return None if scope is None else decode_scope(scope)

    def read(self, scope: str) -> list[dict[str, Any]]:
        """The records of one scope that were not read yet, each journal's in its order."""
        with self._lock:
            places = self._unread.pop(encode_scope(scope), [])
            records = []
            for path, start, end in places:
                with open(path, "rb") as file:
                    file.seek(start)
                    record = decode_record(file.read(end - start))
                if record is not None:
                    records.append(record)
                    self._scopes.pop(record["node"]["id"].encode(), None)
            return records

    def _look(self, path: Path) -> list[dict[str, Any]]:
        rare: list[dict[str, Any]] = []
        at = self._at.get(path, 0)
        try:
            size = path.stat().st_size
        except OSError:
            return rare
        if size <= at:
            return rare
        with open(path, "rb") as file:
            file.seek(at)
            while data := file.read(LARGEST_READ):
                end = data.rfind(b"\n") + 1
                if not end:
                    if len(data) < LARGEST_READ:  # the end of the last line is yet to be written
                        break
                    data += file.readline()
                    end = data.rfind(b"\n") + 1
                    if not end:
                        break
                self._take(path, data[:end], at, rare)
                at += end
                file.seek(at)
        self._at[path] = at
        return rare

    def _take(self, path: Path, lines: bytes, at: int, rare: list[dict[str, Any]]) -> None:
        for line in lines.splitlines(keepends=True):
            if found := NODE.match(line):
                scope = found[2]
                self._unread[scope].append((path, at, at + len(line) - 1))
                self._scopes[found[1]] = scope
            elif RARE.match(line) and (record := decode_record(line[:-1])) is not None:
                rare.append(record)
            at += len(line)


def encode_scope(scope: str) -> bytes:
    return json.dumps(scope, ensure_ascii=False).encode("utf-8", "surrogatepass")


def decode_scope(scope: bytes) -> str:
    return json.loads(scope.decode("utf-8", "surrogatepass"))
