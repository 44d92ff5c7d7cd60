"""The families by name, and tasks by split."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from random import Random

from tidelock.tokens.errors import UserError

from .families.arithmetic import ARITHMETIC
from .families.convert import CONVERSION
from .families.hops import DEEP_HOPS, HOPS
from .families.lookup import LOOKUP
from .families.lookup_convert import LOOKUP_CONVERT
from .families.records import RECORDS
from .task import Demo, Family, Task, demonstrate

FAMILIES: dict[str, Family] = {
    f.name: f for f in (ARITHMETIC, LOOKUP, HOPS, RECORDS, CONVERSION, DEEP_HOPS, LOOKUP_CONVERT)
}

# Share of all prompts, in 64ths. A prompt's hash decides its split, so no two splits can share one.
SPLITS = {"train": 32, "rl": 8, "traffic": 8, "gate": 8, "heldout": 8}


def family(name: str) -> Family:
    if name not in FAMILIES:
        raise UserError(f"unknown family {name!r}; choose from {', '.join(FAMILIES)}")
    return FAMILIES[name]


def names_of(kind: str) -> list[str]:
    return [f.name for f in FAMILIES.values() if f.kind == kind]


def split_of(task: Task) -> str:
    point = hashlib.blake2b(f"{task.family}\0{task.prompt}".encode(), digest_size=8).digest()[0] % 64
    for split, share in SPLITS.items():
        if point < share:
            return split
        point -= share
    raise AssertionError("the shares of SPLITS add up to 64")


def demos(name: str, split: str, seed: int) -> Iterator[Demo]:
    """Endless solved tasks of one family from one split; prompts may come again with another world."""
    rng = Random(f"{name}/{split}/{seed}")
    while True:
        demo = demonstrate(family(name), rng)
        if split_of(demo.task) == split:
            yield demo


def tasks(name: str, split: str, seed: int, n: int) -> list[Task]:
    """n tasks with different prompts."""
    seen: dict[str, Task] = {}
    for demo in demos(name, split, seed):
        if len(seen) == n:
            break
        seen.setdefault(demo.task.prompt, demo.task)
    return list(seen.values())
