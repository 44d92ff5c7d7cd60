"""Seeded load: what is said to a server and when. The same seed is the same load for every server.

A request is a `Step`; a conversation is a chain of steps, each saying its `new` tokens after everything before it and the
answer to it; a branch is a step with two that follow. Tokens are plain numbers below `VOCAB`, the bytes of our tokenizers.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

VOCAB = 256
Ids = tuple[int, ...]


@dataclass(frozen=True)
class Step:
    """Say `new`, have `answer` tokens sampled, go on with all of `then` at once."""

    new: Ids
    answer: int
    then: tuple[Step, ...] = ()

    def all(self) -> Iterator[Step]:
        yield self
        for step in self.then:
            yield from step.all()


@dataclass(frozen=True)
class Start:
    """A conversation that begins `at` seconds into the run, behind an `opening` that others may share."""

    at: float
    opening: Ids
    step: Step


@dataclass(frozen=True)
class Load:
    name: str
    starts: tuple[Start, ...]
    concurrency: int | None = None  # conversations at a time; None: each begins when it does

    @property
    def requests(self) -> int:
        return sum(1 for s in self.starts for _ in s.step.all())


def poisson(
    seed: int, requests: int, rate: float, *, prompt: tuple[int, int] = (64, 384), answer: int = 64, shared: int = 64
) -> Load:
    """`requests` single questions, `rate` a second on average with exponential gaps, all behind one shared opening."""
    rng, at, starts = random.Random(f"poisson/{seed}"), 0.0, []
    opening = _ids(rng, shared)
    for _ in range(requests):
        at += rng.expovariate(rate)
        starts.append(Start(at, opening, Step(_ids(rng, rng.randint(*prompt)), answer)))
    return Load("poisson", tuple(starts))


def agents(
    seed: int, conversations: int, turns: int, *, concurrency: int = 16, branch: float = 0.15, opening: int = 256,
    tool: tuple[int, int] = (40, 400), answer: tuple[int, int] = (16, 48), families: int = 4, context: int = 2048,
) -> Load:  # fmt: skip
    """Tool loops: an opening (system prompt and tools) shared within each of `families`, `turns` turns of a tool's result
    and an answer, and with probability `branch` after a turn two ways on. A path ends before `context` tokens."""
    rng = random.Random(f"agents/{seed}")
    openings = [_ids(rng, opening) for _ in range(families)]

    def step(left: int, room: int) -> Step:
        new, said = _ids(rng, rng.randint(*tool)), rng.randint(*answer)
        room -= len(new) + said + 8  # what a client's framing adds
        fits = left > 1 and room > tool[1] + answer[1] + 8
        ways = (2 if rng.random() < branch else 1) if fits else 0
        return Step(new, said, tuple(step(left - 1, room) for _ in range(ways)))

    starts = tuple(Start(0.0, openings[i % families], step(turns, context - opening)) for i in range(conversations))
    return Load("agents", starts, concurrency)


def reusable(load: Load) -> int:
    """Prompt tokens that some earlier request of the load has already been through: what a perfect cache would save."""
    total, seen = 0, set()
    for start in load.starts:
        total += len(start.opening) if start.opening in seen else 0
        seen.add(start.opening)
        total += _behind(start.step, len(start.opening), first=True)
    return total


def _behind(step: Step, before: int, first: bool) -> int:
    whole = before + len(step.new) + step.answer
    return (0 if first else before) + sum(_behind(s, whole, first=False) for s in step.then)


def _ids(rng: random.Random, n: int) -> Ids:
    return tuple(rng.randrange(VOCAB) for _ in range(n))


def as_text(ids: Sequence[int]) -> str:
    """Something of about as many tokens for servers that take text: letters in words of five."""
    return "".join(chr(97 + i % 26) + (" " if at % 5 == 4 else "") for at, i in enumerate(ids))
