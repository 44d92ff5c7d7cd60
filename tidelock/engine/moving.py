"""Running requests to new weights, while they go on streaming from the old ones.

What a request has so far is run through the new weights a second time, in chunks beside everything else, by a stand-in:
a sequence that samples nothing and is followed by what its original samples meanwhile. When it has nearly caught up, the
original takes over its cache. A token's log-probability is always that of its recorded version given the ids before it,
which old latents under new weights would not give. One moves after the other, so that the next can use what they share.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tidelock.tokens.policy import SamplingParams

from .routing import routing_for
from .sequence import DONE, RUNNING, Sequence

if TYPE_CHECKING:
    from .scheduler import Scheduler

NEAR = 16  # tokens that may be left to run when a request changes over


class Moving:
    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._left: list[Sequence] = []  # on old weights, to go on with the served ones

    def begin(self) -> None:
        """Everybody who runs is to go on with the weights that are served now. Who streams nothing yet starts over."""
        s = self._scheduler
        self._left = sorted(s.requests, key=lambda seq: seq.number)
        for seq in self._left:
            self._drop_stand_in(seq)
        for seq in reversed([seq for seq in self._left if not seq.decoding]):
            s.back_in_line(seq)

    def step(self) -> None:
        """Between two steps."""
        while self._left:
            seq = self._left[0]
            if seq.stand_in is None and (len(seq.ids) <= NEAR or not self._stand_in(seq)):
                self._scheduler.back_in_line(seq)  # little to run, or no room for two: then it does stand still
            elif seq.stand_in.pending > NEAR:
                return
            else:
                self._change_over(seq)

    def forget(self, seq: Sequence) -> None:
        """It ended, or is back in the line."""
        if seq in self._left:
            self._left.remove(seq)
        self._drop_stand_in(seq)

    def _stand_in(self, seq: Sequence) -> bool:
        """Whether there was room for one."""
        s, p = self._scheduler, seq.params
        params = SamplingParams(max_tokens=p.max_tokens, tenant=p.tenant, priority=p.priority, routed_from=p.routed_from)
        new = Sequence(seq.request_id, seq.prompt, params, lambda item: None, seq.seed, unsampled=1)
        for token in seq.ids[len(seq.prompt) :].tolist():
            new.append(token)
        path = s.tree.walk(s.weights, new.ids) if s.limits.reuse else []
        if not s.admission.admit(new, path, s.weights, alone=False):
            return False
        s.tree.touch(path)
        new.state, new.number, new.waiting_since, new.urgency = RUNNING, seq.number, seq.waiting_since, seq.urgency
        new.routing = routing_for(p.routed_from, s.weights.model)
        new.stops = {len(seq.prompt)} if s.memory.hybrid else set()
        s.running.append(new)
        seq.stand_in = new
        return True

    def _change_over(self, seq: Sequence) -> None:
        s, new, old = self._scheduler, seq.stand_in, seq.weights
        s.send(seq, None, everything=True)  # a chunk is of one version
        s.withdraw(seq)
        seq.pages, seq.slot, seq.node, seq.computed = new.pages, new.slot, new.node, new.computed
        seq.weights, seq.routing, seq.stops, seq.decoding = new.weights, new.routing, set(), False
        new.pages, new.slot, new.node = [], -1, None
        self.forget(seq)
        s.line.charge(seq, seq.longest - seq.computed)
        s.drop_if_unused(old)

    def _drop_stand_in(self, seq: Sequence) -> None:
        new, seq.stand_in = seq.stand_in, None
        if new is not None:
            self._scheduler.running.remove(new)
            self._scheduler.withdraw(new)
            new.state = DONE
            self._scheduler.drop_if_unused(new.weights)  # replaced meanwhile, they may have had no other user
