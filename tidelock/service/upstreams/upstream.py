"""One upstream of a pool: its policy, its limits, how it fares, and what is counted of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from tidelock.service.upstreams.circuit import Circuit
from tidelock.tokens.policy import Chunk, Policy, Source


@dataclass
class Tally:
    """Since the start."""

    requests: int = 0  # sent, retries included
    failures: Counter[str] = field(default_factory=Counter)  # by cause
    retried: int = 0  # requests that failed here before their first token and went on elsewhere
    affinity: Counter[str] = field(default_factory=Counter)  # "hit": it was the conversation's own; "spilled": another's
    prompt_tokens: int = 0  # of whole answers, by our count
    cached_tokens: int = 0  # of those, by its own
    generated_tokens: int = 0  # handed on


@dataclass(eq=False)
class Upstream:
    name: str
    policy: Policy
    kind: str = "tokens"  # "tokens" | "chat"
    max_in_flight: int = 64
    weight: float = 1.0
    probe: str = "/health"  # a path that answers 200 while it is well; "" = there is none
    circuit: Circuit = field(default_factory=Circuit)
    in_flight: int = 0
    version: int = -1  # of its weights, as last heard
    introduced: bool = False  # whether it was asked what it is
    held_back: bool = False  # its weights are not the pool's, after a swap that failed half-way
    heard: float = float("-inf")  # when the last answer ended well, on the circuit's clock
    tally: Tally = field(default_factory=Tally)

    def __post_init__(self) -> None:
        self.source, self.inexact = Source(self.name, self.policy.exact), Source(self.name, False)

    @property
    def exact(self) -> bool:
        return self.source.exact

    @property
    def usable(self) -> bool:
        """Whether waiting for it makes sense."""
        return not self.held_back and self.circuit.state != "open"

    @property
    def free(self) -> bool:
        return not self.held_back and self.in_flight < self.max_in_flight and self.circuit.admits()

    @property
    def state(self) -> str:
        """For people and metrics: the circuit's, or "held back"."""
        return "held back" if self.held_back else self.circuit.state

    def count(self, chunk: Chunk, prompt_tokens: int) -> None:
        self.tally.generated_tokens += len(chunk.ids)
        if chunk.weights_version >= 0:
            self.version = chunk.weights_version
        if chunk.finish_reason is not None:
            self.tally.prompt_tokens += prompt_tokens
            self.tally.cached_tokens += min(chunk.cached_tokens, prompt_tokens)

    def status(self) -> dict[str, Any]:
        """For /health: no address, no key."""
        return {
            "name": self.name, "kind": self.kind, "state": self.state, "exact": self.exact, "in_flight": self.in_flight,
            "max_in_flight": self.max_in_flight, "weights_version": self.version,
        }  # fmt: skip
