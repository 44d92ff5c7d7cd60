"""Shell commands for the product agent: each in a confined process group of its own, killed as a whole on timeout."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from .level import NONE, import_path, probe
from .toolset import SandboxError

_ENTER = (
    "import os, sys\n"
    "from tidelock.sandbox.level import confine\n"
    "level = confine([sys.argv[1]], cpu_s=int(sys.argv[2]))\n"
    "sys.exit('not confined') if level == 'none' and sys.argv[3] == 'closed' else os.execvp(sys.argv[4], sys.argv[4:])\n"
)


@dataclass(frozen=True)
class Finished:
    code: int
    output: str  # stdout and stderr together, at most `limit` characters
    timed_out: bool


def run_confined(
    argv: Sequence[str], workspace: str, timeout_s: float = 30.0, limit: int = 20_000, allow_unconfined: bool = False
) -> Finished:
    """Run a command that may write only inside `workspace`. Refuses where the machine cannot confine it."""
    if probe() == NONE and not allow_unconfined:
        raise SandboxError("this machine cannot confine commands; pass allow_unconfined to run them anyway")
    env = dict(os.environ, PYTHONPATH=import_path(), HOME=workspace)
    policy = "open" if allow_unconfined else "closed"
    process = subprocess.Popen(
        [sys.executable, "-c", _ENTER, workspace, str(int(timeout_s) + 1), policy, *argv],
        cwd=workspace, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    timed_out = False
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        timed_out = True
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
    text = output.decode("utf-8", "replace")
    return Finished(process.returncode, text if len(text) <= limit else text[:limit] + "\n... (cut)", timed_out)
