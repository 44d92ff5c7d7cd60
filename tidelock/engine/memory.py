"""The one allocator: the cache's tensors, and who holds which page and which state slot.

A page or slot is free or has owners; whoever shares it adds one, and the last to let go frees it. Nobody writes into a
page that has a second reader beyond the rows the reader knows: a partial page is copied before it is continued.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import torch
from torch import Tensor

from tidelock.models import Cache, ModelConfig

from .limits import Limits


class Pool:
    """Ids 0..n-1, each free or held by one or more owners."""

    def __init__(self, n: int) -> None:
        self._free = list(range(n - 1, -1, -1))
        self._owners = [0] * n
        self.size = n

    @property
    def free(self) -> int:
        return len(self._free)

    def take(self) -> int:
        block = self._free.pop()
        self._owners[block] = 1
        return block

    def share(self, block: int) -> int:
        assert self._owners[block] > 0, f"block {block} is free and cannot be shared"
        self._owners[block] += 1
        return block

    def release(self, block: int) -> None:
        self._owners[block] -= 1
        assert self._owners[block] >= 0, f"block {block} was released by one who did not hold it"
        if self._owners[block] == 0:
            self._free.append(block)


class Memory:
    """Latent pages for the MLA layers and state slots (KDA state + convolution tails) for the KDA layers."""

    def __init__(self, config: ModelConfig, limits: Limits) -> None:
        self.hybrid = "kda" in config.mixers  # a model with KDA resumes only where a state was kept
        self.page_size = limits.page_size
        one = Cache(config, 1, limits.page_size, 1)
        self.page_bytes = sum(t.nbytes for t in one.pages if t is not None)
        self.slot_bytes = sum(t.nbytes for t in (*one.states, *one.tails) if t is not None)
        part = limits.cache_bytes // (2 if self.hybrid else 1)
        n_pages = limits.n_pages or max(1, min(8192, part // max(self.page_bytes, 1)))
        n_slots = limits.n_slots or max(1, min(1024, part // max(self.slot_bytes, 1)))
        self.cache = Cache(config, n_pages, limits.page_size, n_slots if self.hybrid else 1)
        self.pages, self.slots = Pool(n_pages), Pool(n_slots)
        self._latents = [t for t in self.cache.pages if t is not None]
        self._states = [t for t in (*self.cache.states, *self.cache.tails) if t is not None]

    @property
    def capacity(self) -> int:
        """Tokens."""
        return self.pages.size * self.page_size

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def copy_page(self, src: int, dst: int) -> None:
        self.cache.copy_page(src, dst)

    def copy_slot(self, src: int, dst: int) -> None:
        self.cache.copy_slot(src, dst)

    def copy_slots(self, src: Seq[int], dst: Seq[int]) -> None:
        if src:
            a, b = torch.tensor(src), torch.tensor(dst)
            for t in self._states:
                t[b] = t[a]

    # -- the same as plain numbers, for the tiers below (bit for bit there and back) -----------------------------------

    def read_rows(self, pages: Seq[int], start: int, end: int) -> Tensor:
        """Latent rows of tokens start..end, fp32 [layers, end - start, row]. `pages` begins at page start // page_size."""
        at = self._places(pages, start, end)
        return torch.stack([t.flatten(0, 1)[at] for t in self._latents]) if self._latents else torch.empty(0, end - start, 0)

    def write_rows(self, pages: Seq[int], start: int, end: int, rows: Tensor) -> None:
        at = self._places(pages, start, end)
        for t, r in zip(self._latents, rows):
            t.view(-1, t.shape[-1])[at] = r

    def _places(self, pages: Seq[int], start: int, end: int) -> Tensor:
        position = np.arange(start, end)
        page = np.asarray(pages, dtype=np.int64)[position // self.page_size - start // self.page_size]
        return torch.from_numpy(page * self.page_size + position % self.page_size)

    def read_slot(self, slot: int) -> Tensor:
        """A state as one vector, fp32 [slot_bytes / 4]."""
        return torch.cat([t[slot].flatten() for t in self._states])

    def write_slot(self, slot: int, state: Tensor) -> None:
        for t, part in zip(self._states, state.split([t[0].numel() for t in self._states])):
            t[slot] = part.view_as(t[slot])
