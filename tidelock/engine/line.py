"""The waiting line: who is admitted next.

More urgent first; a request grows more urgent by a level for every `patience` tokens the engine serves meanwhile, so
nobody waits for ever. Within a level the tenant that has been served the fewest tokens comes first (start-time fair
queueing: a tenant that was away gets no credit for it), and a tenant's own requests are served in order.
"""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict
from collections.abc import Iterator

from .limits import Limits, Stats
from .sequence import Sequence

FORGET = 1024  # tenants remembered before those without a debt are dropped


class Line:
    def __init__(self, limits: Limits, stats: Stats) -> None:
        self._patience, self._stats = limits.patience, stats
        self._queues: dict[tuple[str, int], OrderedDict[Sequence, None]] = {}  # by tenant and priority
        self._served: dict[str, int] = {}  # tokens charged to each tenant
        self._floor = 0  # what the tenant admitted last had been charged: newcomers start here
        self._arrivals = 0
        self._length = 0
        self._prompts: Counter[int] = Counter()  # by fingerprint

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Sequence]:
        for queue in self._queues.values():
            yield from queue

    def level(self, seq: Sequence) -> int:
        """How urgent, lower first, after what it has waited (running requests keep ageing until their prompt is run)."""
        return seq.urgency - (self._stats.served - seq.waiting_since) // self._patience

    def join(self, seq: Sequence) -> None:
        self._arrivals += 1
        seq.number, seq.waiting_since = self._arrivals, self._stats.served
        self._enter(seq)

    def rejoin(self, seq: Sequence) -> None:
        """Back to the head of its queue; the time it waited and what it has paid for still count."""
        self._enter(seq).move_to_end(seq, last=False)

    def leave(self, seq: Sequence) -> None:
        key = (seq.params.tenant, seq.params.priority)
        del self._queues[key][seq]
        if not self._queues[key]:
            del self._queues[key]
        self._length -= 1
        self._prompts[seq.fingerprint] -= 1
        if not self._prompts[seq.fingerprint]:
            del self._prompts[seq.fingerprint]

    def has_twin(self, seq: Sequence) -> bool:
        """Whether a request with the same prompt waits."""
        return seq.fingerprint in self._prompts

    def candidates(self) -> Iterator[Sequence]:
        """Waiting requests in the order of admission. The caller may take (`leave`, `charge`) the one it was given
        before it asks for the next."""
        heap = []
        for queue in self._queues.values():
            first = next(iter(queue))
            heap.append((self._turn(first), first, queue, None))
        heapq.heapify(heap)
        while heap:
            turn, seq, queue, behind = heapq.heappop(heap)
            if turn < self._turn(seq):  # its tenant was charged since
                heapq.heappush(heap, (self._turn(seq), seq, queue, behind))
                continue
            behind = iter(tuple(queue)[1:]) if behind is None else behind
            yield seq
            seq = next(behind, None)
            if seq is not None:
                heapq.heappush(heap, (self._turn(seq), seq, queue, behind))

    def _turn(self, seq: Sequence) -> tuple[int, int, int]:
        """Smaller is sooner; no two are equal."""
        return self.level(seq), self._owed(seq), seq.number

    def _enter(self, seq: Sequence) -> OrderedDict[Sequence, None]:
        queue = self._queues.setdefault((seq.params.tenant, seq.params.priority), OrderedDict())
        queue[seq] = None
        self._length += 1
        self._prompts[seq.fingerprint] += 1
        return queue

    # -- what tenants have been served --------------------------------------------------------------------------------

    def _owed(self, seq: Sequence) -> int:
        return max(self._served.get(seq.params.tenant, 0), self._floor)

    def charge(self, seq: Sequence, tokens: int) -> None:
        """On admission: what the request may come to."""
        owed = self._owed(seq)
        self._floor = owed
        self._served[seq.params.tenant] = owed + tokens
        seq.charge, seq.spent = tokens, 0
        if len(self._served) > FORGET:
            self._served = {t: n for t, n in self._served.items() if n > self._floor}

    def settle(self, seq: Sequence) -> None:
        """When it ends: only what it used stays charged."""
        if seq.params.tenant in self._served:
            self._served[seq.params.tenant] -= seq.charge - seq.spent
        seq.charge = seq.spent = 0
