"""`tidelock serve` as a child of the demo: started, waited for, and gone when the parent is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tidelock.tokens.errors import UserError


@contextmanager
def served(directory: Path, threads: int = 1, patience_s: float = 60.0, options: tuple[str, ...] = ()) -> Iterator[str]:
    """The base URL of a server over `directory`, on a free port of the loopback interface; `options` of `tidelock serve`."""
    ready, log = directory / "server.ready", directory / "server.log"
    ready.unlink(missing_ok=True)
    env = dict(os.environ, OMP_NUM_THREADS=str(threads), TIDELOCK_THREADS=str(threads))
    argv = [sys.executable, "-m", "tidelock", "serve", str(directory), "--port", "0", "--lenient",
            "--ready-file", str(ready), "--exit-with-parent", str(os.getpid()), *options]  # fmt: skip
    with open(log, "ab") as output:
        process = subprocess.Popen(argv, stdout=output, stderr=output, stdin=subprocess.DEVNULL, env=env)
    try:
        deadline = time.monotonic() + patience_s
        while not ready.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                tail = log.read_text(errors="replace").strip().splitlines()[-1:] or ["no output"]
                raise UserError(f"the server did not start: {tail[0]} (see {log})")
            time.sleep(0.05)
        yield ready.read_text().strip()
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        ready.unlink(missing_ok=True)
