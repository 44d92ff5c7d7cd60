"""One packed forward: from sequences and how many of their tokens run, to hidden states."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from tidelock.models import Batch, CacheView, TransformerLM
from tidelock.models.serving import ServingModel

from .memory import Memory
from .sequence import Sequence

Work = list[tuple[Sequence, int]]  # sequences and how many of their tokens run in this step


@torch.no_grad()
def forward(model: TransformerLM | ServingModel, memory: Memory, work: Work) -> tuple[Tensor, Tensor]:
    """Runs the next `rows` tokens of every sequence, all of one set of weights, through the cache.

    Hidden states [sum of rows, d], and the position of each sequence's last one in it, int64 [len(work)].
    """
    cu = np.zeros(len(work) + 1, dtype=np.int32)
    np.cumsum([rows for _, rows in work], out=cu[1:])
    ids = np.concatenate([s.upcoming(rows) for s, rows in work]).astype(np.int64)
    start = np.array([s.computed for s, _ in work], dtype=np.int32)
    table = np.zeros((len(work), max(memory.pages_for(s.computed + rows) for s, rows in work)), dtype=np.int32)
    for row, (s, rows) in zip(table, work):
        used = memory.pages_for(s.computed + rows)
        row[:used] = s.pages[:used]
    slots = np.array([max(s.slot, 0) for s, _ in work], dtype=np.int32)
    batch = Batch(torch.from_numpy(ids), torch.from_numpy(cu), torch.from_numpy(start))
    hidden = model(batch, memory.cache, CacheView(torch.from_numpy(table), torch.from_numpy(slots)))
    return hidden, torch.from_numpy(cu[1:].astype(np.int64) - 1)


class Pace:
    """How many rows a step of some length has, from what the last ones took."""

    LEAST, FIRST = 64, 128  # fewer rows cost more than they are worth; what is dared before anything is known

    def __init__(self) -> None:
        self._rate = 0.0  # rows per second

    def saw(self, rows: int, seconds: float) -> None:
        if rows >= self.LEAST and seconds > 0:
            self._rate = 0.7 * self._rate + 0.3 * rows / seconds if self._rate else rows / seconds

    def rows_in(self, seconds: float) -> int:
        return max(self.LEAST, int(self._rate * seconds)) if self._rate else self.FIRST


def plan(running: list[Sequence], budget: int, level: Callable[[Sequence], int]) -> Work:
    """The next step's work, at most `budget` tokens. Decoding sequences first, those that ran longest ago before others;
    but a quarter of the budget is for prompts, and what the others leave: the more urgent first (`level`, lower first),
    evenly among equals, so that a long prompt does not hold up the short ones."""
    decoding = sorted((s for s in running if s.decoding or s.pending == 1), key=lambda s: s.last_step)
    prompts: dict[int, list[Sequence]] = {}
    for seq in running:
        if seq.pending > 1 and not seq.decoding:
            prompts.setdefault(level(seq), []).append(seq)
    theirs = min(max(budget // 4, 1), sum(s.pending for group in prompts.values() for s in group))
    work: Work = []
    for seq in decoding:  # after a failed draft with more than one row
        rows = min(seq.pending, budget - theirs)
        if rows:
            work.append((seq, rows))
            budget -= rows
    for urgency in sorted(prompts):
        group = sorted(prompts[urgency], key=lambda s: (s.pending, s.number))
        for i, seq in enumerate(group):
            share = -(-budget // (len(group) - i))
            rows = min(share, seq.next_stop - seq.computed)
            if rows:
                work.append((seq, rows))
                budget -= rows
    return work
