"""The narrow waist: how everything that needs a model talks to one.

Ids in, ids out. Implementations live elsewhere: the in-process engine (`engine`), servers that speak ids or only text
(`remote`), a pool of those (`service.upstreams`). The agent, the environments and the service cannot tell them apart.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

import numpy as np
from msgspec import Struct

from .message import Message


class PolicyError(Exception):
    """The policy could not answer (provider down, queue full, request refused). Nobody's task failed."""

    def __init__(self, message: str, *, status: int = 503, kind: str = "engine_overloaded_error") -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind


class Prompt(tuple[int, ...]):
    """Prompt ids that have not forgotten what they say, so that a policy which speaks text need not read them again.

    messages: what the ids before `turn` render, as `Template.parse` would give them, but for `verbatim`. turn: where the
    generation prompt begins.
    """

    messages: Sequence[Message]
    turn: int

    @staticmethod
    def of(ids: Sequence[int], messages: Sequence[Message], opened: Sequence[int]) -> Prompt:
        """`opened`: the generation prompt, and with what the answer begins."""
        prompt = Prompt((*ids, *opened))
        prompt.messages, prompt.turn = messages, len(ids)
        return prompt


class Constraint(Struct, frozen=True, gc=False):
    """What the sampled text must match. Compiled and cached by whoever samples."""

    kind: str  # "json_schema" | "regex" | "lark" (a grammar in Lark's syntax, special tokens as <name>)
    text: str


class SamplingParams(Struct, frozen=True, gc=False):
    """How to sample, and with what urgency. `seed` makes the draw reproducible whatever else shares the batch."""

    max_tokens: int = 256
    temperature: float = 1.0  # 0 = greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 = off
    min_p: float = 0.0  # drop tokens below min_p times the likeliest one's probability
    presence_penalty: float = 0.0  # subtracted once from the logit of every id sampled so far
    frequency_penalty: float = 0.0  # subtracted per occurrence of the id among those sampled so far
    repetition_penalty: float = 1.0  # divides (or multiplies, if negative) the logits of ids seen in prompt or output
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop_ids: tuple[int, ...] = ()  # sampling one of these ends the turn; the id is part of the output
    stop: tuple[str, ...] = ()  # ends the turn once the decoded output contains one, across token boundaries
    seed: int | None = None
    top_logprobs: int = 0  # how many of the likeliest tokens to report beside each sampled one
    constraint: Constraint | None = None
    tenant: str = ""  # whose request it is: waiting tenants are served in turn
    priority: int = 0  # lower is more urgent; turns are taken within one priority
    deadline_s: float | None = None  # from arrival; a request that is not done by then ends with "deadline"
    routed_from: int | None = None  # report the experts of the tokens from this position on; nothing after it is reused


# The ids that cut-offs and a constraint left: None = all; else the ids, ascending, or, where that is smaller, a bit mask
# of the vocabulary (bit i % 8, counted from the lowest, of byte i // 8 is id i). `kept_ids` reads both.
Kept = tuple[int, ...] | bytes | None


def compact(ids: np.ndarray, vocab: int) -> Kept:
    """Ascending int64 ids as `Kept`, in whichever form is smaller (4 bytes an id against one bit of the vocabulary)."""
    if len(ids) == vocab:
        return None
    if 32 * len(ids) <= vocab:
        return tuple(ids.tolist())
    mask = np.zeros(vocab, dtype=bool)
    mask[ids] = True
    return np.packbits(mask, bitorder="little").tobytes()


def kept_ids(kept: tuple[int, ...] | bytes) -> np.ndarray:
    """The ids, int64, ascending."""
    if isinstance(kept, bytes):
        return np.flatnonzero(np.unpackbits(np.frombuffer(kept, dtype=np.uint8), bitorder="little"))
    return np.asarray(kept, dtype=np.int64)


