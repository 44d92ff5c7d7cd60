"""Names that cannot be memorised: a letter and three digits, like an order or part number."""

from __future__ import annotations

from random import Random

LETTERS = "ABCDEFGHKMNPRTVX"


def name(rng: Random) -> str:
    return rng.choice(LETTERS) + "".join(rng.choice("0123456789") for _ in range(3))


def names(rng: Random, n: int) -> list[str]:
    """n different names."""
    out: list[str] = []
    while len(out) < n:
        candidate = name(rng)
        if candidate not in out:
            out.append(candidate)
    return out
