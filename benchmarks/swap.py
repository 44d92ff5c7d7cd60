"""How long live streams stand still while weights are swapped: `python -m benchmarks.swap --preset small-k3`.

Eight requests stream while another checkpoint of the same shape is loaded from disk, checked, packed and adopted, once
with each policy. Prints, per policy, the longest time no stream got a token: before the swap (what a step takes),
while the new weights were being read, checked and packed (the two compete for the cores), and from the exchange on, until
every stream has gone on for a while (with "continue" from the new weights, which until then run beside the old ones what
each has so far). `any one`: the longest that any single stream waited for its next token, from the exchange on.
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

STREAMS, PROMPT, LONG = 8, 64, 2048


async def measure(engine: Engine, checkpoint: Path, version: int, policy: str, before: int) -> dict[str, float]:
    rng, ticks, own, versions = random.Random(version), [], [[] for _ in range(STREAMS)], [0] * STREAMS
    vocab = engine._config.vocab_size

    async def stream(i: int) -> None:
        prompt = [rng.randrange(vocab) for _ in range(PROMPT)]
        params = SamplingParams(max_tokens=min(engine.context, LONG) - PROMPT, seed=i)
        async for chunk in engine.generate(prompt, params):
            ticks.append(time.perf_counter())
            own[i].append(ticks[-1])
            versions[i] = chunk.weights_version

    streams = [asyncio.create_task(stream(i)) for i in range(STREAMS)]
    while len(ticks) < before * STREAMS:
        await asyncio.sleep(0.01)
    marks = [ticks[4 * STREAMS], time.perf_counter()]
    await engine.swap(str(checkpoint), version, policy)
    marks.append(time.perf_counter())
    seen = len(ticks)
    moved = {version} if policy == "continue" else {version - 1}
    while (len(ticks) < seen + 10 * STREAMS or set(versions) != moved) and not all(s.done() for s in streams):
        await asyncio.sleep(0.01)
    marks.append(time.perf_counter())
    for s in streams:
        s.cancel()
    await asyncio.gather(*streams, return_exceptions=True)

    def longest(ticks: list[float], begin: float, end: float) -> float:
        """Of the silences that touch this span."""
        return max((b - a for a, b in zip(ticks, ticks[1:]) if b > begin and a < end), default=0.0)

    gaps = [longest(ticks, a, b) for a, b in zip(marks, marks[1:])]
    one = max(longest(mine, *marks[2:]) for mine in own)
    return dict(zip(("before", "loading", "after"), gaps), one=one, swapped_in=marks[2] - marks[1],
                moved=marks[3] - marks[2])  # fmt: skip


async def run(name: str, vocab: int, weights: str | None, before: int) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        for seed in (0, 1):
            save_checkpoint(Path(scratch) / str(seed), TransformerLM(preset(name, vocab), seed=seed))
        model = load_checkpoint(Path(scratch) / "0")
        total, active = model.parameter_counts()
        print(f"{name}: {total / 1e6:.1f} M parameters, {active / 1e6:.1f} M active; {STREAMS} streams; longest silence, ms")
        limits = Limits(n_pages=2304, n_slots=40, stream_every=1)
        engine = Engine(model, 0, limits=limits, weights=weights)
        print(f"self-test: {engine.exactness}")
        print(f"{'policy':>9} {'before':>8} {'loading':>8} {'after':>8} {'any one':>8} {'swapped in (s)':>15} "
              f"{'all there (s)':>14}")  # fmt: skip
        try:
            for version, policy in enumerate(("finish", "continue"), 1):
                r = await measure(engine, Path(scratch) / str(version % 2), version, policy, before)
                print(f"{policy:>9} {r['before'] * 1e3:>8.0f} {r['loading'] * 1e3:>8.0f} {r['after'] * 1e3:>8.0f} "
                      f"{r['one'] * 1e3:>8.0f} {r['swapped_in']:>15.2f} {r['moved']:>14.2f}", flush=True)  # fmt: skip
        finally:
            engine.close()


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--preset", default="nano-k3")
    p.add_argument("--vocab", type=int, default=4096)
    p.add_argument("--weights", help="serve a packed copy, as `tidelock serve --weights`")
    p.add_argument("--before", type=int, default=20, help="tokens that each stream has when the swap begins")
    args = p.parse_args()
    asyncio.run(run(args.preset, args.vocab, args.weights, args.before))


if __name__ == "__main__":
    main()
