"""Pretraining text found on every machine: the Python standard library's source, and the user's own files."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path

from tidelock.tokens.errors import UserError

# Tests and generated tables are most of the bytes and little of the language.
SKIP = {"test", "tests", "idlelib", "encodings", "lib2to3", "pydoc_data", "site-packages", "turtledemo", "__pycache__"}
TEXT_SUFFIXES = {".py", ".txt", ".md", ".rst", ".json", ".toml", ".cfg", ".ini", ".html", ".css", ".js", ".c", ".h"}


def stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    return sorted(p for p in root.rglob("*.py") if not SKIP & set(p.relative_to(root).parts[:-1]))


def user_files(path: Path) -> list[Path]:
    """Text files under `path` (or the file itself). Raises UserError when there are none."""
    if not path.exists():
        raise UserError(f"--text {path}: no such file or directory")
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in TEXT_SUFFIXES and p.is_file())
    if not files:
        raise UserError(f"--text {path}: no text files ({', '.join(sorted(TEXT_SUFFIXES))}) found")
    return files


def read_texts(files: list[Path], limit_bytes: int, each_bytes: int = 20_000) -> Iterator[str]:
    """The beginnings of the files, at most `each_bytes` of each, until `limit_bytes` have been read."""
    total = 0
    for file in files:
        text = file.read_text(encoding="utf-8", errors="ignore")[:each_bytes]
        total += len(text)
        if text.strip():
            yield text
        if total >= limit_bytes:
            return
