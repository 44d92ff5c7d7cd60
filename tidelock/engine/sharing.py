"""What requests have in common: where one waits for another's prefix, and where states are kept for those to come."""

from __future__ import annotations

import numpy as np

from .sequence import Sequence
from .tree import Path, Tree, common
from .weights import Weights


def prefix_is_coming(seq: Sequence, running: list[Sequence], weights: Weights, tree: Tree, path: Path) -> bool:
    """Whether a prompt that runs on `weights` will soon have computed more of this one than the tree has. Then `seq` follows
    it: it becomes as urgent as `seq` and, where there is KDA, keeps a state where they part."""
    have, last = None, seq.reusable
    for other in running:
        if other.weights is not weights or other.computed >= last or other.pending <= 1:
            continue
        shared = min(common(other.ids, seq.ids), last)
        if shared <= other.computed:
            continue
        have = tree.reach(path, last) if have is None else have
        if seq.follows is other or shared - have >= tree.memory.page_size:
            if tree.memory.hybrid:
                other.stops.add(shared)
            other.urgency, seq.follows = min(other.urgency, seq.urgency), other
            return True
    return False


def stops(seq: Sequence, path: Path, page_size: int, has_twin: bool, boundary: int | None) -> set[int]:
    """Where `seq`, just placed, keeps a state on its way. `path`: what the tree knows of it; has_twin: whether the same
    prompt waits; `boundary`: the id that ends a message."""
    out = {len(seq.ids)}
    known = min(sum(n for _, n in path), seq.reusable)
    if known - seq.computed >= page_size:  # a second child: the branch gets a state of its own
        out.add(known)
    if has_twin:  # which needs one token to run, to have something to sample from
        out.add(len(seq.ids) - 1)
    # a fresh conversation: its system and tools, all that comes before the last message. One that is held to something: it
    # was told so in the last message, which those that go on with it do not have
    if boundary is not None and (seq.computed == 0 or seq.params.constraint is not None):
        ends = np.flatnonzero(seq.prompt == boundary)
        if len(ends) > 1 and ends[-2] >= seq.computed:
            out.add(int(ends[-2]) + 1)
    return out
