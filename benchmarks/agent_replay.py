"""How much a tool loop prefills that was not new: `python -m benchmarks.agent_replay [--conversations 64 --turns 20]`.

Conversations share a system prompt with tools. Each turn sends everything so far, the ids the model sampled included,
plus one new message, and samples an answer; conversations run side by side, each waiting for its own answer as an
agent does. New tokens are the shared prompt once and every message once. Prints a table; --check makes it a test.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from dataclasses import dataclass

from tidelock.engine import Engine, Limits
from tidelock.models import TransformerLM, preset
from tidelock.tokens.policy import SamplingParams

VOCAB, END = 512, 9


@dataclass(frozen=True)
class Replay:
    new: int  # tokens the clients sent for the first time
    prefilled: int
    cached: int
    sent: int  # tokens of all prompts, what an engine without a cache prefills
    seconds: float

    @property
    def ratio(self) -> float:
        return self.prefilled / self.new


async def replay(engine: Engine, conversations: int, turns: int, seed: int = 0) -> Replay:
    rng = random.Random(seed)
    word = [i for i in range(VOCAB) if i != END]
    system = [*rng.choices(word, k=200), END]
    new, sent = len(system), 0

    async def converse(number: int) -> None:
        nonlocal new, sent
        rng, ids = random.Random(seed * 1000 + number), list(system)
        for turn in range(turns):
            message = [*rng.choices(word, k=rng.randint(20, 60)), END, *word[:3]]
            ids += message
            new, sent = new + len(message), sent + len(ids)
            params = SamplingParams(max_tokens=rng.randint(8, 24), stop_ids=(END,), seed=turn, tenant=str(number % 4))
            async for chunk in engine.generate(ids.copy(), params):
                ids += chunk.ids
            await asyncio.sleep(rng.random() * 0.01)  # the tool runs

    began = time.perf_counter()
    await asyncio.gather(*(converse(i) for i in range(conversations)))
    stats = engine.stats
    return Replay(new, stats.prefilled, stats.cached, sent, time.perf_counter() - began)


def run(name: str, conversations: int, turns: int, limits: Limits = Limits()) -> Replay:
    engine = Engine(TransformerLM(preset(name, VOCAB), seed=0), limits=limits, boundary_id=END)
    try:
        return asyncio.run(replay(engine, conversations, turns))
    finally:
        engine.close()


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--conversations", type=int, default=64)
    p.add_argument("--turns", type=int, default=20)
    p.add_argument("--pages", type=int, help="latent pages of 16 tokens (default: enough)")
    p.add_argument("--slots", type=int, help="KDA states (default: enough)")
    p.add_argument("--host-mib", type=int, default=0, help="offload evicted data to this much host memory")
    p.add_argument("--disk-mib", type=int, default=0, help="and to this much of --disk-dir")
    p.add_argument("--disk-dir")
    p.add_argument("--check", action="store_true", help="fail unless at most 1.05 times the new tokens were prefilled")
    args = p.parse_args()
    limits = Limits(n_pages=args.pages, n_slots=args.slots, host_bytes=args.host_mib << 20, disk_bytes=args.disk_mib << 20,
                    disk_dir=args.disk_dir)  # fmt: skip
    print(f"{args.conversations} conversations x {args.turns} turns")
    print(f"{'model':>8} {'new':>8} {'prefilled':>9} {'ratio':>6} {'cached':>9} {'sent':>9} {'seconds':>8}")
    for name in ("nano-k2", "nano-k3"):
        r = run(name, args.conversations, args.turns, limits)
        print(f"{name:>8} {r.new:>8} {r.prefilled:>9} {r.ratio:>6.3f} {r.cached:>9} {r.sent:>9} {r.seconds:>8.1f}")
        if args.check and r.ratio > 1.05:
            raise SystemExit(f"{name} prefilled {r.ratio:.3f} times the new tokens")


if __name__ == "__main__":
    main()
