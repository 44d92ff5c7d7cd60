"""Arithmetic through the calculator."""

from random import Random

from tidelock.envs.specs import CALCULATOR
from tidelock.envs.task import Draft, Family, Solver

WORDINGS = ('What is "{}"?', 'Compute "{}".', 'Calculate "{}".')


def draw(rng: Random) -> Draft:
    expression = f"{rng.randint(2, 99)} {rng.choice('+-*')} {rng.randint(2, 99)}"

    def solve() -> Solver:
        return (yield "calculator", {"expression": expression})

    return Draft(rng.choice(WORDINGS).format(expression), (CALCULATOR,), {}, solve)


ARITHMETIC = Family("arithmetic", "base", draw)
