"""`tidelock cycle`: the second half of the loop on a run that has a trained model."""

from __future__ import annotations

from .main import command
from .training import add_settings, settings_from


def add(subparsers) -> None:
    add_settings(command(subparsers, "cycle", run, "serve, gather traces, train a candidate, gate and swap (resumes a run)",
                         "tidelock cycle my-run --seed 3"))  # fmt: skip


def run(args) -> dict:
    from tidelock.loop.console import Console
    from tidelock.loop.demo import run_demo
    from tidelock.tokens.errors import UserError

    if not (args.dir / "stages" / "rl.json").exists():
        raise UserError(f"{args.dir} has no trained model yet; run `tidelock rl {args.dir}` first")
    report = run_demo(args.dir, settings_from(args), Console())
    print(f"gate {'passed' if report['gate']['passed'] else 'refused'}; see {args.dir / 'report.html'}")
    return report
