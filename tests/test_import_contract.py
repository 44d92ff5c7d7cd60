"""The house plan's import contract: a part may import only what lies above it."""

from pathlib import Path

from importlinter.cli import EXIT_STATUS_SUCCESS, lint_imports


def test_no_part_imports_what_it_must_not_know():
    root = Path(__file__).parents[1]
    assert lint_imports(config_filename=str(root / "pyproject.toml"), no_cache=True) == EXIT_STATUS_SUCCESS
