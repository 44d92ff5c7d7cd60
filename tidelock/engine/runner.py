"""One packed forward: from sequences and how many of their tokens run, to hidden states."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tidelock.models import Batch, CacheView, TransformerLM

from .memory import Memory
from .sequence import Sequence

Work = list[tuple[Sequence, int]]  # sequences and how many of their tokens run in this step


@torch.no_grad()
def forward(model: TransformerLM, memory: Memory, work: Work) -> tuple[Tensor, Tensor]:
    """Runs the next `rows` tokens of every sequence, all of one set of weights, through the cache.

    Hidden states [sum of rows, d], and the position of each sequence's last one in it, int64 [len(work)].
    """
    cu = np.zeros(len(work) + 1, dtype=np.int32)
    np.cumsum([rows for _, rows in work], out=cu[1:])
    ids = np.concatenate([s.ids[s.computed : s.computed + rows] for s, rows in work]).astype(np.int64)
    start = np.array([s.computed for s, _ in work], dtype=np.int32)
    table = np.zeros((len(work), max(memory.pages_for(s.computed + rows) for s, rows in work)), dtype=np.int32)
    for row, (s, rows) in zip(table, work):
        used = memory.pages_for(s.computed + rows)
        row[:used] = s.pages[:used]
    slots = np.array([max(s.slot, 0) for s, _ in work], dtype=np.int32)
    batch = Batch(torch.from_numpy(ids), torch.from_numpy(cu), torch.from_numpy(start))
    hidden = model(batch, memory.cache, CacheView(torch.from_numpy(table), torch.from_numpy(slots)))
    return hidden, torch.from_numpy(cu[1:].astype(np.int64) - 1)


def plan(running: list[Sequence], budget: int, level) -> Work:
    """The next step's work. Decoding sequences first, those that ran longest ago before others. What is left of the
    budget (in tokens) goes to prompts, the more urgent first (`level` of a sequence, lower first) and evenly among
    equals, so that a long prompt does not hold up the short ones."""
    work: Work = []
    prompts: dict[int, list[Sequence]] = {}
    for seq in sorted(running, key=lambda s: s.last_step):
        if seq.pending > 1:
            prompts.setdefault(level(seq), []).append(seq)
        elif budget:
            work.append((seq, 1))
            budget -= 1
    for urgency in sorted(prompts):
        group = sorted(prompts[urgency], key=lambda s: (s.pending, s.number))
        for i, seq in enumerate(group):
            share = -(-budget // (len(group) - i))
            rows = min(share, seq.next_stop - seq.computed)
            if rows:
                work.append((seq, rows))
                budget -= rows
    return work
