"""New demand: two tools that were only ever used apart. Look a quantity up, then convert it."""

from random import Random

from tidelock.envs.specs import CONVERT, GET
from tidelock.envs.task import Draft, Family, Solver
from tidelock.envs.toolset import UNITS
from tidelock.envs.words import names

WORDINGS = ('Look up "{}" and convert {} to {}.', 'Give me the value of "{}", {} in {}.')


def draw(rng: Random) -> Draft:
    keys = names(rng, 5)
    store = {key: str(rng.randint(2, 499)) for key in keys}
    key, (unit, to) = rng.choice(keys), rng.choice(list(UNITS))

    def solve() -> Solver:
        value = yield "get", {"key": key}
        return (yield "convert", {"value": value, "unit": unit, "to": to})

    steps = (f'Look up "{key}".', f"Convert {{}} {unit} to {to}.")
    return Draft(rng.choice(WORDINGS).format(key, unit, to), (GET, CONVERT), {"store": store}, solve, steps)


LOOKUP_CONVERT = Family("lookup_convert", "new", draw)
