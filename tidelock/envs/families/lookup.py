"""A key in a small store. Half of the time a tool that is not needed is on offer too."""

from random import Random

from tidelock.envs.specs import CONVERT, GET
from tidelock.envs.task import Draft, Family, Solver
from tidelock.envs.words import name, names

WORDINGS = ('Look up "{}".', 'What is stored under "{}"?', 'Give me the value of "{}".')


def value(rng: Random) -> str:
    return name(rng) if rng.random() < 0.5 else str(rng.randint(2, 499))


def draw(rng: Random) -> Draft:
    keys = names(rng, 5)
    store = {key: value(rng) for key in keys}
    key = rng.choice(keys)

    def solve() -> Solver:
        return (yield "get", {"key": key})

    tools = (GET, CONVERT) if rng.random() < 0.5 else (GET,)
    return Draft(rng.choice(WORDINGS).format(key), tools, {"store": store}, solve)


LOOKUP = Family("lookup", "base", draw)
