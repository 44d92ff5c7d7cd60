"""A policy that replays scripted turns as real template ids, and the price it is sold at."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from tidelock.service.prices import Price
from tidelock.tokens.message import Message
from tidelock.tokens.policy import Chunk, PolicyError, SamplingParams, Times

PRICE = Price(input_nano=300, cached_input_nano=30, output_nano=1500)


@dataclass
class ScriptedPolicy:
    """Answers with `turns` in order (the last one for ever), `per_chunk` tokens at a time, `pause_s` apart."""

    template: object
    turns: list[Message] = field(default_factory=lambda: [Message("assistant", "hello", reasoning="hm")])
    literal: list[int] | None = None  # these ids instead of a turn
    per_chunk: int = 5
    pause_s: float = 0.0
    fail_after: int | None = None  # chunks before a PolicyError
    cached_tokens: int = 0
    times: Times | None = None
    version: int = 1
    exact: bool = True
    prompts: list[tuple[int, ...]] = field(default_factory=list)
    params: list[SamplingParams] = field(default_factory=list)
    sampled: list[list[int]] = field(default_factory=list)  # by request: what was handed out
    aborted: set[str] = field(default_factory=set)
    swapped: list[tuple[str, int]] = field(default_factory=list)

    async def generate(self, prompt_ids, params, request_id=None):
        self.prompts.append(tuple(prompt_ids))
        self.params.append(params)
        handed_out: list[int] = []
        self.sampled.append(handed_out)
        turn = self.turns[min(len(self.prompts), len(self.turns)) - 1]
        ids = self.literal or self.template.render([turn])[len(self.template.generation_prompt()) :]
        finish = "length" if params.max_tokens < len(ids) else "stop"
        ids = ids[: params.max_tokens]
        for n, start in enumerate(range(0, len(ids), self.per_chunk)):
            if self.fail_after == n:
                raise PolicyError("the engine is full", status=503)
            await asyncio.sleep(self.pause_s)
            if request_id in self.aborted:
                yield Chunk((), (), self.version, "abort")
                return
            part = tuple(ids[start : start + self.per_chunk])
            handed_out += part
            last = start + self.per_chunk >= len(ids)
            reason, cached = (finish, self.cached_tokens) if last else (None, 0)
            yield Chunk(part, (-0.5,) * len(part), self.version, reason, cached, times=self.times if last else None)

    async def count(self, prompt_ids):
        return len(prompt_ids)

    async def abort(self, request_id):
        self.aborted.add(request_id)

    async def swap(self, checkpoint, version):
        if checkpoint == "missing":
            raise PolicyError("no such checkpoint", status=400, kind="invalid_request_error")
        self.swapped.append((checkpoint, version))
        self.version = version
