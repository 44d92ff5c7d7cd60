"""A scheduler driven by hand: no thread, a clock that moves when told, results as plain lists."""

from dataclasses import dataclass, field

import numpy as np

from benchmarks.schedules import END, make
from tidelock.engine.limits import Limits
from tidelock.engine.scheduler import Scheduler
from tidelock.engine.sequence import Sequence
from tidelock.engine.weights import Weights
from tidelock.tokens.policy import Chunk, PolicyError, SamplingParams


@dataclass
class Got:
    """What one request was given."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    reason: str | None = None
    cached: int = 0
    error: PolicyError | None = None
    seq: Sequence | None = None

    def take(self, item: Chunk | PolicyError) -> None:
        if isinstance(item, PolicyError):
            self.error, self.reason = item, "error"
            return
        self.ids += item.ids
        self.logprobs += item.logprobs
        self.versions += [item.weights_version] * len(item.ids)
        self.reason, self.cached = item.finish_reason, item.cached_tokens

    @property
    def answer(self):
        return self.ids, self.logprobs


class Driver:
    def __init__(self, model="nano-k3", **limits):
        self.now = 0.0
        model = make(model, 0) if isinstance(model, str) else model
        sizes = {"n_pages": 256, "n_slots": 64, "page_size": 8, **limits}
        self.scheduler = Scheduler(Weights(model, 1), Limits(**sizes), END, clock=lambda: self.now)

    @property
    def stats(self):
        return self.scheduler.stats

    def submit(self, prompt, seed=1, **params) -> Got:
        got = Got()
        params = SamplingParams(**{"max_tokens": 8, **params})
        deadline = None if params.deadline_s is None else self.now + params.deadline_s
        got.seq = Sequence("r", np.array(prompt, dtype=np.int32), params, got.take, seed, deadline)
        self.scheduler.submit(got.seq)
        return got

    def step(self, n=1):
        for _ in range(n):
            self.scheduler.step()

    def drain(self):
        while self.scheduler.busy:
            self.step()

    def ask(self, prompt, **params) -> Got:
        got = self.submit(prompt, **params)
        self.drain()
        return got

    def swap(self, seed, version, go_on=False, model="nano-k3"):
        self.scheduler.swap(Weights(make(model, seed), version), go_on)
