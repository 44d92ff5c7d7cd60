"""`tidelock sft`: the base model learns to be the agent from demonstrations."""

from __future__ import annotations

from .main import command
from .training import add_settings, run_stages


def add(subparsers) -> None:
    add_settings(command(subparsers, "sft", run, "fine-tune a run's base model on demonstrations (pretrains first if needed)",
                         "tidelock sft my-run --seed 3"))  # fmt: skip


def run(args) -> dict:
    return run_stages(args, ("tokenizer", "pretrain", "sft"))
