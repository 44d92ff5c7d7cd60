"""`tidelock rl`: the agent practises on tasks with verifiers."""

from __future__ import annotations

from .main import command
from .training import add_settings, run_stages


def add(subparsers) -> None:
    add_settings(command(subparsers, "rl", run, "reinforce a run's agent on verified tasks (trains what is missing first)",
                         "tidelock rl my-run --seed 3"))  # fmt: skip


def run(args) -> dict:
    return run_stages(args, ("tokenizer", "pretrain", "sft", "rl"))
