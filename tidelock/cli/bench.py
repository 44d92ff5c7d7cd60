"""`tidelock bench serve`: latency and throughput of one server, or of several taken in turn."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from .main import command


def add(subparsers) -> None:
    p = command(subparsers, "bench", None, "measure a model server",
                "tidelock bench serve tokens:http://127.0.0.1:8000 --api-key sk-... --load agents")  # fmt: skip
    actions = p.add_subparsers(dest="action", required=True, metavar="ACTION")
    s = command(actions, "serve", run, "latency and throughput under Poisson arrivals and agent conversations",
                "tidelock bench serve tokens:http://127.0.0.1:8000 --api-key sk-... --out bench\n"
                "  tidelock bench serve tokens:http://127.0.0.1:8000 llama:http://127.0.0.1:8080 --load agents --rounds 3")  # fmt: skip
    s.add_argument("servers", nargs="+", metavar="[KIND:]URL", help="kinds: chat (OpenAI-compatible, the default; give the "
                   "/v1), tokens (Tidelock's or vLLM's token routes), llama (llama-server). Several take turns")  # fmt: skip
    s.add_argument("--api-key", default=os.environ.get("OPENAI_API_KEY", "none"), help="default: $OPENAI_API_KEY")
    s.add_argument("--model", help="its name where the server needs one")
    s.add_argument("--load", choices=("poisson", "agents", "both"), default="both")
    s.add_argument("--requests", type=int, default=48, help="of the Poisson load")
    s.add_argument("--rate", type=float, default=4.0, help="Poisson arrivals per second")
    s.add_argument("--conversations", type=int, default=16, help="of the agent load")
    s.add_argument("--turns", type=int, default=6, help="of each conversation, at most")
    s.add_argument("--concurrency", type=int, default=16, help="conversations at a time")
    s.add_argument("--branch", type=float, default=0.15, help="chance that a conversation goes two ways after a turn")
    s.add_argument("--context", type=int, default=2048, help="no conversation grows past this many tokens")
    s.add_argument("--end-id", type=int, default=260, help="token that ends a message, for the kinds that take ids")
    s.add_argument("--rounds", type=int, default=1, help="repeat, servers interleaved; the table shows medians")
    s.add_argument("--seed", type=int, default=0)
    s.add_argument("--out", type=Path, help="also write bench.md, bench.json and plots to this directory")


def run(args) -> dict:
    from tidelock.loop.bench.report import machine, table, write
    from tidelock.tokens.errors import UserError

    for name in ("requests", "rate", "conversations", "turns", "concurrency", "rounds"):
        if getattr(args, name) <= 0:
            raise UserError(f"--{name} must be positive")
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k not in ("run", "api_key", "json")}
    settings |= machine()
    rows, rounds, runs = asyncio.run(measure(args))
    if args.json != "-":
        print(table(rows))
    files = write(args.out, rows, rounds, runs, settings) if args.out else []
    failed = next((r["first_error"] for r in rows if r["errors"]), "")
    if failed and args.json != "-":
        print(f"\nsome requests failed; the first said: {failed}")
    return {"settings": settings, "median": rows, "rounds": rounds, "files": files, "failed": all(r["errors"] for r in rows)}


async def measure(args):
    """(median rows, figures of every round, the runs), servers taken in turn within each round and load."""
    from tidelock.loop.bench import agents, client, drive, figures, poisson
    from tidelock.loop.bench.load import reusable
    from tidelock.loop.bench.measure import middle
    from tidelock.loop.console import Console

    kinds = ("poisson", "agents") if args.load == "both" else (args.load,)
    runs, rounds = [], []
    servers = [client(target, args.api_key, args.model, args.end_id) for target in args.servers]
    with Console().progress("bench", args.rounds * len(kinds) * len(servers), "runs") as bar:
        for i in range(args.rounds):
            for kind in kinds:
                seed = f"{args.seed}/{i}"  # a new seed each round, or every cache would know the load by heart
                load = poisson(seed, args.requests, args.rate) if kind == "poisson" else agents(
                    seed, args.conversations, args.turns, concurrency=args.concurrency, branch=args.branch,
                    context=args.context)  # fmt: skip
                for server in servers:
                    runs.append(await drive(load, server))
                    rounds.append({"round": i, "reusable_tokens": reusable(load), **figures(runs[-1])})
                    bar.advance(1)
    rows = [middle([r for r in rounds if (r["server"], r["load"]) == key])
            for key in dict.fromkeys((r["server"], r["load"]) for r in rounds)]  # fmt: skip
    return rows, rounds, runs
