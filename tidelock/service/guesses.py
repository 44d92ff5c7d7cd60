"""Wrong keys, counted by where they come from: an address may guess a few times, then must wait.

Per worker and in memory, which is bounded: the address that guessed longest ago is forgotten first. IPv6 clients are
counted by their /64, because one subscriber has all of it.
"""

from __future__ import annotations

import ipaddress
import math
import time
from collections import OrderedDict
from collections.abc import Callable
from functools import lru_cache

BURST, PER_S = 30, 0.5  # wrong keys at once, and how fast that is forgiven
MOST_ADDRESSES = 10_000


class Guesses:
    def __init__(
        self, burst: int = BURST, per_s: float = PER_S, most: int = MOST_ADDRESSES, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._burst, self._per_s, self._most, self._clock = burst, per_s, most, clock
        self._by_address: OrderedDict[str, tuple[float, float]] = OrderedDict()  # wrong keys not forgiven yet, as of when

    def wait_s(self, address: str) -> int:
        """Seconds until this address may try a key again; 0 if it may now."""
        if not self._by_address:
            return 0
        held = self._held(network(address))
        return max(0, math.ceil((held - self._burst + 1) / self._per_s)) if held > self._burst - 1 else 0

    def wrong(self, address: str) -> None:
        place = network(address)
        self._by_address[place] = (self._held(place) + 1, self._clock())
        self._by_address.move_to_end(place)
        if len(self._by_address) > self._most:
            self._by_address.popitem(last=False)

    def __len__(self) -> int:
        return len(self._by_address)

    def _held(self, place: str) -> float:
        held, since = self._by_address.get(place, (0.0, 0.0))
        return max(0.0, held - (self._clock() - since) * self._per_s)


@lru_cache(10_000)
def network(address: str) -> str:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address[:64]
    if parsed.version == 6 and parsed.ipv4_mapped is None:
        return str(ipaddress.ip_network((parsed, 64), strict=False))
    return str(getattr(parsed, "ipv4_mapped", None) or parsed)
