"""Speculation on and off, interleaved, on the tool loops of a demo run's own model and tasks.

    python -m benchmarks.speculation demo-run/checkpoints/sft --tokenizer demo-run/tokenizer

Every episode is played with both engines; the ids must be equal. Prints, for each number of episodes in flight, tokens
per forward, the share of drafted ids that were right, and the ratio of tokens per second, on to off (median of pairs).
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from random import Random

from tidelock.agent import Agent
from tidelock.engine import Engine, Limits
from tidelock.envs.registry import FAMILIES, tasks
from tidelock.envs.run import run_tasks
from tidelock.loop.demo import TOOLSET
from tidelock.models import load_checkpoint
from tidelock.sandbox import ToolHost
from tidelock.tokens.policy import SamplingParams
from tidelock.tokens.template import get_template
from tidelock.tokens.tokenizer import BPETokenizer


async def play(engine, template, host, tasks, in_flight, temperature):
    before = (engine.stats.steps, engine.stats.drafted, engine.stats.accepted)
    agent = Agent(engine, template, SamplingParams(max_tokens=160, temperature=temperature))
    begun = time.perf_counter()
    scored = await run_tasks(agent, host, [(t, 0) for t in tasks], 0, in_flight)
    wall = time.perf_counter() - begun
    after = (engine.stats.steps, engine.stats.drafted, engine.stats.accepted)
    sampled = sum(s.episode.sampled_tokens for s in scored)
    return [s.episode.ids for s in scored], sampled, wall, [b - a for a, b in zip(before, after)]


async def main(args) -> None:
    template = get_template("xtml", BPETokenizer.load(args.tokenizer))
    model = load_checkpoint(args.checkpoint).eval()
    wanted = [t for name in FAMILIES for t in tasks(name, "heldout", 0, args.pairs * args.each // len(FAMILIES) + 1)]
    Random(0).shuffle(wanted)
    host = await ToolHost.start(TOOLSET)
    print(f"{'in flight':>9} {'T':>4} {'tokens/forward off':>19} {'on':>6} {'right / drafted':>16} {'speed on/off':>13}")
    for temperature in (1.0, 0.0):
        for in_flight in args.in_flight:
            engines = {
                name: Engine(model, limits=Limits(draft_tokens=n), boundary_id=template.stop_ids[0], template=template)
                for name, n in (("off", 0), ("on", args.draft))
            }
            ratios, total = [], {"off": [0] * 4, "on": [0] * 4}
            for pair in range(args.pairs):
                speed, ids = {}, {}
                part = wanted[pair * args.each : (pair + 1) * args.each]
                for name in ("off", "on") if pair % 2 else ("on", "off"):
                    ids[name], sampled, wall, counts = await play(engines[name], template, host, part, in_flight, temperature)
                    speed[name] = sampled / wall
                    total[name] = [a + b for a, b in zip(total[name], [sampled, *counts])]
                assert ids["on"] == ids["off"]
                ratios.append(speed["on"] / speed["off"])
            for engine in engines.values():
                engine.close()
            off, on = total["off"], total["on"]
            print(f"{in_flight:9} {temperature:4} {off[0] / off[1]:19.2f} {on[0] / on[1]:6.2f} "
                  f"{on[3]:8} / {on[2]:5} {statistics.median(ratios):13.2f}", flush=True)  # fmt: skip
    await host.stop()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--tokenizer", required=True, help="directory of the tokenizer")
    parser.add_argument("--draft", type=int, default=8, help="most tokens of a draft")
    parser.add_argument("--in-flight", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--each", type=int, default=24, help="episodes of one side of a pair")
    asyncio.run(main(parser.parse_args()))
