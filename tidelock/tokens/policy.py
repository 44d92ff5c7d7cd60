"""The narrow waist: how everything that needs a model talks to one.

Ids in, ids out. Implementations live elsewhere: the in-process engine (`engine`), a text-only OpenAI-compatible
endpoint (`agent.remote`). The agent, the environments and the service cannot tell them apart.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol


class PolicyError(Exception):
    """The policy could not answer (provider down, queue full, request refused). Nobody's task failed."""

    def __init__(self, message: str, *, status: int = 503, kind: str = "engine_overloaded_error") -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind


@dataclass(frozen=True)
class SamplingParams:
    """How to sample. `seed` makes the draw reproducible whatever else shares the batch."""

    max_tokens: int = 256
    temperature: float = 1.0  # 0 = greedy
    top_p: float = 1.0
    stop_ids: tuple[int, ...] = ()  # sampling one of these ends the turn; the id is part of the output
    seed: int | None = None


@dataclass(frozen=True)
class Chunk:
    """Some newly sampled tokens. The last chunk of a request, and only it, has a `finish_reason`."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]  # log softmax of the raw logits at the sampled id (temperature 1), fp32
    weights_version: int  # version that produced every token of this chunk; -1 = unknown (text-only policy)
    finish_reason: str | None = None  # "stop" | "length" | "abort"
    cached_tokens: int = 0  # on the last chunk: prompt tokens that were not prefilled again


class Policy(Protocol):
    """A model that continues token ids."""

    exact: bool  # True: ids and logprobs are the sampler's own. False: text went in between; SFT only, never RL.

    def generate(
        self, prompt_ids: Sequence[int], params: SamplingParams, request_id: str | None = None
    ) -> AsyncIterator[Chunk]:
        """Stream the continuation. Raises PolicyError. Closing the iterator aborts the request."""
        ...

    async def count(self, prompt_ids: Sequence[int]) -> int:
        """Tokens the policy would bill for this prompt."""
        ...

    async def abort(self, request_id: str) -> None:
        """Stop a running request; its stream ends with finish_reason "abort"."""
        ...

    async def swap(self, checkpoint: str, version: int) -> None:
        """Load other weights under live traffic. On failure the old ones keep serving and this raises."""
        ...
