"""`tidelock doctor`: are a run's traces exact and its books balanced, and what does this machine offer?"""

from __future__ import annotations

from pathlib import Path

from .main import command


def add(subparsers) -> None:
    p = command(subparsers, "doctor", run, "check a run directory: rendering, log-probabilities, ledger; and this machine",
                "tidelock doctor demo-run")  # fmt: skip
    p.add_argument("dir", type=Path, nargs="?", help="a run directory; without it only the machine is examined")
    p.add_argument("--limit", type=int, help="recompute the log-probabilities of the first LIMIT conversations only")


def run(args) -> dict:
    from tidelock.models import ops
    from tidelock.sandbox import probe

    machine = {"sandbox": probe(), "kernels": "native" if ops.library() else "reference", "exact": ops.exact()}
    for key, value in machine.items():
        print(f"{key:>22}  {value}")
    if args.dir is None:
        return {"machine": machine}
    from tidelock.loop import doctor
    from tidelock.loop.console import Console
    from tidelock.loop.rundir import RunDir

    directory = RunDir(args.dir).existing()
    with Console().status("examining"):
        findings, books = doctor.examine(directory, args.limit), doctor.books(directory)
    audit = books["audit"]
    for key, value in findings.__dict__.items():
        print(f"{key:>22}  {value}")
    print(f"{'ledger':>22}  {audit.entries} entries, sum {audit.sum_nano}, overspend {audit.overspend_nano}")
    healthy = findings.healthy and audit.sound
    verdict = "healthy: every conversation renders to its ids, every log-probability is its weights', the books balance"
    print(f"{'verdict':>22}  {verdict if healthy else 'NOT healthy'}")
    return {"machine": machine, **findings.__dict__, "ledger": audit.__dict__, "healthy": healthy, "failed": not healthy}
