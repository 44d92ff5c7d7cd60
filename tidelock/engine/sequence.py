"""One request while the engine works on it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from tidelock.tokens.policy import Chunk, PolicyError, SamplingParams, Times

from .routing import Routing
from .sampler import Sampler

if TYPE_CHECKING:
    from .speculation import Track
    from .tree import Node
    from .weights import Weights

WAITING, RUNNING, DONE = "waiting", "running", "done"


@dataclass(eq=False)
class Sequence:
    """`ids` = prompt + sampled so far; the cache holds the first `computed` of them.

    While it waits it holds its prompt and nothing else. A request that was begun and waits again (its weights were
    swapped under it) keeps what it sampled.
    """

    request_id: str
    prompt: np.ndarray  # int32
    params: SamplingParams
    deliver: Callable[[Chunk | PolicyError], None]
    seed: int
    deadline: float | None = None  # on the scheduler's clock
    state: str = WAITING
    urgency: int = 0  # params.priority, or that of a more urgent request that waits for this one's prefix
    waiting_since: int = 0  # on the clock of served tokens
    number: int = 0  # order of arrival
    follows: Sequence | None = None  # while it waits for a running prompt with the same beginning
    charge: int = 0  # tokens the tenant was charged on admission
    spent: int = 0  # rows run since then
    # while running
    weights: Weights | None = None
    computed: int = 0
    pages: list[int] = field(default_factory=list)
    slot: int = -1
    node: Node | None = None  # where it stands in the tree
    stops: set[int] = field(default_factory=set)  # end a prefill chunk here and keep the state
    last_step: int = 0
    cached: int = -1  # prompt tokens found in the cache when it first ran
    decoding: bool = False  # whether it has sampled since it was admitted: its rows are no prefill
    first_row: int = 0  # of its rows in the last forward
    draft: list[int] = field(default_factory=list)  # ids that run after its own in this step, to be verified
    spare: int = -1  # while there is a draft, the slot with the state from before this step
    computed_before: int = 0  # and how many tokens that is the state of
    track: Track | None = None
    routing: Routing | None = None  # where the experts were asked for
    arrived: float = field(default_factory=time.perf_counter)
    began: float = 0.0  # when it first ran; 0: it has not
    spoke: float = 0.0  # when its first token was drawn
    sampler: Sampler | None = None  # None: one without stop strings and constraint
    stand_in: Sequence | None = None  # which runs its ids through new weights (`moving`)
    unsampled: int = 0  # 1 for a stand-in, whose last token waits for its original

    def __post_init__(self) -> None:
        self.urgency = self.params.priority
        if self.sampler is None:
            self.sampler = Sampler(self.prompt, self.params, self.seed)
        self._buffer, self._length = self.prompt, len(self.prompt)
        self.fingerprint = hash(self.prompt.tobytes())  # equal prompts have equal ones

    @property
    def ids(self) -> np.ndarray:
        """int32 view, valid until the next `append`."""
        return self._buffer[: self._length]

    @property
    def reusable(self) -> int:
        """Tokens that may be taken from the cache: the last one has to run, and so does what was asked the experts of."""
        start = self.params.routed_from
        return len(self.ids) - 1 if start is None else min(len(self.ids) - 1, start)

    def append(self, token: int) -> None:
        if self._length == len(self._buffer):
            longest = len(self.prompt) + self.params.max_tokens
            grown = np.empty(min(longest, 2 * self._length + 16), dtype=np.int32)
            grown[: self._length] = self._buffer
            self._buffer = grown
        self._buffer[self._length] = token
        self._length += 1
        if self.stand_in is not None:
            self.stand_in.append(token)

    def upcoming(self, rows: int) -> np.ndarray:
        """The ids of its next `rows` rows, which end with its draft."""
        own = self.ids[self.computed : self.computed + rows - len(self.draft)]
        return np.concatenate([own, np.array(self.draft, dtype=np.int32)]) if self.draft else own

    @property
    def sampled(self) -> int:
        return self._length - len(self.prompt)

    def times(self) -> Times:
        """Up to now, when it ends."""
        now = time.perf_counter()
        began, spoke = self.began or now, self.spoke
        return Times(began - self.arrived, spoke - began if spoke else None, now - spoke if spoke else None)

    @property
    def pending(self) -> int:
        """Tokens that must still run before the next one can be sampled."""
        return self._length - self.computed

    @property
    def longest(self) -> int:
        """Tokens this request may come to: what is reserved for it."""
        return len(self.prompt) + self.params.max_tokens

    @property
    def next_stop(self) -> int:
        last = self._length - self.unsampled
        return min((s for s in self.stops if self.computed < s < last), default=last)
