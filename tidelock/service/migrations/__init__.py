"""The schema's history: numbered steps, each run once, in order, under a lock, in one transaction with its number.

A step is a module `mNNNN_name.py` with `up(tx, backend)`. A step that has been released is never edited: the next one
changes what it did. Column types are those both databases read alike: TEXT, BIGINT, DOUBLE PRECISION (never REAL).
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from tidelock.tokens.errors import UserError


def steps() -> dict[int, str]:
    """Module names by number."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name.startswith("m"))
    return {int(name[1:5]): f"{__name__}.{name}" for name in names}


def run(backend: Any, target: int | None = None) -> None:
    """Brings the schema to the newest step (or to `target`, for tests). Raises UserError for a schema from the future."""
    known = steps()
    newest = target or max(known)  # numbers may have gaps: steps that grew up beside each other
    with backend.migration() as tx:
        tx("CREATE TABLE IF NOT EXISTS migrations (version INTEGER PRIMARY KEY)")
        done = {row[0] for row in tx("SELECT version FROM migrations").fetchall()}
        if max(done, default=0) > max(known):
            raise UserError(f"the service database is of a newer version ({max(done)}) than this program knows")
        for version in sorted(known.keys() - done):
            if version > newest:
                break
            importlib.import_module(known[version]).up(tx, backend)
            tx("INSERT INTO migrations VALUES (?)", (version,))


def script(tx: Any, text: str) -> None:
    """Runs the statements of `text`, which end in `;` at the end of a line."""
    for statement in text.split(";\n"):
        if statement.strip():
            tx(statement)
