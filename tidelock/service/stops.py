"""Stop strings as a client sees them: text up to the first one found, and never half of one.

They are looked for in the answer's content, as the engine does it (`tokens.stops`), and never in its reasoning or the
arguments of calls: a client's stop string is about what it was going to show. Of several the one that ends first
counts, then the one that began first, so that it does not matter in which pieces the text comes.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopFilter:
    """Feed text in any pieces; what comes back is safe to show. `found` is the stop string once there was one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found: str | None = None

    def feed(self, text: str) -> str:
        if not self._stops or self.found is not None:
            return "" if self.found is not None else text
        text = self._held + text
        hits = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if hits:
            _, at, self.found = min(hits)
            self._held = ""
            return text[:at]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back and turned out to be no stop string."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop` without completing it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
