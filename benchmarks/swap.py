"""How long live streams stand still while weights are swapped: `python -m benchmarks.swap --preset small-k3`.

Eight requests stream while another checkpoint of the same shape is loaded from disk, checked, packed and adopted, once
with each policy. Prints, per policy, the longest time no stream got a token: before the swap (what a step takes),
while the new weights were being read, checked and packed (the two compete for the cores), and from the exchange on (with
"finish" steps then run old and new weights, with "continue" the new ones first run what every stream has so far).
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
import time
from pathlib import Path

from tidelock.engine import Engine, Limits
from tidelock.models import TransformerLM, load_checkpoint, preset, save_checkpoint
from tidelock.tokens.policy import SamplingParams

STREAMS, PROMPT = 8, 64


async def measure(engine: Engine, checkpoint: Path, version: int, policy: str) -> dict[str, float]:
    rng, ticks = random.Random(version), []
    vocab = engine._config.vocab_size

    async def stream(i: int) -> None:
        prompt = [rng.randrange(vocab) for _ in range(PROMPT)]
        async for _ in engine.generate(prompt, SamplingParams(max_tokens=engine.context - PROMPT, seed=i)):
            ticks.append(time.perf_counter())

    streams = [asyncio.create_task(stream(i)) for i in range(STREAMS)]
    while len(ticks) < 20 * STREAMS:
        await asyncio.sleep(0.01)
    marks = [ticks[4 * STREAMS], time.perf_counter()]
    await engine.swap(str(checkpoint), version, policy)
    marks.append(time.perf_counter())
    seen = len(ticks)
    while len(ticks) < seen + 10 * STREAMS and not all(s.done() for s in streams):
        await asyncio.sleep(0.01)
    marks.append(time.perf_counter())
    for s in streams:
        s.cancel()
    await asyncio.gather(*streams, return_exceptions=True)

    def longest(begin: float, end: float) -> float:
        """Of the silences that touch this span."""
        return max(b - a for a, b in zip(ticks, ticks[1:]) if b > begin and a < end)

    gaps = [longest(a, b) for a, b in zip(marks, marks[1:])]
    return dict(zip(("before", "loading", "after"), gaps), swapped_in=marks[2] - marks[1])


async def run(name: str, vocab: int) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        for seed in (0, 1):
            save_checkpoint(Path(scratch) / str(seed), TransformerLM(preset(name, vocab), seed=seed))
        model = load_checkpoint(Path(scratch) / "0")
        total, active = model.parameter_counts()
        print(f"{name}: {total / 1e6:.1f} M parameters, {active / 1e6:.1f} M active; {STREAMS} streams; longest silence in ms")
        engine = Engine(model, 0, limits=Limits(n_pages=2048, n_slots=24, stream_every=1))
        print(f"self-test: {engine.exactness}")
        print(f"{'policy':>9} {'before':>8} {'loading':>8} {'after':>8} {'swapped in (s)':>15}")
        try:
            for version, policy in enumerate(("finish", "continue"), 1):
                r = await measure(engine, Path(scratch) / str(version % 2), version, policy)
                print(f"{policy:>9} {r['before'] * 1e3:>8.0f} {r['loading'] * 1e3:>8.0f} {r['after'] * 1e3:>8.0f} "
                      f"{r['swapped_in']:>15.2f}", flush=True)  # fmt: skip
        finally:
            engine.close()


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--preset", default="nano-k3")
    p.add_argument("--vocab", type=int, default=4096)
    args = p.parse_args()
    asyncio.run(run(args.preset, args.vocab))


if __name__ == "__main__":
    main()
