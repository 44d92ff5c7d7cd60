"""How much confinement this machine gives, found by trying it, and how a child process puts it on."""

from __future__ import annotations

import ctypes
import functools
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from . import landlock, seccomp
from .toolset import SandboxError

NONE = "none"
READABLE = ("/usr", "/lib", "/lib64", "/bin", "/etc", "/opt", "/proc/self", "/dev/null", "/dev/urandom", "/dev/zero")


def import_path() -> str:
    """PYTHONPATH for a child that must import what this process can.

    The package's own place is named outright: an editable install finds it by a hook and not by `sys.path`.
    """
    here = str(Path(__file__).resolve().parents[2])
    return os.pathsep.join(dict.fromkeys([*(os.path.abspath(p) for p in sys.path), here]))


def python_paths() -> list[str]:
    """What this interpreter needs to import: its prefixes and its path."""
    return sorted({sys.prefix, sys.base_prefix, *import_path().split(os.pathsep)})


def confine(writable: Sequence[str], readable: Sequence[str] = (), memory_bytes: int = 1 << 30, cpu_s: int | None = None) -> str:
    """Confine this process for good and return the level reached. Call once, in a fresh child."""
    die_with_parent()
    limits = {resource.RLIMIT_AS: memory_bytes, resource.RLIMIT_FSIZE: 64 << 20, resource.RLIMIT_NPROC: 256,
              resource.RLIMIT_CORE: 0}  # fmt: skip
    if cpu_s is not None:
        limits[resource.RLIMIT_CPU] = cpu_s
    for what, value in limits.items():
        hard = resource.getrlimit(what)[1]
        bounded = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(what, (bounded, bounded))
    try:
        version = landlock.restrict([*READABLE, *python_paths(), *readable], [*writable, "/dev/null"])
    except SandboxError:
        return NONE
    try:
        seccomp.restrict()
    except SandboxError:
        return f"landlock-{version}"
    return f"landlock-{version}+seccomp"


def die_with_parent() -> None:
    parent_death_signal = 1
    ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGKILL)


def verify(level: str, writable: str) -> str:
    """Try what must not work. The level that holds is `level`, or none when anything gets through."""
    if level == NONE:
        return NONE
    outside = os.path.join(os.path.dirname(os.path.abspath(writable)), f"tidelock-probe-{os.getpid()}")
    try:
        os.close(os.open(outside, os.O_CREAT | os.O_WRONLY))
        os.unlink(outside)
        return NONE
    except OSError:
        pass
    if "seccomp" in level:
        try:
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM).close()
            return NONE
        except OSError:
            pass
    return level


@functools.cache
def probe() -> str:
    """The level a confined child reaches on this machine, e.g. "landlock-7+seccomp", or "none"."""
    code = "import os; from tidelock.sandbox.level import confine, verify; d = os.getcwd(); print(verify(confine([d]), d))"
    with tempfile.TemporaryDirectory() as directory:
        env = dict(os.environ, PYTHONPATH=import_path())
        done = subprocess.run([sys.executable, "-c", code], cwd=directory, env=env, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else NONE
