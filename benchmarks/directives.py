"""What it does to a trained model to be told what its answer is held to.

    python -m benchmarks.directives RUN_DIRECTORY [--checkpoint DIR] [-n 10]

Solved tasks nobody trained on, turn by turn: how likely the model thinks each right turn, and whether it would say it
greedily, told nothing, told what is so (`tool_choice`), and told what is not.
"""

from __future__ import annotations

import argparse
import itertools
from collections import defaultdict
from pathlib import Path

import torch

from tidelock.envs.registry import demos, names_of
from tidelock.envs.task import Demo
from tidelock.loop.rundir import RunDir
from tidelock.models import Batch, TransformerLM
from tidelock.tokens.directives import response_format, tool_choice
from tidelock.tokens.message import Message
from tidelock.tokens.template import Template

AT_ONCE = 24  # turns in a forward
Turn = tuple[tuple[str, str], list[int], list[int]]  # (kind, what it was told), prompt, ids


def turns(demo: Demo, template: Template) -> list[Turn]:
    out: list[Turn] = []
    for i, message in enumerate(demo.messages):
        if message.role != "assistant":
            continue
        told: dict[str, list[Message]] = {"nothing": []}
        if message.tool_calls:
            kind, name = "call", message.tool_calls[0].name
            told |= {"required": [tool_choice("required")], "its name": [tool_choice(name)],
                     "none (wrong)": [tool_choice("none")]}  # fmt: skip
        else:
            kind = "answer"
            told |= {"none": [tool_choice("none")], "required (wrong)": [tool_choice("required")],
                     "an object (wrong)": [tool_choice("none"), response_format()]}  # fmt: skip
        for name, said in told.items():
            prompt = template.render([*demo.messages[:i], *said], generation_prompt=True)
            out.append(((kind, name), prompt, template.turn(message)))
    return out


@torch.no_grad()
def scores(model: TransformerLM, part: list[Turn]) -> list[tuple[float, bool]]:
    """(log-probability of the turn, whether it is the greedy one)."""
    lengths = [len(prompt) + len(ids) for _, prompt, ids in part]
    cu = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    ids = torch.tensor([i for _, prompt, said in part for i in (*prompt, *said)])
    hidden = model(Batch(ids, cu, torch.zeros(len(part), dtype=torch.int32)))
    out = []
    for end, (_, _, said) in zip(cu[1:].tolist(), part, strict=True):
        logits, target = model.logits(hidden[end - len(said) - 1 : end - 1]).float(), torch.tensor(said)
        logp = logits.log_softmax(-1).gather(1, target[:, None])
        out.append((float(logp.sum()), bool((logits.argmax(-1) == target).all())))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", type=Path)
    parser.add_argument("--checkpoint", type=Path, help="default: the release that serves")
    parser.add_argument("-n", type=int, default=10, help="tasks of each family")
    args = parser.parse_args()
    run = RunDir(args.dir).existing()
    model, template = run.load(args.checkpoint or run.path / run.registry.current().checkpoint), run.template()
    solved = [demo for name in names_of("base") for demo in itertools.islice(demos(name, "gate", 5), args.n)]
    asked = [turn for demo in solved for turn in turns(demo, template)]
    asked.sort(key=lambda turn: len(turn[1]))
    rows: dict[tuple[str, str], list[tuple[float, bool]]] = defaultdict(list)
    for at in range(0, len(asked), AT_ONCE):
        part = asked[at : at + AT_ONCE]
        for (key, _, _), score in zip(part, scores(model, part), strict=True):
            rows[key].append(score)
    print("| the right turn is | told | turns | log-probability | greedy |\n|---|---|---:|---:|---:|")
    for (kind, told), found in sorted(rows.items()):
        mean, greedy = (sum(f[i] for f in found) / len(found) for i in (0, 1))
        print(f"| {kind} | {told} | {len(found)} | {mean:.2f} | {greedy:.0%} |")


if __name__ == "__main__":
    main()
