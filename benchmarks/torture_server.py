"""One server of the money torture: the real service with its real pool, in front of the scripted upstream."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
from pathlib import Path

from tidelock.remote import Client, Patience, TokenPolicy
from tidelock.service.prices import Price, PriceBook
from tidelock.service.server import serving
from tidelock.service.state import open_state
from tidelock.service.upstreams import Pool, Upstream
from tidelock.service.upstreams.pool import Options
from tidelock.tokens.template import get_template
from tidelock.tokens.tokenizer import ByteTokenizer

BOOK = PriceBook("torture", {"tide": Price(input_nano=300, cached_input_nano=30, output_nano=1500)})


def pool_over(url: str, patience_s: float) -> Pool:
    """The service's own pool, over two names of the upstream: what one of them refuses is asked of the other."""
    client = Client()
    patience = Patience(connect_s=patience_s, first_s=patience_s, idle_s=patience_s)
    upstreams = [Upstream(name, TokenPolicy(f"{url}/{name}", "k", None, client, patience=patience), max_in_flight=1000)
                 for name in ("north", "south")]  # fmt: skip
    return Pool(upstreams, Options(max_waiting=10_000, probe_s=0.5))


async def run(args: argparse.Namespace) -> None:
    template = get_template("xtml", ByteTokenizer())
    policy = pool_over(args.upstream, args.patience)
    options = {"sweep_interval_s": 1.0, "request_timeout_s": args.timeout}
    state = open_state(
        args.dir, policy=policy, template=template, prices=BOOK, model="tide", context_length=8192, weights_version=1,
        database=args.database, **options,
    )  # fmt: skip
    state.worker.lease_s = args.lease
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with serving(state, port=args.port, ready_file=args.dir / "ready"):
        with contextlib.suppress(FileNotFoundError):
            os.remove(args.dir / "starting")
        await stop.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--database", required=True)
    parser.add_argument("--upstream", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--patience", type=float, default=1.0, help="with an upstream that says nothing, seconds")
    parser.add_argument("--timeout", type=float, default=60.0, help="for a whole request, seconds")
    parser.add_argument("--lease", type=float, default=3.0)
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
