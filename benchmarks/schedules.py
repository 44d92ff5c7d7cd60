"""Random schedules of the engine against a naive reference: `python -m benchmarks.schedules --n 10000`.

A schedule is a seed: a model (MLA or hybrid), limits that are nearly too small, and a run of arrivals (new prompts,
next turns and branches of earlier ones), aborts, deadlines, pauses, weight swaps of both policies, evictions and
damaged offload files. The laws, checked in every one:

- every token and log-probability is what the plain forward, alone and without a cache, gives for the ids before it
  under the weights version the token was reported with (bit for bit; up to rounding without the compiled kernels);
- every page and slot has exactly the owners that can be found, after every step, and none is left at the end;
- every step with work to do runs at least one row, and every request ends exactly once, for its own reason.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from tidelock.engine.limits import Limits
from tidelock.engine.sampling import uniform
from tidelock.engine.scheduler import Scheduler
from tidelock.engine.sequence import DONE, Sequence
from tidelock.engine.weights import Weights
from tidelock.models import Batch, TransformerLM, ops, preset
from tidelock.models.serving import serving_copy
from tidelock.tokens.policy import Chunk, PolicyError, SamplingParams

VOCAB, END = 32, 9
LONGEST = 40  # tokens of prompt + answer


def make(name: str, seed: int) -> TransformerLM:
    """The preset's last two layers (a hybrid keeps one of each mixer), random weights with opinions."""
    c = preset(name, VOCAB)
    model = TransformerLM(replace(c, mixers=c.mixers[-2:], ffns=c.ffns[-2:]), seed=seed)
    for p in model.parameters():
        p.data.mul_(2.5)
    return model.eval()


class Naive:
    """The reference: one request at a time, every token from the whole prefix."""

    def __init__(self, name: str, versions: int = 3) -> None:
        self.models = [make(name, seed) for seed in range(versions)]
        self.served = [serving_copy(model, "fp32") for model in self.models]  # what the engine runs: quick, and equal
        self._logits: dict[tuple[int, bytes], torch.Tensor] = {}

    def logits(self, which: int, ids: np.ndarray) -> torch.Tensor:
        """[len(ids), V], the training forward."""
        key = which, ids.tobytes()
        if key not in self._logits:
            if len(self._logits) > 4096:
                self._logits.clear()
            n, model = len(ids), self.models[which]
            batch = Batch(torch.from_numpy(ids.astype(np.int64)), torch.tensor([0, n], dtype=torch.int32),
                          torch.zeros(1, dtype=torch.int32))  # fmt: skip
            with torch.no_grad():
                self._logits[key] = model.logits(model(batch))
        return self._logits[key]

    def check(self, asked: Asked) -> None:
        """The answer, token by token."""
        seq, params = asked.seq, asked.seq.params
        ids = np.array([*seq.prompt, *asked.ids], dtype=np.int32)
        for i, (token, logprob, version) in enumerate(zip(asked.ids, asked.logprobs, asked.versions)):
            row = self.logits(asked.weights_of[version], ids)[len(seq.prompt) + i - 1]
            want = draw(row.numpy(), params.temperature, params.top_p, asked.seed, i)
            assert want == token, f"{seq.request_id}: token {i} is {token}, alone it is {want}"
            off = abs(float(torch.log_softmax(row, -1)[token]) - logprob)
            assert off == 0 or (not ops.exact() and off < 1e-4), f"{seq.request_id}: token {i} is off by {off} nats"


def draw(logits: np.ndarray, temperature: float, top_p: float, seed: int, position: int) -> int:
    """One token, by the book."""
    if temperature == 0:
        return int(logits.argmax())
    p = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    order = np.argsort(-p, kind="stable")
    kept = order[np.cumsum(p[order]) - p[order] < top_p * p.sum()]
    p[np.setdiff1d(order, kept)] = 0
    edges = np.cumsum(p)
    u = uniform(np.array([seed], np.uint64), np.array([position], np.uint64))[0]
    return int(np.searchsorted(edges, u * edges[-1], side="right"))


