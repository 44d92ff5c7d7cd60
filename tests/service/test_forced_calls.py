"""Whatever the schema and however it is forced, the arguments satisfy it: random weights over the real engine and service.

`python -m benchmarks.forced_calls` is the long form."""

from __future__ import annotations

import asyncio
import random

import pytest

from benchmarks.forced_calls import measure
from benchmarks.mfjs_schemas import EXPLOSIVE, random_schema
from tidelock.service.mfjs import fault


@pytest.mark.parametrize("seed", [0, 1])
def test_random_schemas_in_every_way_of_forcing_and_explosive_ones_in_bounded_time(seed, capsys):
    rng = random.Random(seed)
    schemas = [random_schema(rng) for _ in range(3)]
    explosive = {name: EXPLOSIVE[name] for name in ("a megabyte", "a nested repetition")} if seed else {}
    assert asyncio.run(measure(schemas, explosive, seed, True)), capsys.readouterr().out


def test_the_generator_speaks_kimi_s_dialect():
    rng = random.Random(7)
    assert [fault(random_schema(rng)) for _ in range(300)] == [None] * 300
