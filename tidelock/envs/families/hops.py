"""Following links in a small graph: 1 to 3 steps as a base skill, 4 as new demand."""

from functools import partial
from random import Random

from tidelock.envs.specs import FOLLOW
from tidelock.envs.task import Draft, Family, Solver
from tidelock.envs.words import names

WORDINGS = ('Start at "{}" and follow {} steps.', 'Go {1} steps from "{0}".')


def draw(rng: Random, depths: tuple[int, ...]) -> Draft:
    nodes = names(rng, 8)
    graph = dict(zip(nodes, nodes[1:] + nodes[:1]))
    start, depth = rng.choice(nodes), rng.choice(depths)

    def solve() -> Solver:
        at = start
        for _ in range(depth):
            at = yield "follow", {"node": at}
        return at

    wording = rng.choice(WORDINGS)
    steps = (wording.format(start, 2), wording.format("{}", depth - 2)) if depth > 3 else ()
    return Draft(wording.format(start, depth), (FOLLOW,), {"graph": graph}, solve, steps)


HOPS = Family("hops", "base", partial(draw, depths=(1, 2, 3)))
DEEP_HOPS = Family("deep_hops", "new", partial(draw, depths=(4,)))
