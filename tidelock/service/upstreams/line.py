"""Who waits for an upstream, and whose turn it is.

Tenants take turns, whatever the length of their queues; a request's priority says what its turn costs (twice as much a
level, half as much a level more urgent), and within a tenant the more urgent goes first. A tenant that was away gets no
credit for it. When the line is full, whoever has most requests in it makes room for whoever has fewer.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

LEVELS = 4  # priorities beyond it, either way, count as it
FORGET = 4096  # tenants remembered before those without a debt are dropped


@dataclass(eq=False)
class Waiter:
    tenant: str
    priority: int
    what: Any  # the caller's own
    number: int = 0

    @property
    def rank(self) -> tuple[int, int]:
        return self.priority, self.number


class Line:
    def __init__(self, most: int) -> None:
        self.most = most
        self._queues: dict[str, list[Waiter]] = {}
        self._turns: dict[str, float] = {}  # what each tenant's turns have cost
        self._floor = 0.0  # where the tenant served last stood: newcomers start there
        self._arrivals = self._length = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Waiter]:
        for queue in self._queues.values():
            yield from queue

    def waiting(self, tenant: str) -> int:
        return len(self._queues.get(tenant, ()))

    def join(self, waiter: Waiter) -> Waiter | None:
        """Who has to go instead, because the line is full: another, or the newcomer itself."""
        out = None
        if self._length >= self.most:
            longest = max(self._queues.values(), key=len, default=[])
            if len(longest) <= self.waiting(waiter.tenant) + 1:
                return waiter
            out = longest[-1]
            self.leave(out)
        self._arrivals += 1
        waiter.number = self._arrivals
        bisect.insort(self._queues.setdefault(waiter.tenant, []), waiter, key=lambda w: w.rank)
        self._length += 1
        return out

    def leave(self, waiter: Waiter) -> None:
        """Does nothing for one that is not in the line."""
        queue = self._queues.get(waiter.tenant, [])
        if waiter in queue:
            queue.remove(waiter)
            self._length -= 1
            if not queue:
                del self._queues[waiter.tenant]

    def turns(self) -> Iterator[Waiter]:
        """Those whose turn it is, one tenant after the other, each tenant's own in order. The line may change only after
        the last one that is looked at."""
        for tenant in sorted(self._queues, key=lambda t: (self._stands(t), self._queues[t][0].rank)):
            yield from self._queues[tenant]

    def charge(self, tenant: str, priority: int) -> None:
        """For a request that was sent, whether it had to wait or not."""
        self._floor = self._stands(tenant)
        self._turns[tenant] = self._floor + 2.0 ** max(-LEVELS, min(LEVELS, priority))
        if len(self._turns) > FORGET:
            self._turns = {t: cost for t, cost in self._turns.items() if cost > self._floor}

    def _stands(self, tenant: str) -> float:
        return max(self._turns.get(tenant, 0.0), self._floor)
