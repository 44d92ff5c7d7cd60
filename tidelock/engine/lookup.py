"""Drafts without a draft model: what followed the last time these tokens were seen.

Agents repeat themselves: the markers of every turn, names copied from a tool's declaration, results quoted in calls,
eight attempts at one task. An index over recent runs of tokens finds where the latest ones occurred before, in the
request itself or in another of the same tenant, and proposes what came next there.
"""

from __future__ import annotations

from collections.abc import Sequence

RUNS = (7, 3)  # tokens that recur: the long run is looked up first, the short one is the least that counts
RUN = RUNS[-1]
LONGEST = 16  # of a match that is measured
ENTRIES = 1 << 16  # of each generation of the index


class Text:
    """The ids of one request, growing while it is decoded."""

    def __init__(self, tenant: str) -> None:
        self.tenant = tenant
        self.ids: list[int] = []
        self.indexed = 0  # runs that end before this position are in the index


class Lookup:
    """Runs of `RUN` ids, by tenant, to their latest occurrence. Two generations bound what is remembered: when the
    young one is full it becomes the old one, and what was old is forgotten, texts included."""

    def __init__(self, entries: int = ENTRIES) -> None:
        self._entries = entries
        self._young: dict[int, tuple[Text, int]] = {}
        self._old: dict[int, tuple[Text, int]] = {}

    def grow(self, text: Text, ids: Sequence[int], known: int = 0) -> None:
        """`ids` follow in `text`. The first `known` ids of a fresh text need no index: an earlier text has them."""
        text.ids += ids
        # A run is indexed once it has a successor, or it would find itself.
        start, text.indexed = max(text.indexed, known, RUN), len(text.ids)
        for end in range(start, len(text.ids)):
            for run in RUNS:
                if end >= run:
                    self._young[hash((text.tenant, *text.ids[end - run : end]))] = text, end
        if len(self._young) >= self._entries:
            self._young, self._old = {}, self._young

    def find(self, text: Text) -> tuple[Text, int, int] | None:
        """(text, position, length): where the longest known end of `text` occurred, and up to what length it is alike."""
        ids = text.ids
        for run in RUNS:
            key = hash((text.tenant, *ids[-run:]))
            found = self._young.get(key) or self._old.get(key)
            if found is None or len(ids) < run:
                continue
            other, at = found
            length = 0
            while length < min(LONGEST, at, len(ids)) and other.ids[at - 1 - length] == ids[-1 - length]:
                length += 1
            if length >= run and other.tenant == text.tenant:  # equal hashes of other ids are no match
                return other, at, length
        return None

    @staticmethod
    def read(text: Text, at: int, n: int) -> list[int]:
        """Up to n ids from `at` on; past its end a text goes on as it did since `at`, as in a loop."""
        out = text.ids[at : at + n]
        while out and len(out) < n:
            out += out[: n - len(out)]
        return out