class Source(Struct, frozen=True, gc=False):
    """Which of several upstreams sampled a chunk, and whether its ids and log-probabilities are the sampler's own."""

    name: str
    exact: bool


class Reported(Struct, frozen=True, gc=False):
    """What an upstream says one answer used, by its own count and its own tokenizer. None: it does not say (0 is a number)."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None

    @staticmethod
    def of(usage: Any) -> Reported | None:
        """A `usage` object as OpenAI and vLLM send it; what is no count in it counts as unsaid. None: there is none."""
        if not isinstance(usage, dict):
            return None
        details = usage.get("prompt_tokens_details")
        cached = details.get("cached_tokens") if isinstance(details, dict) else usage.get("cached_tokens")
        counts = (usage.get("prompt_tokens"), usage.get("completion_tokens"), cached)
        return Reported(*(n if type(n) is int and 0 <= n < 2**53 else None for n in counts))


METRICS = ("queue_time_ms", "time_to_first_token_ms", "generation_time_ms")


class Times(Struct, frozen=True, gc=False):
    """Seconds of an answer in the engine: in its line, until its first token, from that to its last. None: untold."""

    queued_s: float | None = None
    prefill_s: float | None = None
    decode_s: float | None = None

    @staticmethod
    def of(metrics: Any) -> Times | None:
        """vLLM's `metrics` object, which is Tidelock's too. None: there is none, or nothing to be read in it."""
        if not isinstance(metrics, dict):
            return None
        told = map(metrics.get, METRICS)
        seconds = [ms / 1000 if isinstance(ms, int | float) and 0 <= ms < 1e12 else None for ms in told]
        return Times(*seconds) if any(s is not None for s in seconds) else None

    def metrics(self) -> dict[str, float]:
        """As `of` reads it."""
        named = zip(METRICS, (self.queued_s, self.prefill_s, self.decode_s), strict=True)
        return {name: round(seconds * 1000, 3) for name, seconds in named if seconds is not None}


class Chunk(Struct, frozen=True, gc=False):
    """Some newly sampled tokens. The last chunk of a request, and only it, has a `finish_reason`."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]  # log softmax of the raw logits at the sampled id (temperature 1), fp32
    weights_version: int  # version that produced every token of this chunk; -1 = unknown (text-only policy)
    finish_reason: str | None = None  # "stop" | "length" | "abort" | "deadline"
    cached_tokens: int = 0  # on the last chunk: prompt tokens that were not prefilled again
    sampled_logprobs: tuple[float, ...] = ()  # under the distribution that was drawn from; empty = same as logprobs
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] = ()  # per token (id, logprob), likeliest first
    kept: tuple[Kept, ...] = ()  # per token what cut-offs and constraint left; empty = nothing was ever cut
    stop: str | None = None  # on the last chunk: the stop string that was found
    # on the last chunk, where asked for: experts per token from `routed_from` on and per layer (dense ones 0), in the
    # router's order, uint8 or uint16 [prompt + sampled - 1 - routed_from, layers, k]; the last token was never run
    routed_experts: Any = None
    source: Source | None = None  # where there are several upstreams, or where this answer is less exact than others
    reported: Reported | None = None  # on the last chunk, from a remote policy
    # on the last chunk, where a server says versions only then: (version, tokens) spans of the whole answer
    versions: tuple[tuple[int, int], ...] = ()
    times: Times | None = None  # on the last chunk


def drawn_from(chunks: Sequence[Chunk]) -> tuple[tuple[float, ...], tuple[Kept, ...]]:
    """(sampled_logprobs, kept) of a whole answer, one per id; each is empty when the chunks say nothing of it."""
    told = any(c.sampled_logprobs for c in chunks)
    logprobs = tuple(x for c in chunks for x in c.sampled_logprobs or c.logprobs) if told else ()
    cut = any(c.kept for c in chunks)
    return logprobs, tuple(x for c in chunks for x in c.kept or (None,) * len(c.ids)) if cut else ()


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
