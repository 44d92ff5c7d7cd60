"""Which upstream a conversation belongs to, so that its prefix is still cached there when it goes on.

Rendezvous hashing on the conversation's head, which every later turn has in common: several gateways agree without
talking, and an upstream that comes or goes moves only its own share. Load is bounded: above its share of what is in
flight, times `spread`, an upstream is passed over, so a head that everybody sends does not drown one of them.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Sequence

LONGEST = 4096  # ids of a head that are looked at
WITHOUT_TURNS = 256  # ids that are, where no turn of an assistant is found
LEAST_BOUND = 4  # requests: a batch of so many costs an engine hardly more than one


def head(prompt_ids: Sequence[int], turn: Sequence[int]) -> bytes:
    """What identifies the conversation: a digest of what comes before the first assistant `turn` (its opening ids)."""
    ids = tuple(prompt_ids[: LONGEST + len(turn)])
    at = _find(ids, tuple(turn))
    return hashlib.blake2b(array("Q", ids[: WITHOUT_TURNS if at is None else at]).tobytes(), digest_size=16).digest()


def _find(ids: tuple[int, ...], turn: tuple[int, ...]) -> int | None:
    at = -1
    while turn:
        try:
            at = ids.index(turn[0], at + 1)
        except ValueError:
            break
        if ids[at : at + len(turn)] == turn:
            return at
    return LONGEST if turn and len(ids) > LONGEST else None


def score(key: bytes, name: str, weight: float) -> float:
    """The upstream of the highest score has the conversation; each gets a share of them all that goes with its weight."""
    drawn = int.from_bytes(hashlib.blake2b(name.encode(), key=key, digest_size=8).digest(), "big")
    return -weight / math.log((drawn + 1) / (2**64 + 2))


def bound(in_flight: int, share: float, spread: float) -> int:
    """Requests an upstream may have, this one included, when `in_flight` others run and `share` of them would be its."""
    return max(LEAST_BOUND, math.ceil(spread * share * (in_flight + 1)))
