"""One request while the engine works on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from tidelock.tokens.policy import Chunk, PolicyError, SamplingParams


@dataclass(eq=False)
class Sequence:
    """`ids` = prompt + sampled so far; the cache holds the first `computed` of them."""

    request_id: str
    prompt: tuple[int, ...]
    params: SamplingParams
    deliver: Callable[[Chunk | PolicyError], None]
    seed: int
    ids: list[int] = field(default_factory=list)
    computed: int = 0
    pages: list[int] = field(default_factory=list)
    slot: int = -1
    snapshot_at: int = 0  # stop a prefill chunk here and keep the state (0 = nowhere)
    cached: int = 0  # prompt tokens found in the prefix cache
    unsent_ids: list[int] = field(default_factory=list)
    unsent_logprobs: list[float] = field(default_factory=list)
    aborted: bool = False

    def __post_init__(self) -> None:
        self.ids = list(self.prompt)

    @property
    def sampled(self) -> int:
        return len(self.ids) - len(self.prompt)

    def next_rows(self, budget: int) -> int:
        """How many tokens the next step should run for this sequence, at most `budget`."""
        end = self.snapshot_at if self.computed < self.snapshot_at else len(self.ids)
        return min(budget, end - self.computed)
