"""`tidelock demo` killed with SIGKILL once in every stage, against the same demo left alone.

    python -m benchmarks.kill_demo --dir /tmp/killed --seed 7

Both runs must end with the same success in every family, the same curves and the same gate; the killed one's ledger must
sum to zero and its trace hold every conversation of the other, each once. Takes about three times a demo.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path

from tidelock.loop import doctor
from tidelock.loop.rundir import RunDir
from tidelock.tokens.journal import read_journal
from tidelock.tokens.trace import Trace

STAGES = ("tokenizer", "pretrain", "sft", "rl", "serve", "before", "users", "dataset", "candidate", "gate", "swap",
          "after", "report")  # fmt: skip


def start(directory: Path, seed: int) -> subprocess.Popen:
    argv = [sys.executable, "-m", "tidelock", "demo", "--dir", str(directory), "--seed", str(seed)]
    return subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> None:
    _, error = process.communicate()
    if process.returncode:
        sys.exit(f"the demo ended with {process.returncode}: {error[-500:]}")


def kill_in(stage: str, directory: Path, seed: int, lasting_s: float, rng: random.Random) -> str:
    """Start the demo, let it come to `stage`, kill it at a random moment of it. Says what happened."""
    process = start(directory, seed)
    done = directory / "stages"
    before = STAGES[: STAGES.index(stage)]
    while not all((done / f"{s}.json").exists() for s in before):
        if process.poll() is not None:
            sys.exit(f"the demo ended before {stage}: {process.stderr.read()[-500:]}")
        time.sleep(0.02)
    wait = rng.uniform(0, lasting_s)
    time.sleep(wait)
    missed = (done / f"{stage}.json").exists()
    process.kill()
    process.wait()
    time.sleep(0.3)  # the server notices its parent's death
    return f"after {wait:.1f} s of about {lasting_s:.1f} s" + (" (had just finished)" if missed else "")


def conversations(run: RunDir) -> list[tuple]:
    """Every sampled answer with who asked for it where; the key's id differs from run to run."""
    return [(n.scope.split("/", 1)[1], n.ids) for n in Trace.read(run.traces).nodes.values() if n.sampled]


def comparable(run: RunDir) -> dict:
    """What must not depend on having been killed: everything but times and memory."""
    report = json.loads((run.path / "report.json").read_text())
    losses = {
        name: [{k: v for k, v in point.items() if k != "wall_s"} for point in stage.get("curve", [])]
        for name in ("pretrain", "sft", "rl", "candidate")
        for stage in [json.loads((run.path / "stages" / f"{name}.json").read_text())]
    }
    return {"families": report["families"], "gate": report["gate"], "curves": losses}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, required=True, help="an empty directory for the two runs")
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    whole, killed, rng = RunDir(args.dir / "whole"), RunDir(args.dir / "killed"), random.Random(args.seed)
    finish(start(whole.path, args.seed))
    for stage in STAGES:
        lasting = json.loads((whole.path / "stages" / f"{stage}.json").read_text())["wall_s"]
        print(f"{stage:>10}  killed {kill_in(stage, killed.path, args.seed, lasting, rng)}", flush=True)
    finish(start(killed.path, args.seed))

    findings, books = doctor.examine(killed), doctor.books(killed)
    asked, outcomes = conversations(killed), [json.dumps(r["outcome"]) for r in read_journal(killed.traces) if r["kind"] == "outcome"]
    verdicts = {
        "same success, gate and curves": comparable(whole) == comparable(killed),
        f"ledger of {books['audit'].entries} entries sums to {books['audit'].sum_nano}, sound": books["audit"].sound,
        f"{findings.sessions} sessions, {findings.render_mismatches} render mismatches, max |dlogp| {findings.max_abs_dlogp:.1e}": findings.healthy,
        "no trace lost": set(conversations(whole)) <= set(asked),
        "no trace doubled": len(asked) == len(set(asked)) and len(outcomes) == len(set(outcomes)),
    }
    for what, holds in verdicts.items():
        print(f"{'ok' if holds else 'NOT SO':>7}  {what}")
    sys.exit(not all(verdicts.values()))


if __name__ == "__main__":
    main()
