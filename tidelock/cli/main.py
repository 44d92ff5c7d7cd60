"""`tidelock COMMAND`: picks the command, turns errors into one clear line, writes `--json`.

This is also the process's door: the thread policy is set here, before anything imports PyTorch.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

# In the order of the story. Modules are imported only to build their parser.
COMMANDS = ("demo", "pretrain", "sft", "rl", "serve", "top", "bench", "agent", "cycle", "eval", "release", "keys", "admin",
            "models", "doctor")  # fmt: skip


def set_threads() -> None:
    """One thread pool of the right size, that gives way.

    Waiting OpenMP threads spin by default, 300,000 times; beside another busy process that makes a training step several
    times slower (`benchmarks/threads.py`). A short spin costs next to nothing on a quiet machine and then sleeps.
    glibc is told to keep freed memory, because training frees and takes the same big buffers in every step.
    """
    threads = os.environ.get("TIDELOCK_THREADS") or str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity")
                                                       else os.cpu_count() or 1)  # fmt: skip
    os.environ.setdefault("OMP_NUM_THREADS", threads)
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    keep_freed_memory()


def keep_freed_memory() -> None:
    import ctypes

    mmap_threshold, trim_threshold = -3, -1
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, 1 << 29)
    except (OSError, AttributeError):
        pass  # another C library: only speed is at stake


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="tidelock",
        description="A model and the agent product on top of it, trained and served as one.",
        epilog="example:\n  tidelock demo --dir demo-run --seed 0",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subparsers = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        importlib.import_module(f"tidelock.cli.{name}").add(subparsers)
    return top


def main(argv: list[str] | None = None) -> int:
    set_threads()
    from tidelock.tokens.errors import UserError

    try:
        args = parser().parse_args(argv)
        result = args.run(args)
        if getattr(args, "json", None) and result is not None:
            write_json(args.json, result)
        return int(bool((result or {}).get("failed")))
    except UserError as e:
        print(f"tidelock: error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("tidelock: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as e:
        with tempfile.NamedTemporaryFile("w", prefix="tidelock-error-", suffix=".txt", delete=False) as f:
            traceback.print_exc(file=f)
        print(f"tidelock: internal error: {type(e).__name__}: {e} (details in {f.name})", file=sys.stderr)
        return 1


def write_json(path: str, result: dict[str, Any]) -> None:
    from tidelock.tokens.errors import UserError

    text = json.dumps(result, indent=1, default=str) + "\n"
    if path == "-":
        sys.stdout.write(text)
        return
    try:
        Path(path).write_text(text)
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror}") from None


def command(subparsers: Any, name: str, run: Any, help: str, example: str) -> argparse.ArgumentParser:
    """A command's parser with what all of them share: an example and `--json`."""
    p = explained(subparsers, name, help, example)
    p.add_argument("--json", metavar="PATH", help="write the result as JSON to PATH (- for standard output)")
    p.set_defaults(run=run)
    return p


def explained(subparsers: Any, name: str, help: str, example: str, **options: Any) -> argparse.ArgumentParser:
    """A parser whose help says what it does and ends with an example that works as it is printed."""
    return subparsers.add_parser(
        name, help=help, description=help[0].upper() + help[1:] + ".", epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter, **options,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
