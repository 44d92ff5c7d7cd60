"""Units of length, mass and time. Half of the time a tool that is not needed is on offer too."""

from random import Random

from tidelock.envs.specs import CONVERT, GET
from tidelock.envs.task import Draft, Family, Solver
from tidelock.envs.toolset import UNITS

WORDINGS = ("Convert {} {} to {}.", "How much is {} {} in {}?")


def draw(rng: Random) -> Draft:
    (unit, to), value = rng.choice(list(UNITS)), str(rng.randint(2, 499))

    def solve() -> Solver:
        return (yield "convert", {"value": value, "unit": unit, "to": to})

    tools = (GET, CONVERT) if rng.random() < 0.5 else (CONVERT,)
    return Draft(rng.choice(WORDINGS).format(value, unit, to), tools, {}, solve)


CONVERSION = Family("convert", "base", draw)
