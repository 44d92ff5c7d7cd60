"""Continuous batching for one version of the weights: which tokens run in the next step, and what their cache is.

A step packs the next token of every running sequence with prefill chunks of new ones, under a token budget. Resources
for prompt + max_tokens are reserved on admission, so a running sequence never has to be thrown out.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np
import torch

from tidelock.models import Batch, Cache, CacheView, TransformerLM
from tidelock.tokens.policy import Chunk, PolicyError

from .blocks import Pool
from .prefix import PrefixCache
from .sampling import sample
from .sequence import Sequence


@dataclass
class Stats:
    steps: int = 0
    prefilled: int = 0
    cached: int = 0
    decoded: int = 0


@dataclass(frozen=True)
class Limits:
    max_batch: int = 64
    step_tokens: int = 2048
    n_pages: int = 8192
    page_size: int = 16
    n_slots: int = 1024
    queue: int = 4096
    stream_every: int = 4  # tokens per chunk of a stream
    context: int | None = None  # None: the model's own limit


@dataclass
class Scheduler:
    """The sequences of one weights version, their cache and its bookkeeping."""

    model: TransformerLM
    version: int
    limits: Limits
    boundary_id: int | None
    stats: Stats = field(default_factory=Stats)

    def __post_init__(self) -> None:
        n = self.limits
        self.cache = Cache(self.model.config, n.n_pages, n.page_size, n.n_slots)
        self.pages, self.slots = Pool(n.n_pages), Pool(n.n_slots)
        self.prefix = PrefixCache(self.pages, self.slots)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    def renew(self, model: TransformerLM, version: int) -> None:
        """Serve other weights with the same buffers. Only when idle: what is cached belongs to the old weights."""
        assert not self.busy
        self.prefix.clear()
        self.model, self.version = model, version

    def step(self) -> None:
        """Admit, run one packed forward, sample, deliver."""
        self._drop_aborted()
        self._admit()
        work = self._plan()
        if work:
            self._run(work)

    def fail_all(self, error: PolicyError) -> None:
        for seq in (*self.running, *self.waiting):
            seq.deliver(error)
        for seq in self.running:
            self._free(seq)
        self.running, self.waiting = [], deque()

    # -- admission ----------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """First come, first served. A prompt whose shared prefix is being computed right now waits for it."""
        held: list[Sequence] = []
        coming = {tuple(s.ids[: s.snapshot_at]) for s in self.running if s.computed < s.snapshot_at}
        while self.waiting and len(self.running) < self.limits.max_batch:
            seq = self.waiting.popleft()
            boundaries = self._boundaries(seq.prompt)
            wanted = seq.prompt[: boundaries[-2]] if len(boundaries) > 1 else ()
            if wanted in coming:
                held.append(seq)
                continue
            if not self._reserve(seq, boundaries, wanted):
                held.append(seq)
                break
            if seq.snapshot_at:
                coming.add(wanted)
            self.running.append(seq)
        self.waiting.extendleft(reversed(held))

    def _boundaries(self, prompt: tuple[int, ...]) -> list[int]:
        """Positions just before each end-of-message token."""
        return [i for i, token in enumerate(prompt) if token == self.boundary_id and i > 0]

    def _reserve(self, seq: Sequence, boundaries: list[int], wanted: tuple[int, ...]) -> bool:
        size = self.limits.page_size
        found = self.prefix.longest(seq.prompt, boundaries)
        start = found.length if found else 0
        shared = [self.pages.share(p) for p in found.pages[: start // size]] if found else []
        if found:  # hold what we are about to read while others are evicted
            self.slots.share(found.slot)
            for p in found.pages:
                self.pages.share(p)
        need = -(-(len(seq.prompt) + seq.params.max_tokens) // size) - len(shared)
        snapshot = start == 0 and bool(wanted)
        while self.pages.free < need or self.slots.free < 1 + snapshot:
            if not self.prefix.evict():
                break
        enough = self.pages.free >= need and self.slots.free >= 1 + snapshot
        if enough:
            seq.pages = shared + [self.pages.take() for _ in range(need)]
            seq.slot = self.slots.take()
            seq.computed = seq.cached = start
            seq.snapshot_at = len(wanted) if snapshot else 0
            if found:
                self.cache.copy_slot(found.slot, seq.slot)
                if start % size:
                    self.cache.copy_page(found.pages[start // size], seq.pages[start // size])
        if found:
            self.slots.release(found.slot)
            for p in found.pages:
                self.pages.release(p)
        if not enough:
            for p in shared:
                self.pages.release(p)
        return enough

    # -- one step -----------------------------------------------------------------------------------------------------

    def _plan(self) -> list[tuple[Sequence, int]]:
        """(sequence, rows) of the next forward: sequences that decode first, then prefill within the budget."""
        budget = self.limits.step_tokens
        work = []
        for seq in sorted(self.running, key=lambda s: len(s.ids) - s.computed > 1):
            rows = seq.next_rows(budget)
            if rows > 0:
                work.append((seq, rows))
                budget -= rows
        return work

    def _run(self, work: list[tuple[Sequence, int]]) -> None:
        lengths = np.array([rows for _, rows in work])
        cu = np.concatenate([[0], lengths.cumsum()]).astype(np.int32)
        ids = np.concatenate([np.array(s.ids[s.computed : s.computed + rows]) for s, rows in work])
        start = np.array([s.computed for s, _ in work], dtype=np.int32)
        table = np.zeros((len(work), max(len(s.pages) for s, _ in work)), dtype=np.int32)
        for row, (s, _) in zip(table, work):
            row[: len(s.pages)] = s.pages
        slots = np.array([s.slot for s, _ in work], dtype=np.int32)
        batch = Batch(*(torch.from_numpy(a) for a in (ids.astype(np.int64), cu, start)))
        view = CacheView(torch.from_numpy(table), torch.from_numpy(slots))
        with torch.no_grad():
            hidden = self.model(batch, self.cache, view)
            self.stats.steps += 1
            ready = []
            for i, (seq, rows) in enumerate(work):
                seq.computed += rows
                if len(seq.ids) > len(seq.prompt):
                    self.stats.decoded += 1
                else:
                    self.stats.prefilled += rows
                if seq.computed == seq.snapshot_at:
                    self._snapshot(seq)
                if seq.computed == len(seq.ids):
                    ready.append(i)
            if ready:
                logits = self.model.logits(hidden[torch.from_numpy(cu[1:][ready].astype(np.int64) - 1)])
                self._sample([work[i][0] for i in ready], logits)

    def _snapshot(self, seq: Sequence) -> None:
        """Keep the state at `seq.computed` tokens in a slot of its own."""
        key = tuple(seq.ids[: seq.computed])
        if key in self.prefix:
            return
        while not self.slots.free and self.prefix.evict():
            pass
        if self.slots.free:
            slot = self.slots.take()
            self.cache.copy_slot(seq.slot, slot)
            self.prefix.keep(key, seq.pages[: -(-seq.computed // self.limits.page_size)], slot)

    def _sample(self, ready: list[Sequence], logits: torch.Tensor) -> None:
        ids, logprobs = sample(
            logits,
            np.array([s.params.temperature for s in ready]),
            np.array([s.params.top_p for s in ready]),
            np.array([s.seed for s in ready], dtype=np.uint64),
            np.array([s.sampled for s in ready], dtype=np.uint64),
        )
        for seq, token, logprob in zip(ready, ids.tolist(), logprobs.tolist()):
            if logprob != logprob:
                seq.deliver(PolicyError("the model produced a value that is not a number", status=500, kind="server_error"))
                self._retire(seq)
                continue
            seq.ids.append(token)
            seq.unsent_ids.append(token)
            seq.unsent_logprobs.append(logprob)
            stopped = token in seq.params.stop_ids
            if stopped or seq.sampled >= seq.params.max_tokens:
                self._send(seq, "stop" if stopped else "length")
                if stopped and token == self.boundary_id:
                    self._keep_turn(seq)
                self._retire(seq)
            elif len(seq.unsent_ids) >= self.limits.stream_every:
                self._send(seq, None)

    def _send(self, seq: Sequence, finish_reason: str | None) -> None:
        chunk = Chunk(tuple(seq.unsent_ids), tuple(seq.unsent_logprobs), self.version, finish_reason, seq.cached)
        seq.unsent_ids, seq.unsent_logprobs = [], []
        seq.deliver(chunk)

    def _keep_turn(self, seq: Sequence) -> None:
        """The finished turn's state, up to its end-of-message token, becomes a snapshot; its slot goes with it."""
        key = tuple(seq.ids[: seq.computed])
        if key not in self.prefix:
            self.prefix.keep(key, seq.pages[: -(-seq.computed // self.limits.page_size)], seq.slot)
            seq.slot = -1

    # -- endings ------------------------------------------------------------------------------------------------------

    def _drop_aborted(self) -> None:
        for seq in [s for s in self.running if s.aborted]:
            self._send(seq, "abort")
            self._retire(seq)
        for seq in [s for s in self.waiting if s.aborted]:
            self.waiting.remove(seq)
            self._send(seq, "abort")

    def _retire(self, seq: Sequence) -> None:
        self.stats.cached += seq.cached
        self.running.remove(seq)
        self._free(seq)

    def _free(self, seq: Sequence) -> None:
        for page in seq.pages:
            self.pages.release(page)
        seq.pages = []
        if seq.slot >= 0:
            self.slots.release(seq.slot)
            seq.slot = -1
