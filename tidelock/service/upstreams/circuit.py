"""Whether an upstream is to be trusted with requests: a circuit that opens on failures and closes by trial.

    closed      requests go through; `trip` failures in a row open it
    open        none does, until a pause with jitter is over (twice as long after each failed trial) and a probe goes well
    half-open   one does; its first token closes the circuit, on probation: one failure before an answer is whole reopens it

Beside that an upstream may ask to be left alone for a while (Retry-After), which says nothing about its health.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable

TRIP = 5  # failures in a row; one that cuts a third of its answers is bad, but better than nobody
SHORTEST_S, LONGEST_S = 0.5, 30.0  # of a pause, before jitter takes up to half of it away
LOOK_S = 2.0  # between looks at one that is out, likewise: a look costs next to nothing, being out does not


class Circuit:
    def __init__(self, clock: Callable[[], float] = time.monotonic, rng: random.Random | None = None) -> None:
        self.state = "closed"
        self.until = 0.0  # open: when it may be tried again
        self.resting_until = 0.0
        self.openings = 0
        self._clock, self._rng = clock, rng or random.Random()
        self._failures = self._pauses = 0
        self._trying = False  # half-open: the one trial is under way

    def admits(self) -> bool:
        """Whether a request may be sent now."""
        if self._clock() < self.resting_until:
            return False
        return self.state == "closed" or (self.state == "half-open" and not self._trying)

    def sent(self) -> None:
        self._trying = self.state == "half-open"

    def spoke(self) -> None:
        """A request sent while half-open or closed got its first token."""
        if self.state == "half-open":
            self.state, self._trying, self._failures = "closed", False, TRIP - 1

    def answered(self) -> None:
        """A whole answer came, or a refusal that was the request's own fault."""
        self.spoke()
        if self.state == "closed":
            self._failures = self._pauses = 0

    def failed(self, weight: int = 1) -> None:
        """`weight`: 2 where nobody was there at all, which is hardly ever chance."""
        if self.state == "open":  # what was under way fails with the rest and proves nothing new
            return
        self._failures += weight
        if self.state == "half-open" or self._failures >= TRIP:
            self._open()

    def withdrawn(self) -> None:
        """The trial's client left before it told anything."""
        self._trying = False

    def rest(self, seconds: float) -> None:
        self.resting_until = max(self.resting_until, self._clock() + seconds)

    def rests_s(self) -> float:
        """How long it still wants to be left alone."""
        return self.resting_until - self._clock()

    def due(self) -> bool:
        return self.state == "open" and self._clock() >= self.until

    def half_open(self) -> None:
        """The pause is over, and a probe, where there is one, went well."""
        self.state, self._trying = "half-open", False

    def probe_failed(self) -> None:
        """Open: it stays so until the next look. Otherwise a failure like any other."""
        if self.state == "open":
            self._pause(LOOK_S)
        else:
            self.failed(2)

    def _open(self) -> None:
        self.openings += 1
        self._pause(min(LONGEST_S, SHORTEST_S * 2**self._pauses))
        self.state, self._trying, self._pauses = "open", False, min(self._pauses + 1, 16)

    def _pause(self, seconds: float) -> None:
        self.until = self._clock() + seconds * (1 - self._rng.random() / 2)
