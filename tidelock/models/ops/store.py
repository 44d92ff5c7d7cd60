"""Memory that weights lie in for good: few large pieces, in huge pages where Linux has them.

A step at batch 1 reads its weights once from memory, so its speed is that of reading. In pages of 4 KiB every page is
another translation to look up, and the processor's own reading ahead stops at its end: a sixth less a second.
"""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

PAGE = 1 << 21
MOST = 32 * PAGE  # of a piece, unless one tensor needs more


class Store:
    """`keep` copies tensors into it, one behind the other; the memory lives as long as one of them."""

    def __init__(self) -> None:
        self._piece = torch.empty(0, dtype=torch.uint8)
        self._used, self._next = 0, PAGE

    def keep(self, t: Tensor) -> Tensor:
        """A copy of t that begins on a cache line."""
        at = -(-self._used // 64) * 64
        if at + t.nbytes > self._piece.numel():
            self._piece, at = _piece(max(self._next, -(-t.nbytes // PAGE) * PAGE)), 0
            self._next = min(2 * self._next, MOST)
        self._used = at + t.nbytes
        kept = self._piece[at : self._used].view(t.dtype).view(t.shape)
        return kept.copy_(t)


def _piece(size: int) -> Tensor:
    """uint8 [size], on a huge page's boundary."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8)
    memory = mmap.mmap(-1, size + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without them
        pass
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    return whole[-whole.data_ptr() % PAGE :][:size]
