"""Drafts on sequences: which rows they add to a step, and what the cache is set back to where they were wrong."""

from __future__ import annotations

from torch import Tensor

from tidelock.models import TransformerLM

from .eviction import Eviction
from .limits import Limits, Stats
from .memory import Memory
from .mtp import PROMPT, MTPDrafts
from .runner import Work
from .sequence import Sequence
from .speculation import Speculation


class Drafting:
    """The scheduler's side of speculation (see there why nothing but time is at stake)."""

    def __init__(
        self, model: TransformerLM, limits: Limits, memory: Memory, eviction: Eviction, stats: Stats
    ) -> None:
        self.memory, self.eviction, self.stats = memory, eviction, stats
        self._step_tokens = limits.step_tokens
        self.speculation = Speculation(limits.draft_tokens, again=3 if memory.hybrid else 1)
        self.mtp = MTPDrafts(model.config, limits.max_batch) if getattr(model, "mtp", None) else None

    def add(self, work: Work) -> Work:
        """The same work with drafts, within the step's budget. With KDA layers a copy of the state waits in a spare slot;
        without one to spare there is no draft, nor while accepted tokens run again, which would put that off for ever."""
        rows = sum(rows for _, rows in work)
        self.speculation.plan(rows)
        budget, out = self._step_tokens - rows, []
        for seq, rows in work:
            if seq.decoding and rows == seq.pending and (rows == 1 or not self.memory.hybrid):
                room = min(budget, seq.params.max_tokens - seq.sampled - 1)
                seq.draft = self.speculation.draft(seq.track, room, seq.params.stop_ids)
                if seq.draft and self.memory.hybrid:
                    if self.eviction.make_room(slots=1):
                        seq.spare, seq.computed_before = self.memory.slots.take(), seq.computed
                    else:
                        seq.draft = []
                budget -= len(seq.draft)
            out.append((seq, rows + len(seq.draft)))
        self.memory.copy_slots([s.slot for s, _ in out if s.spare >= 0], [s.spare for s, _ in out if s.spare >= 0])
        return out

    def settle(self, seq: Sequence, right: int) -> None:
        """The first `right` tokens of the draft were right: the cache holds them too, or, where a KDA state has gone on
        past them, goes back to before this step; the next one runs them again."""
        self.stats.drafted += len(seq.draft)
        self.stats.accepted += right
        self.speculation.judged(seq.track, len(seq.draft), right)
        if seq.spare < 0 or right == len(seq.draft):
            seq.computed += right
        else:
            seq.slot, seq.spare, seq.computed = seq.spare, seq.slot, seq.computed_before
        if seq.spare >= 0:
            self.memory.slots.release(seq.spare)
        seq.spare, seq.draft = -1, []

    def drop(self, seq: Sequence) -> None:
        """The draft's step failed: nobody knows what it was worth."""
        if seq.spare >= 0:
            self.memory.slots.release(seq.spare)
        seq.spare, seq.draft = -1, []

    def grew(self, seq: Sequence, token: int) -> None:
        """The sequence has sampled one more token."""
        if seq.track is None:
            seq.track = self.speculation.begin(seq.params.tenant, seq.ids.tolist(), max(seq.cached, 0))
        else:
            self.speculation.grew(seq.track, token)

    def forget(self, seq: Sequence) -> None:
        """It no longer runs."""
        if seq.track is not None and seq.track.place is not None:
            self.mtp.release(seq.track.place)
        seq.track = None

    def took(self, work: Work, seconds: float) -> None:
        """What a step cost. Prompts are run at another price than single tokens."""
        if all(seq.decoding for seq, _ in work):
            self.speculation.clock.saw(sum(rows for _, rows in work), seconds)

    def look_ahead(self, went: list[tuple[Sequence, int, int, bool]], hidden: Tensor, model: TransformerLM) -> None:
        """Feed the MTP layer what was sampled. went: sequences, the row that predicted their first new token, how many
        ids they had before it, and whether they were decoding (or else the end of their prompt is fed too)."""
        if self.mtp is None or not getattr(model, "mtp", None) or not self.speculation.guesses_pay():
            return
        places, states, following = [], [], []
        for seq, row, length, decoding in went:
            if seq.track.place is None:
                seq.track.place = self.mtp.take()
            if seq.track.place is not None:
                back = 0 if decoding else min(PROMPT, row - seq.first_row)
                places.append(seq.track.place)
                states.append(hidden[row - back : row + len(seq.ids) - length])
                following.append(seq.ids[length - back :].tolist())
        if places:
            for (seq, *_), token in zip([w for w in went if w[0].track.place is not None],
                                        self.mtp.guess(model, places, states, following)):  # fmt: skip
                seq.track.guess = token
