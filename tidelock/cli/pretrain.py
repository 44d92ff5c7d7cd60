"""`tidelock pretrain`: tokenizer and base model from text and demonstrations."""

from __future__ import annotations

from .main import command
from .training import add_settings, run_stages


def add(subparsers) -> None:
    add_settings(command(subparsers, "pretrain", run, "train the tokenizer and the base model of a run directory",
                         "tidelock pretrain my-run --seed 3 --text ~/notes"))  # fmt: skip


def run(args) -> dict:
    return run_stages(args, ("tokenizer", "pretrain"))
