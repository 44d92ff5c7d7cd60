"""Compiles the C files of `c/` on first use and loads them with ctypes, as one library.

The library is cached per source, compiler flags and CPU. Where there is no C compiler the plain PyTorch path of
`reference` serves instead; `TIDELOCK_NATIVE=0` asks for that path explicitly.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch  # noqa: F401  loads the OpenMP runtime whose symbols the kernels use

SOURCES = sorted(Path(__file__).with_name("c").glob("*.c"))
HEADERS = sorted(Path(__file__).with_name("c").glob("*.h"))
# No -ffast-math: reassociation would make a row's result depend on where the vector loop happened to end. No contraction
# either: the sources say where a product is fused.
FLAGS = ["-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fopenmp", "-std=gnu11", "-fPIC"]


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next((line for line in lines if line.startswith("flags")), platform.machine())
    except OSError:
        return platform.machine() + platform.processor()


def _cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "tidelock" / "kernels"


def _compile(compiler: str) -> Path:
    sources = [f.read_text() for f in (*HEADERS, *SOURCES)]
    key = hashlib.sha256("\0".join([*sources, *FLAGS, compiler, _cpu_model()]).encode()).hexdigest()[:16]
    library = _cache_dir() / f"kernels-{key}.so"
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        objects, lib = [str(Path(scratch) / f"{f.stem}.o") for f in SOURCES], Path(scratch) / "k.so"
        with ThreadPoolExecutor() as pool:  # waits for compilers, one a file
            list(pool.map(_command, ([compiler, *FLAGS, "-c", str(f), "-o", o] for f, o in zip(SOURCES, objects))))
        # Linked without -fopenmp on purpose: a second OpenMP runtime would bring a second pool of threads.
        _command([compiler, "-shared", *objects, "-o", str(lib), "-lm", "-lpthread"])
        os.replace(lib, library)
    return library


def _command(words: list[str]) -> None:
    subprocess.run(words, check=True, capture_output=True)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where they cannot be had."""
    if os.environ.get("TIDELOCK_NATIVE", "1") == "0":
        return None
    compiler = shutil.which(os.environ.get("CC", "gcc")) or shutil.which("cc")
    if compiler is None:
        return None
    try:
        return ctypes.CDLL(str(_compile(compiler)))
    except (OSError, subprocess.CalledProcessError):
        return None
