"""Resumable stages in one directory. A stage that finished is never run again; a killed one starts over.

`config.json` pins what the run was started with, `stages/NAME.json` holds each finished stage's figures.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tidelock.tokens.errors import UserError


def write_json(path: Path, data: Any) -> None:
    """Atomically: readers see the old file or the new one."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(scratch, "w") as f:
        json.dump(data, f, indent=1)
        f.flush()
        os.fsync(f.fileno())
    os.replace(scratch, path)


class Stages:
    """The stages of one run. Opening takes the directory for this process alone."""

    def __init__(self, directory: Path, config: dict[str, Any]) -> None:
        self.directory, self.order = directory, []
        (directory / "stages").mkdir(parents=True, exist_ok=True)
        self._lock = open(directory / ".lock", "w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"another run is working in {directory}; wait for it or choose another --dir") from None
        self._pin(config)

    def _pin(self, config: dict[str, Any]) -> None:
        path = self.directory / "config.json"
        if not path.exists():
            write_json(path, config)
            return
        known = json.loads(path.read_text())
        changed = sorted(k for k in known.keys() | config.keys() if known.get(k) != config.get(k))
        if changed:
            was = ", ".join(f"{k} was {known.get(k)!r}, now {config.get(k)!r}" for k in changed)
            raise UserError(f"{self.directory} holds a run with other settings ({was}); choose another --dir or remove it")

    def done(self, name: str) -> bool:
        return self._path(name).exists()

    def run(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The stage's result: loaded when it finished before, computed and kept now otherwise.

        `work` returns a dict that may hold "tokens"; `wall_s` is added.
        """
        self.order.append(name)
        if not self.done(name):
            begun = time.monotonic()
            result = work()
            write_json(self._path(name), {"tokens": 0, **result, "wall_s": time.monotonic() - begun})
        return self.result(name)

    def result(self, name: str) -> dict[str, Any]:
        return json.loads(self._path(name).read_text())

    def _path(self, name: str) -> Path:
        return self.directory / "stages" / f"{name}.json"

    def close(self) -> None:
        self._lock.close()
