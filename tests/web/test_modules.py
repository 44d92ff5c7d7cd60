"""The console's arithmetic of money, numbers and charts, tested by Node where it is installed; and what its files must not have."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tidelock.service.console import DIRECTORY

HERE = Path(__file__).parent
SCRIPTS = sorted(DIRECTORY.rglob("*.js"))
OWN_PLACES = {"api.js", "dom.js"}


def test_the_modules_do_what_their_tests_say():
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    tests = sorted(map(str, HERE.glob("*.test.mjs")))
    run = subprocess.run(["node", "--test", *tests], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert int(re.search(r"# tests (\d+)", run.stdout)[1]) >= 15


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.relative_to(DIRECTORY).as_posix())
def test_a_module_is_small_and_makes_no_markup_from_text(path):
    text = path.read_text()
    assert len(text.splitlines()) < 250
    for sink in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "new Function",
        "DOMParser",
        "srcdoc",
    ):
        assert sink not in text, sink
    assert path.name in OWN_PLACES or "fetch(" not in text, "HTTP is api.js's"


def test_nothing_is_fetched_from_elsewhere_and_every_import_is_there():
    for path in SCRIPTS:
        for target in re.findall(r'from "([^"]+)"', path.read_text()):
            assert target.startswith(".") and (path.parent / target).resolve().is_file(), (path, target)
    for path in DIRECTORY.rglob("*"):
        if path.suffix in (".js", ".css", ".html"):
            assert not re.findall(r"https?://(?!www\.w3\.org/)", path.read_text()), path


def test_the_page_has_no_inline_script_or_style():
    page = (DIRECTORY / "index.html").read_text()
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\son\w+=|\sstyle=", page)
