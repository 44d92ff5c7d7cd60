"""How many tokens to draft, and what became of them.

Drafted rows are run in the same forward as the token before them and then sampled one after the other exactly as plain
decoding would: a drafted id is used only where the draw at that position, which depends on seed and position alone,
comes out as that id. So the output is the same, log-probabilities included, whatever is drafted; only time is at stake.
(Where the arithmetic itself depends on the batch, as without the compiled kernels, it depends on drafts the same way.)

Measured on the tool loops of a demo's model, one thread (`python -m benchmarks.speculation`): 2.7 tokens per forward
instead of 1 with one episode in flight, about half of what is drafted is right, and 2.4 times the tokens per second; with
8 in flight 1.5 times. With 96 in flight drafts are fewer and neither gain nor lose (0.98 and 1.01): a row costs nearly its
share of such a step.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from .lookup import LONGEST, Lookup, Text

FADE = 0.98  # of what was measured, per judgement
RECENT = 0.9  # the same for one request


@dataclass
class Odds:
    """How often a drafted id is the one that is drawn, as far as seen lately. Starts at even odds."""

    hits: float = 1.0
    tries: float = 2.0

    def saw(self, hits: int, tries: int, fade: float) -> None:
        self.hits, self.tries = fade * self.hits + hits, fade * self.tries + tries

    @property
    def rate(self) -> float:
        return (self.hits + 0.5) / (self.tries + 1.0)


@dataclass
class Track:
    """One request's side: its text, how its own drafts fared, and the draft that is being verified."""

    text: Text
    odds: Odds = field(default_factory=Odds)
    length: int = 0  # of the match the draft came from; 0: from the MTP layer
    place: int | None = None  # in the MTP layer's cache
    guess: int | None = None  # what the MTP layer expects next


class Clock:
    """What a forward costs: a + b rows seconds, by least squares over recent steps."""

    def __init__(self) -> None:
        self.n = self.x = self.y = self.xx = self.xy = 0.0

    def saw(self, rows: int, seconds: float) -> None:
        for name, value in (("n", 1.0), ("x", rows), ("y", seconds), ("xx", rows * rows), ("xy", rows * seconds)):
            setattr(self, name, 0.99 * getattr(self, name) + value)

    def share(self, rows: int) -> float:
        """The part of a step of `rows` rows that grows with its rows: b rows / (a + b rows), 0.1 at least; 0.2 as long as
        all steps had the same number of rows."""
        spread = self.n * self.xx - self.x * self.x
        if self.n < 4 or spread <= 1e-9 * self.n * self.xx:
            return 0.2
        b = max(0.0, (self.n * self.xy - self.x * self.y) / spread)
        mean = self.y / self.n
        step = mean + b * (rows - self.x / self.n)
        return min(1.0, max(0.1, b * rows / step)) if step > 0 else 1.0


class Speculation:
    """Drafts for all requests of one scheduler. `most`: tokens of a draft; `again`: what a row of a draft that fails costs,
    in rows (3 where the state was copied, has to go back, and what was accepted runs once more in a step without draft)."""

    def __init__(self, most: int, again: int = 1) -> None:
        self.most, self._again = most, again
        self.lookup, self.clock = Lookup(), Clock()
        self._odds = [Odds() for _ in range(LONGEST + 1)]  # by length of the match; 0: the MTP layer's
        self._share = 0.2

    def begin(self, tenant: str, ids: Sequence[int], known: int) -> Track:
        """`known`: ids at the beginning that an earlier request had too."""
        track = Track(Text(tenant))
        self.lookup.grow(track.text, ids, known)
        return track

    def grew(self, track: Track, token: int) -> None:
        self.lookup.grow(track.text, (token,))

    def plan(self, rows: int) -> None:
        """Before the drafts of a step that runs `rows` rows without them."""
        self._share = self.clock.share(max(rows, 1))

    def draft(self, track: Track, room: int, stop_ids: Collection[int]) -> list[int]:
        """At most `room` ids that may come next, none of them a stop.

        The n-th id is worth its rows while the odds that all of n come true exceed its share of the step: it adds
        b seconds to a + b rows, and so many tokens to `rows`.
        """
        guess, track.guess = track.guess, None  # good for this step only
        found = self.lookup.find(track.text) if min(room, self.most) > 0 else None
        if found is None:
            return self._guess(track, guess, room, stop_ids)
        text, at, track.length = found
        rate = min(0.99, (self._odds[track.length].rate * track.odds.rate) ** 0.5)
        n, chance = 0, rate
        while n < min(room, self.most) and chance > self._share * (1 + (self._again - 1) * (1 - rate)):
            n, chance = n + 1, chance * rate
        if n == 0:  # so that what went out of favour can come back
            self._odds[track.length].saw(0, 0, 0.999)
            track.odds.saw(0, 0, 0.99)
            return self._guess(track, guess, room, stop_ids)
        ids = self.lookup.read(text, at, n)
        return ids[: next((i for i, token in enumerate(ids) if token in stop_ids), n)]

    def guesses_pay(self) -> bool:
        """Whether to run the MTP layer, a step's worth of work for one id: not while it is right less than once in four,
        until some hundred steps later its record has faded."""
        odds = self._odds[0]
        if odds.rate < 0.25:
            odds.saw(0, 0, 0.995)
        return odds.rate >= 0.25

    def _guess(self, track: Track, guess: int | None, room: int, stop_ids: Collection[int]) -> list[int]:
        """The one id the MTP layer expects, where no text was found that goes on."""
        track.length = 0
        worth = self._odds[0].rate > self._share * (1 + (self._again - 1) * (1 - self._odds[0].rate))
        ok = guess is not None and min(room, self.most) > 0 and worth and guess not in stop_ids
        return [guess] if ok else []

    def judged(self, track: Track, drafted: int, accepted: int) -> None:
        tries = accepted + (accepted < drafted)
        self._odds[track.length].saw(accepted, tries, FADE)
        if track.length:
            track.odds.saw(accepted, tries, RECENT)
