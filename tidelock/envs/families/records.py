"""Read, modify, write: judged by the state the records are left in."""

from random import Random

from tidelock.envs.specs import CALCULATOR, READ, WRITE
from tidelock.envs.task import Draft, Family, Solver
from tidelock.envs.words import names

WORDINGS = ('Change "{}" by {}.', 'Adjust "{}" by {}.')


def draw(rng: Random) -> Draft:
    keys = names(rng, 3)
    records = {key: rng.randint(100, 499) for key in keys}
    key, change = rng.choice(keys), f"{rng.choice('+-')} {rng.randint(2, 99)}"

    def solve() -> Solver:
        before = yield "read", {"record": key}
        after = yield "calculator", {"expression": f"{before} {change}"}
        return (yield "write", {"record": key, "value": after})

    prompt = rng.choice(WORDINGS).format(key, change)
    return Draft(prompt, (READ, CALCULATOR, WRITE), {"records": records}, solve)


RECORDS = Family("records", "base", draw)
