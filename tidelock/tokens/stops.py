"""Stop strings in a stream of tokens, found on bytes: across token boundaries, and inside a token or a character."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence


class StopFinder:
    """Feed the bytes of one token after the other. `held`: how many of the latest may still become part of a stop."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [(s, s.encode("utf-8", "surrogatepass")) for s in stops]
        self._tail = b""  # the longest end of what was fed with which some stop begins
        self._sizes: deque[int] = deque()  # bytes of the tokens the tail lies in
        self.held = 0

    def feed(self, piece: bytes | None) -> str | None:
        """The stop that this token completes: of several the one that ends first, then the one that began first.

        None as a piece is markup: no stop reaches across it.
        """
        if piece is None:
            self._tail, self.held = b"", 0
            self._sizes.clear()
            return None
        seen = self._tail + piece
        ends = [(at + len(b), at, s) for s, b in self._stops if (at := seen.find(b)) >= 0]
        if ends:
            return min(ends)[2]
        self._sizes.append(len(piece))
        open_bytes = max((_overlap(seen, b) for _, b in self._stops), default=0)
        self._tail = seen[len(seen) - open_bytes :]
        if not open_bytes:
            self._sizes.clear()
        while self._sizes and sum(self._sizes) - self._sizes[0] >= open_bytes:
            self._sizes.popleft()
        self.held = len(self._sizes)
        return None


def _overlap(text: bytes, stop: bytes) -> int:
    """The length of the longest end of `text` that is a beginning of `stop`."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0