@dataclass
class Asked:
    """A request and what came back."""

    seq: Sequence
    seed: int
    weights_of: dict[int, int]  # version -> index of the model
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    reason: str | None = None
    aborted: bool = False

    def take(self, chunk: Chunk | PolicyError) -> None:
        assert not isinstance(chunk, PolicyError), str(chunk)
        assert self.reason is None, f"{self.seq.request_id}: a chunk after the last one"
        self.ids += chunk.ids
        self.logprobs += chunk.logprobs
        self.versions += [chunk.weights_version] * len(chunk.ids)
        self.reason = chunk.finish_reason


class Schedule:
    """One seed's run."""

    def __init__(self, seed: int, naive: Naive, directory: Path) -> None:
        self.rng = rng = random.Random(seed)
        self.naive, self.directory, self.now = naive, directory, 0.0
        page = rng.choice([4, 8])
        tiered = rng.random() < 0.3
        self.limits = Limits(
            max_batch=rng.randint(1, 5), step_tokens=rng.choice([4, 16, 64]), page_size=page,
            n_pages=LONGEST // page + rng.randint(0, 20), n_slots=rng.randint(1, 8), patience=rng.choice([8, 64, 4096]),
            stream_every=rng.randint(1, 3), reuse=rng.random() < 0.95,
            host_bytes=rng.choice([0, 60_000, 10**7]) if tiered else 0, disk_bytes=10**6 if tiered else 0,
            disk_dir=str(directory) if tiered else None, draft_tokens=rng.choice([0, 5]),
        )  # fmt: skip
        self.version, self.weights_of = 0, {0: 0}
        self.scheduler = Scheduler(Weights(naive.served[0], 0), self.limits, END, clock=lambda: self.now)
        self.asked: list[Asked] = []

    def run(self) -> Counter:
        events, weights = zip(*{
            self.arrive: 30, self.step: 50, self.abort: 5, self.swap: 3, self.evict: 5, self.pause: 3, self.damage: 2,
        }.items())  # fmt: skip
        for _ in range(self.rng.randint(10, 40)):
            self.rng.choices(events, weights)[0]()
        while self.scheduler.busy:
            self.step()
        for asked in self.asked:
            self.judge(asked)
        self.nothing_is_left()
        return Counter(requests=len(self.asked), tokens=sum(len(a.ids) for a in self.asked), swaps=self.version,
                       cached=self.scheduler.stats.cached, evicted=self.scheduler.stats.evicted,
                       restored=self.scheduler.stats.restored, **Counter(a.reason for a in self.asked))  # fmt: skip

    # -- events -------------------------------------------------------------------------------------------------------

    def arrive(self) -> None:
        rng = self.rng
        earlier = rng.choice(self.asked) if self.asked and rng.random() < 0.7 else None
        begin = [*earlier.seq.prompt.tolist(), *earlier.ids] if earlier else [1, 2, 3, END]
        begin = begin if rng.random() < 0.6 else begin[: rng.randint(0, len(begin))]
        new = [rng.choice([END, *range(12)]) for _ in range(rng.randint(0 if begin else 1, 12))]
        prompt = [*begin, *new][: LONGEST - 1]
        for _ in range(rng.choice([1, 1, 1, 2, 4])):  # a group of samples of one prompt
            params = SamplingParams(
                max_tokens=rng.randint(1, LONGEST - len(prompt)), temperature=rng.choice([0.0, 0.7, 1.0]),
                top_p=rng.choice([1.0, 0.8]), stop_ids=(END,), tenant=rng.choice("abc"), priority=rng.choice([-1, 0, 0, 5]),
            )  # fmt: skip
            deadline = self.now + rng.randint(0, 30) if rng.random() < 0.1 else None
            asked = Asked(None, rng.getrandbits(63), self.weights_of)
            asked.seq = Sequence(f"r{len(self.asked)}", np.array(prompt, dtype=np.int32), params, asked.take,
                                 asked.seed, deadline)  # fmt: skip
            self.asked.append(asked)
            self.scheduler.submit(asked.seq)

    def step(self) -> None:
        stats, self.now = self.scheduler.stats, self.now + 1
        before, busy = (stats.served, stats.finished), self.scheduler.busy
        self.scheduler.step()
        assert not busy or (stats.served, stats.finished) != before, "a step with work to do did nothing"
        self.everything_has_its_owners()

    def abort(self) -> None:
        if self.asked:
            asked = self.rng.choice(self.asked)
            asked.aborted |= asked.seq.state != DONE
            self.scheduler.end(asked.seq, "abort")

    def swap(self) -> None:
        self.version += 1
        self.weights_of[self.version] = self.rng.randrange(len(self.naive.models))
        weights = Weights(self.naive.served[self.weights_of[self.version]], self.version)
        self.scheduler.swap(weights, go_on=self.rng.random() < 0.5)
        self.everything_has_its_owners()

    def evict(self) -> None:
        n = self.limits
        self.scheduler.eviction.make_room(self.rng.randint(0, n.n_pages), self.rng.randint(0, n.n_slots))

    def pause(self) -> None:
        """Frozen: time goes by, and deadlines with it."""
        self.now += self.rng.randint(1, 10)
        self.scheduler.expire()

    def damage(self) -> None:
        for file in self.directory.rglob("*.kv"):
            if self.rng.random() < 0.5:
                file.unlink() if self.rng.random() < 0.5 else file.write_bytes(file.read_bytes()[:-1] + b"!")

    # -- laws ---------------------------------------------------------------------------------------------------------

    def judge(self, asked: Asked) -> None:
        seq, n = asked.seq, len(asked.ids)
        allowed = {"abort": asked.aborted, "deadline": seq.deadline is not None and seq.deadline <= self.now,
                   "length": n == seq.params.max_tokens, "stop": n > 0 and asked.ids[-1] == END}  # fmt: skip
        assert allowed.get(asked.reason), f"{seq.request_id} ended with {asked.reason} after {n} tokens"
        assert END not in asked.ids[:-1]
        self.naive.check(asked)

    def everything_has_its_owners(self) -> None:
        pages, slots = Counter(), Counter()
        for holder in (*self.scheduler.tree, *self.scheduler.running):
            pages.update(holder.pages or ())
            if holder.slot is not None and holder.slot >= 0:
                slots[holder.slot] += 1
        memory = self.scheduler.memory
        for pool, found in ((memory.pages, pages), (memory.slots, slots)):
            owners = {i: n for i, n in enumerate(pool._owners) if n}
            assert owners == dict(found), f"owners {owners}, holders {dict(found)}"
            assert pool.free == pool.size - len(owners)
        pins = sum(node.pins for node in self.scheduler.tree)
        assert pins <= len(self.scheduler.running)

    def nothing_is_left(self) -> None:
        assert set(self.scheduler.tree._roots) <= {self.scheduler.weights}, "a retired version's cache is still there"
        self.scheduler.tree.clear()
        self.everything_has_its_owners()
        memory, store = self.scheduler.memory, self.scheduler.store
        assert (memory.pages.free, memory.slots.free) == (memory.pages.size, memory.slots.size)
        assert not len(self.scheduler.line) and not self.scheduler.running
        assert not store._host and not store._disk, "something offloaded was forgotten"
        self.scheduler.close()


def run(n: int, first: int = 0) -> Counter:
    """Schedules first..first + n, alternating the models. Raises AssertionError naming the seed."""
    total, naive = Counter(), {name: Naive(name) for name in ("nano-k3", "nano-k2")}
    for seed in range(first, first + n):
        with tempfile.TemporaryDirectory() as directory:
            try:
                total += Schedule(seed, naive[("nano-k3", "nano-k2")[seed % 2]], Path(directory)).run()
            except Exception as e:
                raise AssertionError(f"schedule {seed}: {type(e).__name__}: {e}") from e
    return total


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--n", type=int, default=1000, help="how many schedules")
    p.add_argument("--first", type=int, default=0, help="seed of the first one")
    args = p.parse_args()
    began = time.time()
    total = run(args.n, args.first)
    print(f"{args.n} schedules (seeds {args.first}..{args.first + args.n - 1}): no token differs, no page or slot leaks, "
          f"no step stalls; {time.time() - began:.0f} s")  # fmt: skip
    for name, count in total.items():
        print(f"  {name:>10}  {count}")


if __name__ == "__main__":
    main()
