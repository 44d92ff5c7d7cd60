"""The release registry: which checkpoint served as which weights version, and which one serves now.

A journal of releases and rollbacks; nothing is ever edited. Versions only grow, also when an old checkpoint returns, so
that a weights version in a trace names one set of weights for ever.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tidelock.tokens.errors import UserError
from tidelock.tokens.journal import Journal, read_journal


@dataclass(frozen=True)
class Release:
    version: int
    checkpoint: str  # relative to the run's directory where it lies inside it
    reason: str  # "release" | "rollback"
    created: float
    metrics: dict[str, Any] = field(default_factory=dict)


class Registry:
    """Releases of one run directory (`releases.jsonl`)."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.path = self.directory / "releases.jsonl"

    def list(self) -> list[Release]:
        return [Release(**record) for record in read_journal(self.path)]

    def current(self) -> Release:
        """The release that serves. Raises UserError when nothing was released yet."""
        releases = self.list()
        if not releases:
            raise UserError(f"nothing released in {self.directory} yet; train a model and release its checkpoint first")
        return releases[-1]

    def checkpoint(self, version: int) -> Path:
        """Where the weights of a version lie. Raises UserError for a version that never served."""
        for release in self.list():
            if release.version == version:
                return self.directory / release.checkpoint
        raise UserError(f"weights version {version} was never released in {self.directory}")

    def release(self, checkpoint: str | Path, metrics: dict[str, Any] | None = None) -> Release:
        """Make a checkpoint the one that serves. Raises UserError when it is not a checkpoint."""
        return self._append(checkpoint, "release", metrics or {})

    def rollback(self) -> Release:
        """Back to the checkpoint before the current one, under a new version."""
        releases = self.list()
        earlier = [r for r in releases if r.checkpoint != releases[-1].checkpoint] if releases else []
        if not earlier:
            raise UserError(f"no earlier release in {self.directory} to go back to")
        return self._append(self.directory / earlier[-1].checkpoint, "rollback", {})

    def _append(self, checkpoint: str | Path, reason: str, metrics: dict[str, Any]) -> Release:
        from tidelock.models import read_config  # brings torch along, which those who only read releases do not need

        read_config(checkpoint)
        path = Path(checkpoint).resolve()
        inside = path.is_relative_to(self.directory.resolve())
        shown = str(path.relative_to(self.directory.resolve())) if inside else str(path)
        journal = Journal(self.path)
        try:
            version = len(journal.records) + 1
            release = Release(version, shown, reason, time.time(), metrics)
            journal.append(asdict(release))
        finally:
            journal.close()
        return release
