"""The house plan's import contract: a part may import only what lies above it."""

from pathlib import Path

from importlinter.cli import EXIT_STATUS_SUCCESS, lint_imports


def test_no_part_imports_what_it_must_not_know(monkeypatch):
    # the linter's own logging would silence every logger that there is, and with them what the service's tests look for
    monkeypatch.setattr("importlinter.cli.logging_config.dictConfig", lambda config: None)
    root = Path(__file__).parents[1]
    assert lint_imports(config_filename=str(root / "pyproject.toml"), no_cache=True) == EXIT_STATUS_SUCCESS
