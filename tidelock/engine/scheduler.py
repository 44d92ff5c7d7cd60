"""Continuous batching: which tokens run in the next step, and what becomes of them.

A step packs the next token of every running sequence with prefill chunks of new ones, under a token budget. It runs on
one thread and owns everything below it: the line, the memory, the tree. Sequences of several weights may run side by
side; each forward is of one.
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Callable

from msgspec.structs import replace

import torch

from tidelock.tokens.policy import PolicyError

from .admission import Admission
from .drafting import Drafting
from .eviction import Eviction
from .limits import Limits, Stats
from .line import Line
from .memory import Memory
from .moving import Moving
from .offload import Store
from .routing import noted, routing_for
from .runner import Pace, Work, forward, plan
from .sampler import draw
from .sampling import Drawn
from .sequence import DONE, RUNNING, WAITING, Sequence
from .sharing import prefix_is_coming, stops
from .tree import Tree
from .weights import Weights


class Scheduler:
    """Everything that is accepted and not finished, in one place."""

    def __init__(
        self, weights: Weights, limits: Limits, boundary_id: int | None, stats: Stats | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.weights, self.limits, self.clock = weights, limits, clock
        self.stats = stats or Stats()
        self.memory, self.store = Memory(weights.model.config, limits), Store(limits)
        self.tree = Tree(self.memory, self.store)
        self.eviction = Eviction(self.tree, self.stats)
        self.admission = Admission(self.memory, self.tree, self.eviction, self.stats)
        self.line = Line(limits, self.stats)
        self.running: list[Sequence] = []
        self.drafts = Drafting(weights.model, limits, self.memory, self.eviction, self.stats) if limits.draft_tokens else None
        self.moving, self._pace = Moving(self), Pace()
        self._boundary = boundary_id
        self._deadlines: list[tuple[float, int, Sequence]] = []
        self._stepping: list[Sequence] = []  # what the forward at work is of
        self._full = False  # the next in line did not fit, and nothing has changed since

    @property
    def busy(self) -> bool:
        return bool(self.running or len(self.line))

    @property
    def requests(self) -> list[Sequence]:
        """What runs, without stand-ins."""
        return [s for s in self.running if not s.unsampled]

    # -- what may be asked between steps ------------------------------------------------------------------------------

    def submit(self, seq: Sequence) -> None:
        self.line.join(seq)
        self._full = False
        if seq.deadline is not None:
            if len(self._deadlines) > 2 * self.limits.queue:  # most of them of requests that ended long before
                self._deadlines = [d for d in self._deadlines if d[2].state != DONE]
                heapq.heapify(self._deadlines)
            heapq.heappush(self._deadlines, (seq.deadline, seq.number, seq))

    def end(self, seq: Sequence, reason: str) -> None:
        """Finish a waiting or running request with what it has. Does nothing for a finished one."""
        if seq.state == WAITING:
            self.line.leave(seq)
        if seq.state != DONE:
            self.send(seq, reason)
            self._retire(seq)

    def expire(self) -> float | None:
        """End what is past its deadline. Returns the seconds until the next deadline."""
        now = self.clock()
        while self._deadlines and (self._deadlines[0][0] <= now or self._deadlines[0][2].state == DONE):
            self.end(heapq.heappop(self._deadlines)[2], "deadline")
        return self._deadlines[0][0] - now if self._deadlines else None

    def swap(self, weights: Weights, go_on: bool) -> None:
        """New requests get the new weights. Running ones finish on theirs or, to `go_on`, move (`moving`)."""
        before = {self.weights, *(s.weights for s in self.running)}
        self.weights, self._full = weights, False
        if go_on:
            self.moving.begin()
        for old in before:
            self.drop_if_unused(old)

    def back_in_line(self, seq: Sequence) -> None:
        """A running request waits at the head of its line, to run its prompt and its answer so far once more."""
        self.send(seq, None, everything=True)
        self.running.remove(seq)
        self.moving.forget(seq)
        old = seq.weights
        self.withdraw(seq)
        seq.state, seq.computed, seq.weights, seq.decoding = WAITING, 0, None, False
        self.line.rejoin(seq)
        self._full = False
        self.drop_if_unused(old)

    def fail_all(self, error: PolicyError) -> None:
        for seq in (*self.requests, *self.line):
            self._fail(seq, error)

    def fail_step(self, error: PolicyError) -> None:
        """End what the step that raised was running, or everybody who runs if it ran nothing yet. What they hold may be half
        written, so it goes, and nothing of it is kept."""
        hit = {s for s in self._stepping if s.state == RUNNING} or set(self.running)
        for seq in self.requests:
            if seq in hit or seq.stand_in in hit:
                if seq.draft and self.drafts:
                    self.drafts.drop(seq)
                self._fail(seq, error)
        self._stepping = []

    def close(self) -> None:
        self.tree.clear()
        self.store.close()

    def step(self) -> None:
        """Admit, run one packed forward per set of weights, sample, deliver."""
        self.expire()
        self.moving.step()
        self._admit()
        begun, budget = time.perf_counter(), self.limits.step_tokens
        if any(s.decoding for s in self.running):
            budget = min(budget, self._pace.rows_in(self.limits.step_s))
        work = plan(self.running, budget, self.line.level)
        for weights in dict.fromkeys(seq.weights for seq, _ in work):
            # A stand-in went with its original, if that has just ended on the old weights.
            if ready := [(seq, rows) for seq, rows in work if seq.weights is weights and seq.state == RUNNING]:
                self._stepping = [seq for seq, _ in ready]
                self._run(weights, ready)
        self._stepping = []
        if work:
            self.stats.steps += 1
            self._pace.saw(sum(rows for _, rows in work), time.perf_counter() - begun)

    # -- admission ----------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """In the line's order. Who does not fit holds up everyone behind, or the large would starve; who shares a
        beginning with a prompt that is being run right now waits for it, and others pass."""
        if self._full or not len(self.line):
            return
        held = 0
        for seq in self.line.candidates():
            if len(self.running) >= self.limits.max_batch or held >= self.limits.max_batch:
                return
            path = self.tree.walk(self.weights, seq.ids) if self.limits.reuse else []
            if self.limits.reuse and prefix_is_coming(seq, self.running, self.weights, self.tree, path):
                held += 1
            elif self.admission.admit(seq, path, self.weights, alone=not self.running):
                self._start(seq, path)
            else:
                self._full = True
                return

    def _start(self, seq: Sequence, path: list) -> None:
        self.tree.touch(path)
        self.line.leave(seq)
        self.line.charge(seq, seq.longest - seq.computed)
        seq.state, seq.follows = RUNNING, None
        seq.began = seq.began or time.perf_counter()
        self.running.append(seq)
        seq.routing = seq.routing or routing_for(seq.params.routed_from, self.weights.model)
        seq.stops = set()
        if self.memory.hybrid and self.limits.reuse:
            seq.stops = stops(seq, path, self.limits.page_size, self.line.has_twin(seq), self._boundary)
        elif self.memory.hybrid:
            seq.stops = {len(seq.ids)}

    # -- one step -----------------------------------------------------------------------------------------------------

    def _run(self, weights: Weights, work: Work) -> None:
        begun = time.perf_counter()
        if self.drafts:
            work = self.drafts.add(work)
        for seq, rows in work:
            if rows == seq.pending + len(seq.draft):
                seq.sampler.prepare()
        with noted(weights.model, [(seq.routing, seq.computed, rows) for seq, rows in work]):
            hidden, last_rows = forward(weights.model, self.memory, work)
        ready = []
        for (seq, rows), last in zip(work, last_rows.tolist()):
            self.stats.decoded += rows if seq.decoding else 0
            self.stats.prefilled += 0 if seq.decoding else rows
            seq.spent += rows
            seq.first_row = last + 1 - rows
            seq.computed += rows - len(seq.draft)
            seq.last_step = self.stats.steps
            if not seq.decoding:
                self._keep_prefix(seq)
            if seq.pending == 0:
                ready.append((seq, last - len(seq.draft)))
        if ready:
            self._sample(ready, hidden, weights)
        if self.drafts:
            self.drafts.took(work, time.perf_counter() - begun)

    def _sample(self, ready: list[tuple[Sequence, int]], hidden: torch.Tensor, weights: Weights) -> None:
        """Draw the next token of each, and where it is the one that was drafted, the one after it.

        ready: sequences and the row of `hidden` that predicts their next token; those of the draft follow it.
        """
        before = [(len(seq.ids), seq.decoding) for seq, _ in ready]
        with torch.no_grad():
            logits = weights.model.logits(hidden[[row + i for seq, row in ready for i in range(len(seq.draft) + 1)]])
        going, row = [], 0  # (sequence, first row of logits, where in its draft it is)
        for seq, _ in ready:
            going.append((seq, row, 0))
            row += len(seq.draft) + 1
        while going:
            # All rows of a draft are drawn at once, unless a draw must know the ones before it.
            spans = [1 if seq.sampler.looks_back else len(seq.draft) + 1 for seq, _, _ in going]
            rows = [row + at + i for (_, row, at), n in zip(going, spans) for i in range(n)]
            asked = [(seq.sampler, i) for (seq, _, _), n in zip(going, spans) for i in range(n)]
            drawn = iter(draw(asked, logits if len(rows) == len(logits) else logits[rows]))
            going = [
                (seq, row, at + n)
                for (seq, row, at), n in zip(going, spans)
                if self._take_all(seq, list(itertools.islice(drawn, n)), at)
            ]
        if self.drafts:
            went = [(s, row, *b) for (s, row), b in zip(ready, before) if s.state == RUNNING]
            self.drafts.look_ahead(went, hidden, weights.model)

    def _take_all(self, seq: Sequence, drawn: list[Drawn | PolicyError], at: int) -> bool:
        """Tokens drawn for the draft's rows from `at` on, up to the first that is not what was drafted. Whether the next
        row still stands for the same text."""
        return all(self._take(seq, d, at + i) for i, d in enumerate(drawn))

    def _take(self, seq: Sequence, drawn: Drawn | PolicyError, depth: int) -> bool:
        """One drawn token, after `depth` that were drafted. Whether the next draft row stands for the same text."""
        right = finish = None
        if not isinstance(drawn, PolicyError):
            if not seq.spoke:
                seq.spoke = time.perf_counter()
            right = depth < len(seq.draft) and seq.draft[depth] == drawn.id
            finish = seq.sampler.add(drawn)
            seq.append(drawn.id)
        if seq.draft and (finish is not None or not right):
            self.drafts.settle(seq, depth)
        if isinstance(drawn, PolicyError):
            self._fail(seq, drawn)
        elif finish is not None:
            self.end(seq, finish)
        else:
            self._after(seq, drawn.id)
        return bool(right and finish is None)

    def _after(self, seq: Sequence, token: int) -> None:
        if self.drafts:
            self.drafts.grew(seq, token)
        seq.decoding = True
        if seq.sampler.ready() >= self.limits.stream_every:
            self.send(seq, None)

    def send(self, seq: Sequence, finish_reason: str | None, everything: bool = False) -> None:
        version = (seq.weights or self.weights).version
        chunk = seq.sampler.chunk(version, finish_reason, max(seq.cached, 0), everything)
        if finish_reason is not None:
            experts = None if seq.routing is None else seq.routing.upto(len(seq.ids) - 1)
            chunk = replace(chunk, routed_experts=experts, times=seq.times())
        if chunk.ids or finish_reason is not None:
            seq.deliver(chunk)

    # -- what is kept -------------------------------------------------------------------------------------------------

    def _keep_prefix(self, seq: Sequence) -> None:
        """After a prefill chunk: its pages go into the tree, and where it was to stop a copy of the state."""
        if not self._kept(seq):
            return
        slot = None
        twin_kept = seq.computed == len(seq.ids) and seq.computed - 1 in seq.stops  # one token back serves as well
        if self.memory.hybrid and seq.computed in seq.stops and not twin_kept and self.eviction.make_room(slots=1):
            slot = self.memory.slots.take()
            self.memory.copy_slot(seq.slot, slot)
        self._insert(seq, slot)

    def _keep_turn(self, seq: Sequence) -> None:
        """What a request leaves behind is the beginning of its conversation's next turn; its slot goes with it."""
        if self._kept(seq) and seq.computed:
            self._insert(seq, seq.slot if self.memory.hybrid else None)
            seq.slot = -1

    def _kept(self, seq: Sequence) -> bool:
        return self.limits.reuse and seq.weights is self.weights

    def _insert(self, seq: Sequence, slot: int | None) -> None:
        self.stats.snapshots += slot is not None
        node = self.tree.insert(seq.weights, seq.ids[: seq.computed], seq.pages, slot)
        node.pins += 1
        self._unpin(seq)
        seq.node = node

    # -- endings ------------------------------------------------------------------------------------------------------

    def _fail(self, seq: Sequence, error: PolicyError) -> None:
        """End with an error and keep nothing of it."""
        if seq.state == WAITING:
            self.line.leave(seq)
        seq.deliver(error)
        self._retire(seq, keep=False)

    def _retire(self, seq: Sequence, keep: bool = True) -> None:
        self.stats.finished += 1
        self.stats.cached += max(seq.cached, 0)
        was, seq.state, self._full = seq.state, DONE, False
        if was == RUNNING:
            self.running.remove(seq)
            self.moving.forget(seq)
            if keep:
                self._keep_turn(seq)
            self.withdraw(seq)
            self.drop_if_unused(seq.weights)

    def withdraw(self, seq: Sequence) -> None:
        """Give back everything a running sequence holds."""
        self.line.settle(seq)
        if self.drafts:
            self.drafts.forget(seq)
        self._unpin(seq)
        for page in seq.pages:
            self.memory.pages.release(page)
        if seq.slot >= 0:
            self.memory.slots.release(seq.slot)
        seq.pages, seq.slot, seq.node = [], -1, None

    def _unpin(self, seq: Sequence) -> None:
        if seq.node is not None:
            seq.node.pins -= 1

    def drop_if_unused(self, weights: Weights) -> None:
        """An old version's cache goes with the last request that runs on it."""
        if weights is not self.weights and not any(s.weights is weights for s in self.running):
            self.tree.drop(weights)
