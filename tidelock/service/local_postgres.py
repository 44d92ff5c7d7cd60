"""A throw-away PostgreSQL in a temporary directory, for tests, benchmarks and the money torture.

It listens on a Unix socket only, and runs as the user `postgres` (or `nobody`) when we are root, because PostgreSQL
refuses to run as root.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tidelock.tokens.errors import UserError

PORT = 5432  # names the socket file; no TCP port is opened


def missing() -> str | None:
    """Why no server can be started here, or None."""
    try:
        import psycopg  # noqa: F401
    except ImportError:
        return "psycopg is not installed (pip install 'psycopg[binary]')"
    if _binaries() is None:
        return "no PostgreSQL server binaries (Debian: apt-get install postgresql)"
    if os.geteuid() == 0 and _user() is None:
        return "PostgreSQL does not run as root, and there is no user postgres or nobody"
    return None


@dataclass
class LocalPostgres:
    directory: Path
    binaries: Path
    user: str | None

    def database(self) -> str:
        """The URL of a new, empty database. (A schema, which is one to its user, and costs no 7 MB of files.)"""
        import psycopg

        name = f"t{uuid.uuid4().hex[:12]}"
        with psycopg.connect(self._url(), autocommit=True) as connection:
            connection.execute(f"CREATE SCHEMA {name}")
        return f"{self._url()}&options=-csearch_path%3D{name}"

    def start(self) -> None:
        self._run("pg_ctl", "start", "-w", "-s", "-D", f"{self.directory}/data", "-l", f"{self.directory}/log")

    def stop(self, mode: str = "immediate") -> None:
        """`immediate` is a crash: the next start recovers from the log."""
        self._run("pg_ctl", "stop", "-w", "-s", "-m", mode, "-D", f"{self.directory}/data")

    def kill(self) -> None:
        """kill -9 of the server's main process; its children follow."""
        os.kill(int((self.directory / "data" / "postmaster.pid").read_text().split()[0]), signal.SIGKILL)

    def create(self, durable: bool) -> None:
        self._run("initdb", "-D", f"{self.directory}/data", "-A", "trust", "-U", "tidelock", "-E", "UTF8", "--no-locale",
                  "--no-sync")  # fmt: skip
        settings = {"listen_addresses": "''", "unix_socket_directories": f"'{self.directory}'", "port": PORT}
        if not durable:
            settings |= {"fsync": "off", "full_page_writes": "off"}  # survives its own crash, not that of the machine
        with open(self.directory / "data" / "postgresql.conf", "a") as file:
            file.writelines(f"{name} = {value}\n" for name, value in settings.items())

    def _run(self, program: str, *args: str) -> None:
        who = {"user": self.user, "group": pwd.getpwnam(self.user).pw_gid, "extra_groups": []} if self.user else {}
        done = subprocess.run(
            [str(self.binaries / program), *args], capture_output=program != "pg_ctl", text=True, check=False,
            cwd=self.directory, stdin=subprocess.DEVNULL, **who,
        )  # fmt: skip
        if done.returncode:
            raise UserError(f"{program} failed: {(done.stderr or '').strip() or self.directory / 'log'}")

    def _url(self) -> str:
        return f"postgresql://tidelock@/postgres?host={self.directory}&port={PORT}"


@contextmanager
def local_postgres(durable: bool = False) -> Iterator[LocalPostgres]:
    """`durable`: with fsync, as in production. Raises UserError if there is no PostgreSQL to start."""
    reason = missing()
    if reason:
        raise UserError(reason)
    directory = Path(tempfile.mkdtemp(prefix="tidelock-pg-", dir="/tmp"))  # short: socket paths are limited to 107 bytes
    user = _user() if os.geteuid() == 0 else None
    if user:
        shutil.chown(directory, user)
    binaries = _binaries()
    assert binaries is not None
    server = LocalPostgres(directory, binaries, user)
    try:
        server.create(durable)
        server.start()
        yield server
    finally:
        try:
            server.stop()
        except UserError:
            pass  # it is down already
        shutil.rmtree(directory, ignore_errors=True)


def _binaries() -> Path | None:
    """The newest installed server's directory."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"), key=lambda path: float(path.parts[-3]))
    on_path = shutil.which("pg_ctl")
    if found:
        return found[-1].parent
    return Path(on_path).resolve().parent if on_path else None


def _user() -> str | None:
    names = {entry.pw_name for entry in pwd.getpwall()}
    return next((name for name in ("postgres", "nobody") if name in names), None)
