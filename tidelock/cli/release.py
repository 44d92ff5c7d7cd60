"""`tidelock release`: the registry of what serves."""

from __future__ import annotations

from pathlib import Path

from .main import command


def add(subparsers) -> None:
    p = command(subparsers, "release", run, "list releases, release a checkpoint, or roll back",
                "tidelock release demo-run list\n  tidelock release demo-run release demo-run/checkpoints/candidate\n"
                "  tidelock release demo-run rollback")  # fmt: skip
    p.add_argument("dir", type=Path, help="a run directory")
    p.add_argument("action", choices=("list", "release", "rollback"))
    p.add_argument("checkpoint", type=Path, nargs="?", help="for `release`: the checkpoint directory")


def run(args) -> dict:
    from tidelock.loop.rundir import RunDir
    from tidelock.tokens.errors import UserError

    registry = RunDir(args.dir).existing().registry
    if args.action == "release":
        if args.checkpoint is None:
            raise UserError("which checkpoint? `tidelock release DIR release CHECKPOINT`")
        registry.release(args.checkpoint)
    elif args.action == "rollback":
        registry.rollback()
    releases = registry.list()
    for r in releases:
        current = "<- serving" if r is releases[-1] else ""
        print(f"v{r.version}  {r.reason:8}  {r.checkpoint}  {current}")
    return {"releases": [r.__dict__ for r in releases]}
