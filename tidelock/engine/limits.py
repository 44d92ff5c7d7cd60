"""What the engine may use, and what it has done so far."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Counts unless the name says otherwise. Everything a request can make the engine hold is bounded by one of these."""

    max_batch: int = 64  # requests that run at the same time
    step_tokens: int = 2048  # rows of one forward, decoding and prefill together
    step_s: float = 0.4  # seconds that a step should take at most while requests stream: prompts run in chunks that fit
    page_size: int = 16  # tokens
    n_pages: int | None = None  # latent pages; None: what fits into its part of cache_bytes, at most 8192
    n_slots: int | None = None  # KDA states, one per running request and snapshot; None: likewise, at most 1024
    cache_bytes: int = 1 << 30
    queue: int = 4096  # requests accepted and not finished; one more is refused at once
    queue_bytes: int = 64 << 20  # of their prompts (4 bytes per token)
    stream_every: int = 4  # tokens per chunk of a stream
    context: int | None = None  # None: the model's own limit
    patience: int = 16384  # tokens the engine serves until a waiting request counts as one priority level more urgent
    draft_tokens: int = 8  # most tokens of a draft (see `speculation`); 0: plain decoding
    reuse: bool = True  # False: no prefix cache, every prompt from its first token (the oracle of the tests)
    host_bytes: int = 0  # evicted pages and snapshots kept in host memory
    disk_bytes: int = 0  # and, pushed out of there, on disk
    disk_dir: str | None = None


@dataclass
class Stats:
    """Totals since the engine started; tokens unless the name says otherwise."""

    steps: int = 0
    prefilled: int = 0  # rows run for tokens the client sent, or again after a swap that continues
    cached: int = 0  # prompt tokens found in the cache
    decoded: int = 0  # rows run for tokens the model had sampled
    drafted: int = 0  # rows run for ids that were only guessed
    accepted: int = 0  # of those, the ones that were right
    finished: int = 0  # requests, however they ended
    snapshots: int = 0  # states kept
    evicted: int = 0  # nodes whose pages or state were dropped or offloaded
    restored: int = 0  # nodes whose pages or state came back from host memory or disk

    @property
    def served(self) -> int:
        """The clock that priorities age by: rows run so far."""
        return self.prefilled + self.decoded
