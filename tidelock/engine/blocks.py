"""Reference-counted ids for cache pages and state slots."""

from __future__ import annotations


class Pool:
    """Ids 0..n-1, each free or held by one or more owners."""

    def __init__(self, n: int) -> None:
        self._free = list(range(n - 1, -1, -1))
        self._owners = [0] * n

    @property
    def free(self) -> int:
        return len(self._free)

    def take(self) -> int:
        block = self._free.pop()
        self._owners[block] = 1
        return block

    def share(self, block: int) -> int:
        self._owners[block] += 1
        return block

    def release(self, block: int) -> None:
        self._owners[block] -= 1
        if self._owners[block] == 0:
            self._free.append(block)
