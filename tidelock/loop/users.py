"""Simulated users: tasks given to the agent product, which reaches the model only through the served HTTP API.

A user has an API key and a request. When the answer is wrong they ask in smaller steps, or once more, and they tell the
service how it went.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from tidelock.agent import Agent, Episode
from tidelock.envs.registry import FAMILIES
from tidelock.envs.run import INFRASTRUCTURE, episode_seed
from tidelock.envs.task import Task
from tidelock.remote import Client, TextPolicy
from tidelock.remote.sse import Endpoint
from tidelock.sandbox import ToolHost
from tidelock.tokens.policy import SamplingParams
from tidelock.tokens.template import Template


@dataclass(frozen=True)
class Customer:
    """Somebody with a key. `consent`: whether their requests may be learned from."""

    name: str
    secret: str
    consent: bool


@dataclass(frozen=True)
class Asked:
    """A request put to the agent, in one conversation or in several, and the user's verdict (None: it broke down)."""

    task: Task
    episode: Episode  # the last conversation
    success: bool | None
    node: str  # trace node of the last answer
    sampled_tokens: int


@dataclass(frozen=True)
class Office:
    """Where users work: the service's URL, the sandbox their tools run in, and the connections they share."""

    base_url: str
    model: str
    template: Template
    host: ToolHost
    client: Client

    async def visit(
        self, customer: Customer, task: Task, attempts: int, seed: int, params: SamplingParams
    ) -> list[Asked]:
        """Ask until it is right, at most `attempts` times; in smaller steps from the second time on where there are any."""
        tried = [await self.ask(customer, task, [task.prompt], 0, seed, params)]
        while not tried[-1].success and len(tried) < attempts:
            wordings = task.steps or [task.prompt]
            request = tried[0].node if task.steps else None
            tried.append(await self.ask(customer, task, wordings, len(tried), seed, params, request=request))
        return tried

    async def ask(
        self,
        customer: Customer,
        task: Task,
        wordings: Sequence[str],
        attempt: int,
        seed: int,
        params: SamplingParams,
        *,
        feedback: bool = True,
        request: str | None = None,
    ) -> Asked:
        """One conversation per wording over the same world; {} in a wording is the answer before. Judged at the end."""
        session = f"{task.id}/{seed}/{attempt}"
        await self.host.open(session, task.world)
        answer, nodes, tokens = "", [], 0
        try:
            for i, wording in enumerate(wordings):
                policy = self._policy(customer, f"{session}/{i}")
                episode = await Agent(policy, self.template, params).run(
                    task.system(), wording.format(answer), partial(self.host.call, session),
                    sandbox_level=self.host.level, seed=episode_seed(seed, task, attempt * 100 + i),
                )  # fmt: skip
                answer, tokens = episode.answer, tokens + episode.sampled_tokens
                nodes.append(policy.last.get("trace", {}).get("node", ""))
                if episode.stop_reason != "answered":
                    break
        finally:
            world = await self.host.close(session)
        if episode.stop_reason in INFRASTRUCTURE:
            return Asked(task, episode, None, nodes[-1], tokens)
        whole = len(nodes) == len(wordings) and episode.stop_reason == "answered"
        success = whole and FAMILIES[task.family].verify(task, answer, world)
        if feedback:
            await self._feedback(customer, task, success, nodes, request)
        return Asked(task, episode, success, nodes[-1], tokens)

    def _policy(self, customer: Customer, session: str) -> TextPolicy:
        metadata = {
            "session_id": session,
            "sandbox_level": self.host.level,
            "training_consent": str(customer.consent).lower(),
        }
        return TextPolicy(self.base_url, customer.secret, self.model, self.template, metadata, self.client)

    async def _feedback(
        self, customer: Customer, task: Task, success: bool, nodes: list[str], request: str | None
    ) -> None:
        body: dict[str, Any] = {"node": nodes[-1], "success": success, "reward": float(success)}
        body["source"] = f"verifier:{task.family}"
        if request is not None:
            body |= {"request": request, "steps": nodes}
        await Endpoint(self.base_url, customer.secret, self.client).call("POST", "/feedback", body)


async def together(jobs: Sequence[Callable], concurrency: int, on_done: Callable = lambda result: None) -> list:
    """Run coroutine factories, at most `concurrency` at once; results in order."""
    gate = asyncio.Semaphore(concurrency)

    async def one(job: Callable):
        async with gate:
            result = await job()
        on_done(result)
        return result

    return await asyncio.gather(*(one(job) for job in jobs))
