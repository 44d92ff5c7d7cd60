"""One agent on one task: the same few lines for RL, evaluation and simulated users."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tidelock.agent import Agent, Episode
from tidelock.sandbox import ToolHost

from .registry import FAMILIES
from .task import Task

# Stops that are nobody's answer: the episode says nothing about the policy and is left out, never scored 0.
INFRASTRUCTURE = {"policy_error", "tool_crash", "aborted"}


@dataclass(frozen=True)
class Scored:
    """An episode and its verdict. `success` is None when infrastructure failed."""

    task: Task
    episode: Episode
    success: bool | None

    @property
    def reward(self) -> float | None:
        return None if self.success is None else float(self.success)


def episode_seed(seed: int, task: Task, attempt: int) -> int:
    """A seed of its own for every (run, task, attempt), the same on every machine."""
    digest = hashlib.blake2b(f"{seed}/{task.id}/{attempt}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big")


async def run_task(agent: Agent, host: ToolHost, task: Task, seed: int, attempt: int = 0) -> Scored:
    """Give the task to the agent with its tools in the sandbox, then verify answer and final world."""
    session = f"{task.id}/{attempt}"
    await host.open(session, task.world)
    try:
        episode = await agent.run(
            task.system(),
            task.prompt,
            lambda name, arguments: host.call(session, name, arguments),
            sandbox_level=host.level,
            seed=episode_seed(seed, task, attempt),
        )
    finally:
        world = await host.close(session)
    if episode.stop_reason in INFRASTRUCTURE:
        return Scored(task, episode, None)
    return Scored(task, episode, FAMILIES[task.family].verify(task, episode.answer, world))


async def run_tasks(
    agent: Agent,
    host: ToolHost,
    tasks: Sequence[tuple[Task, int]],
    seed: int,
    concurrency: int = 128,
    on_done: Callable[[Scored], None] = lambda scored: None,
) -> list[Scored]:
    """Many (task, attempt) pairs at once, at most `concurrency` in flight; results in the order given."""
    gate = asyncio.Semaphore(concurrency)

    async def one(task: Task, attempt: int) -> Scored:
        async with gate:
            scored = await run_task(agent, host, task, seed, attempt)
        on_done(scored)
        return scored

    return await asyncio.gather(*(one(task, attempt) for task, attempt in tasks))
