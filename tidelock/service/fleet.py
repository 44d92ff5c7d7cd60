"""Several worker processes behind one port, as one server: they start together, a crashed one is started again, and none
outlives the parent. The kernel deals connections out among them (SO_REUSEPORT), so nothing stands in between.
"""

from __future__ import annotations

import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tidelock.service.member import Member
from tidelock.service.server import bind, write_atomically
from tidelock.tokens.errors import UserError

POLL_S = 0.05
MOST_CRASHES, WITHIN_S = 5, 60.0  # of one worker; more often and something is wrong that starting again does not mend
GRACE_S = 15.0  # for workers to finish what runs


@dataclass
class _Running:
    member: Member
    process: subprocess.Popen | None = None
    crashes: list[float] = field(default_factory=list)


class Fleet:
    """`argv(member, port)` starts a worker, which must write `member.ready_file` once it answers and end with its parent."""

    def __init__(self, argv: Callable[[Member, int], list[str]], size: int) -> None:
        self._argv, self._size = argv, size
        self._stop = threading.Event()

    def stop(self, *_: object) -> None:
        self._stop.set()

    def run(self, host: str, port: int, ready_file: Path | None = None, ready: Callable[[str], None] = print) -> str:
        """Serves until SIGINT, SIGTERM or `stop`; `ready` is told the base URL once every worker answers, and
        `ready_file` appears then. Raises UserError if a worker does not start, or cannot stay up."""
        before = {name: signal.signal(name, self.stop) for name in (signal.SIGINT, signal.SIGTERM)}
        with bind(host, port, shared=True) as reserved, tempfile.TemporaryDirectory(prefix="tidelock-") as meeting:
            port = reserved.getsockname()[1]  # we never listen: it only keeps the port ours
            url = f"http://{host}:{port}/v1"
            workers = [_Running(Member(n, self._size, Path(meeting))) for n in range(self._size)]
            try:
                for worker in workers:
                    self._start(worker, port)
                if self._all_ready(workers):
                    ready(url)
                    if ready_file is not None:
                        write_atomically(ready_file, url + "\n")
                    self._keep(workers, port)
            finally:
                _end([worker.process for worker in workers if worker.process is not None])
                for name, handler in before.items():
                    signal.signal(name, handler)
        return url

    def _start(self, worker: _Running, port: int) -> None:
        worker.member.ready_file.unlink(missing_ok=True)
        worker.member.socket.unlink(missing_ok=True)
        worker.process = subprocess.Popen(self._argv(worker.member, port), stdin=subprocess.DEVNULL)

    def _all_ready(self, workers: list[_Running]) -> bool:
        while not all(worker.member.ready_file.exists() for worker in workers):
            for worker in workers:
                if (code := worker.process.poll()) is not None:  # its own words are on stderr
                    raise UserError(f"worker {worker.member.number} did not start (it ended with {code})")
            if self._stop.wait(POLL_S):
                return False
        return True

    def _keep(self, workers: list[_Running], port: int) -> None:
        while not self._stop.wait(POLL_S):
            for worker in workers:
                if worker.process.poll() is None:
                    continue
                now = time.monotonic()
                worker.crashes = [at for at in worker.crashes if now - at < WITHIN_S] + [now]
                if len(worker.crashes) > MOST_CRASHES:
                    raise UserError(f"worker {worker.member.number} ended {len(worker.crashes)} times within {WITHIN_S:.0f} s "
                                    f"(last with {worker.process.returncode}); the server stops")  # fmt: skip
                self._start(worker, port)


def _end(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + GRACE_S
    for process in processes:
        try:
            process.wait(max(deadline - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
