"""Prefix reuse: a conversation's next turn, or a sibling with the same system prompt, starts where the cache already is.

KDA layers can resume only where a state was kept, so snapshots lie just before end-of-message tokens: before the last
message of a fresh prompt (its system and tools block, which many episodes share) and at the end of every turn.
The key is the exact ids, never a hash alone; the weights version is the cache's own, one cache per version.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from .blocks import Pool


@dataclass(frozen=True)
class Snapshot:
    """The first `length` tokens of a conversation: its pages (the last one possibly partial) and its KDA state."""

    length: int
    pages: tuple[int, ...]
    slot: int


class PrefixCache:
    """Snapshots by exact ids, least recently used evicted first."""

    def __init__(self, pages: Pool, slots: Pool) -> None:
        self.pages, self.slots = pages, slots
        self._kept: OrderedDict[tuple[int, ...], Snapshot] = OrderedDict()

    def keep(self, ids: tuple[int, ...], pages: Seq[int], slot: int) -> None:
        """Take shared ownership of `pages` and sole ownership of `slot`."""
        self._kept[ids] = Snapshot(len(ids), tuple(self.pages.share(p) for p in pages), slot)

    def __contains__(self, ids: tuple[int, ...]) -> bool:
        return ids in self._kept

    def longest(self, prompt: tuple[int, ...], boundaries: Seq[int]) -> Snapshot | None:
        """The longest snapshot that ends just before one of the prompt's end-of-message positions."""
        for at in reversed(boundaries):
            snapshot = self._kept.get(prompt[:at])
            if snapshot is not None:
                self._kept.move_to_end(prompt[:at])
                return snapshot
        return None

    def evict(self) -> bool:
        """Drop the least recently used snapshot. False when there is none."""
        if not self._kept:
            return False
        _, snapshot = self._kept.popitem(last=False)
        for page in snapshot.pages:
            self.pages.release(page)
        self.slots.release(snapshot.slot)
        return True

    def clear(self) -> None:
        while self.evict():
            pass
