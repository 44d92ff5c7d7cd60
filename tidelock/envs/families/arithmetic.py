"""Arithmetic through the calculator."""

from random import Random

from tidelock.envs.specs import CALCULATOR
from tidelock.envs.task import Draft, Family, Solver

WORDINGS = ("What is {}?", "Compute {}.", "Calculate {}.")


def draw(rng: Random) -> Draft:
    terms = [str(rng.randint(2, 99)) for _ in range(rng.choice((2, 2, 2, 3)))]
    expression = terms[0] + "".join(f" {rng.choice('+-*')} {t}" for t in terms[1:])

    def solve() -> Solver:
        return (yield "calculator", {"expression": expression})

    return Draft(rng.choice(WORDINGS).format(expression), (CALCULATOR,), {}, solve)


ARITHMETIC = Family("arithmetic", "base", draw)
