"""What one agent run leaves behind."""

from __future__ import annotations

from dataclasses import dataclass, field

from tidelock.tokens.message import Message
from tidelock.tokens.policy import Chunk, Kept

# Every episode ends for exactly one of these, checked in this order.
STOP_REASONS = ("policy_error", "aborted", "length", "tool_crash", "answered", "max_turns")


@dataclass
class Episode:
    """A conversation token for token. Every list from `sampled` to `kept` runs parallel to `ids`."""

    messages: list[Message] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)  # 0 where not sampled
    versions: list[int] = field(default_factory=list)  # -1 where not sampled
    sampled_logprobs: list[float] = field(default_factory=list)  # under what was drawn from; 0 where not sampled
    kept: list[Kept] = field(default_factory=list)  # ids left by cut-offs and constraint; None = all, or not sampled
    exact: bool = True  # ids and logprobs are the sampler's own
    stop_reason: str = ""
    error: str = ""
    turns: int = 0
    tool_calls: int = 0
    sampled_tokens: int = 0
    cached_tokens: int = 0
    sandbox: str = "none"

    @property
    def answer(self) -> str:
        """The text of the last assistant message."""
        return next((m.content for m in reversed(self.messages) if m.role == "assistant"), "")

    def append_input(self, ids: list[int]) -> None:
        """Extend to `ids` with tokens nobody sampled."""
        added = len(ids) - len(self.ids)
        self.ids = ids
        self.sampled += [False] * added
        self.logprobs += [0.0] * added
        self.versions += [-1] * added
        self.sampled_logprobs += [0.0] * added
        self.kept += [None] * added

    def append_sampled(self, chunk: Chunk) -> None:
        n = len(chunk.ids)
        self.ids = [*self.ids, *chunk.ids]
        self.sampled += [True] * n
        self.logprobs += chunk.logprobs
        self.versions += [chunk.weights_version] * n
        self.sampled_logprobs += chunk.sampled_logprobs or chunk.logprobs
        self.kept += chunk.kept or (None,) * n
        self.sampled_tokens += n
        if chunk.source is not None and not chunk.source.exact:
            self.exact = False
