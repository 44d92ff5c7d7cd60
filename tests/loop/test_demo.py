"""The whole cycle in small: every stage for real, killed at random moments, exact to the bit at the end."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tidelock.loop import doctor
from tidelock.loop.console import Console
from tidelock.loop.demo import run_demo
from tidelock.loop.rundir import RunDir
from tidelock.loop.settings import DemoSettings
from tidelock.tokens.journal import read_journal
from tidelock.tokens.trace import Trace
from tidelock.train.loop import Recipe

FEW = Recipe(lr=0.02, steps=6, warmup=1)
SMALL = DemoSettings(
    seed=3, text_bytes=60_000, vocab_size=600, pretrain=FEW, sft=FEW, candidate=FEW, rl_iterations=1, rl_prompts=1,
    rl_group=2, heldout=3, gate=3, traffic_base=3, traffic_new=3, attempts=2, decline_every=2, max_tokens=24, concurrency=16,
)  # fmt: skip
STAGES = ["tokenizer", "pretrain", "sft", "rl", "serve", "before", "users", "dataset", "candidate", "gate", "swap", "after",
          "report"]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("demo")
    return RunDir(directory), run_demo(directory, SMALL, Console(quiet=True))


def sound(run: RunDir) -> doctor.Findings:
    findings, books = doctor.examine(run), doctor.books(run)
    assert findings.render_mismatches == 0 and findings.max_abs_dlogp <= doctor.TOLERANCE
    assert books["audit"].sound and books["audit"].sum_nano == 0
    return findings


def test_one_turn_of_the_loop_runs_and_everything_it_stored_is_exact(finished):
    run, report = finished
    findings = sound(run)
    assert findings.sessions > 0 and findings.sampled_tokens > 0
    assert list(report["stages"]) == STAGES[:-1] or list(report["stages"]) == STAGES
    assert {"seed", "wall_s", "peak_rss_bytes", "stages", "families", "gate", "ledger", "exactness"} <= report.keys()
    for f in report["families"].values():
        assert f["kind"] in ("base", "new") and f["before"]["n"] == f["after"]["n"] == 3
    assert report["ledger"]["sum_nano"] == 0 and report["ledger"]["overspend_nano"] == 0
    assert (run.path / "report.html").stat().st_size > 1000


def test_held_out_and_private_conversations_are_never_training_data(finished):
    run, _ = finished
    trace = Trace.read(run.traces)
    secrets = json.loads((run.path / "customers.json").read_text())
    assert any(not c["consent"] for c in secrets)
    refusing = [n for n in trace.nodes.values() if not n.consent]
    assert refusing and all(not trace.path(n.id)[0].consent for n in refusing)


def test_a_changed_logprob_or_message_is_found_by_the_doctor(finished, tmp_path):
    run, _ = finished
    records = read_journal(run.traces)
    from tidelock.tokens.journal import encode_record

    spoiled = [json.loads(json.dumps(r)) for r in records]
    victim = next(r["node"] for r in spoiled if r["kind"] == "node" and r["node"]["sampled"])
    victim["logprobs"][0] -= 0.01
    user = next(r["node"] for r in spoiled if r["kind"] == "node" and r["node"]["message"]["role"] == "user")
    user["message"]["content"] += "!"
    copy = tmp_path / "copy"
    (copy / "service").mkdir(parents=True)
    for name in ("tokenizer", "checkpoints", "releases.jsonl"):
        os.symlink(run.path / name, copy / name)
    (copy / "service" / "trace.jsonl").write_bytes(b"".join(map(encode_record, spoiled)))
    findings = doctor.examine(RunDir(copy))
    assert findings.render_mismatches > 0 and findings.max_abs_dlogp > 0.009 and not findings.healthy


def test_killed_at_random_moments_it_finishes_with_sound_books_and_no_trace_lost_or_doubled(finished, tmp_path):
    whole, _ = finished
    code = (
        "import sys; from pathlib import Path; from tests.loop.test_demo import SMALL; "
        "from tidelock.loop.console import Console; from tidelock.loop.demo import run_demo; "
        f"run_demo(Path({str(tmp_path / 'run')!r}), SMALL, Console(quiet=True))"
    )
    root = Path(__file__).parents[2]
    rng, kills = random.Random(1), 0
    for attempt in range(9):
        process = subprocess.Popen([sys.executable, "-c", code], cwd=root, stderr=subprocess.PIPE)
        try:
            _, error = process.communicate(timeout=None if attempt == 8 else rng.uniform(2.5, 6.5))
            assert process.returncode == 0, error.decode()[-500:]
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
            time.sleep(0.3)  # the server notices its parent's death
    assert kills >= 2
    run = RunDir(tmp_path / "run")
    sound(run)
    answered = lambda r: {(n.scope.split("/", 1)[1], n.ids) for n in Trace.read(r.traces).nodes.values() if n.sampled}  # noqa: E731
    assert answered(whole) <= answered(run)
    outcomes = [json.dumps(r["outcome"]) for r in read_journal(run.traces) if r["kind"] == "outcome"]
    assert len(outcomes) == len(set(outcomes))
