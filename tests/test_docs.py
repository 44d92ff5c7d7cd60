"""What the documents name is there: files, test modules, benchmarks, commands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tidelock.cli.main import parser

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_file_that_is_named_exists(document):
    text = document.read_text()
    named = re.findall(r"\b((?:tidelock|tests|benchmarks|docs)/[\w/.{},-]*\w/?)", text)
    assert named
    assert not [path for path in named if "{" not in path and not (ROOT / path).exists()]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_benchmark_that_is_named_exists(document):
    modules = re.findall(r"-m (benchmarks\.\w+)", document.read_text())
    assert not [module for module in modules if not (ROOT / (module.replace(".", "/") + ".py")).is_file()]


def test_every_command_that_is_named_exists():
    choices = next(action.choices for action in parser()._actions if action.choices and "serve" in action.choices)
    for document in DOCUMENTS:
        for line in document.read_text().splitlines():
            if line.startswith("tidelock "):
                assert line.split()[1] in choices, line
