"""`tidelock eval`: success on held-out tasks, in process."""

from __future__ import annotations

import asyncio
from pathlib import Path

from .main import command


def add(subparsers) -> None:
    p = command(subparsers, "eval", run, "measure a checkpoint on held-out tasks of one or more families",
                "tidelock eval demo-run --checkpoint demo-run/checkpoints/sft --family hops --family lookup -n 100")  # fmt: skip
    p.add_argument("dir", type=Path, help="a run directory (its tokenizer is used)")
    p.add_argument("--checkpoint", type=Path, help="default: the release that serves")
    p.add_argument("--family", action="append", help="repeat for several; default: all")
    p.add_argument("-n", type=int, default=100, help="tasks per family")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--temperature", type=float, default=0.0)


def run(args) -> dict:
    from tidelock.agent import Agent
    from tidelock.engine import Limits
    from tidelock.envs.registry import FAMILIES, family, tasks
    from tidelock.envs.run import run_tasks
    from tidelock.loop.console import Console
    from tidelock.loop.demo import TOOLSET
    from tidelock.loop.figures import summarise
    from tidelock.loop.rundir import RunDir
    from tidelock.sandbox import ToolHost
    from tidelock.tokens.errors import UserError
    from tidelock.tokens.policy import SamplingParams

    if args.n < 1:
        raise UserError(f"-n must be at least 1, got {args.n}")
    names = [family(name).name for name in args.family or FAMILIES]
    directory = RunDir(args.dir).existing()
    checkpoint = args.checkpoint or directory.path / directory.registry.current().checkpoint
    model, template = directory.load(checkpoint), directory.template()
    wanted = [(t, 0) for name in names for t in tasks(name, "heldout", args.seed, args.n)]

    async def work() -> list:
        host = await ToolHost.start(TOOLSET)
        engine = directory.engine(model, template, limits=Limits(max_batch=96))
        agent = Agent(engine, template, SamplingParams(max_tokens=160, temperature=args.temperature))
        try:
            with Console().progress("eval", len(wanted), "tasks") as bar:
                return await run_tasks(agent, host, wanted, args.seed, 96, lambda scored: bar.advance(1))
        finally:
            engine.close()
            await host.stop()

    figures = {k: v for k, v in summarise(asyncio.run(work())).items() if k in names}
    for name, f in figures.items():
        print(f"{name:16} {f['success']:6.1%}  [{f['low']:.3f}, {f['high']:.3f}]  n {f['n']}")
    return {"checkpoint": str(checkpoint), "families": figures}
