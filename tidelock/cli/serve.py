"""`tidelock serve`: the current release behind the metered API."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import sys
from pathlib import Path

from tidelock.service.member import Member

from .main import command


def add(subparsers) -> None:
    p = command(subparsers, "serve", run, "serve the current release of a run directory behind the metered API",
                "tidelock serve demo-run --port 8000")  # fmt: skip
    p.add_argument("dir", type=Path, help="a run directory (made by `tidelock demo` or `tidelock release`)")
    p.add_argument("--host", default="127.0.0.1")
    p.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    p.add_argument("--workers", type=int, default=1, metavar="N",
                   help="processes that share the port, the books and the trace, each with the model in its own memory")
    p.add_argument("--max-batch", type=int, default=96, help="requests that run at the same time")
    p.add_argument("--weights", choices=("fp32", "bf16", "fp16", "int8", "int4", "mxfp4"),
                   help="serve a packed copy: faster and smaller; fp32 keeps every bit, the others round the weights")
    p.add_argument("--upstreams", type=Path, metavar="FILE",
                   help="let other servers answer: an upstreams.toml (default: DIR/service/upstreams.toml, if it is there)")
    p.add_argument("--lenient", action="store_true",
                   help="for clients written for other APIs: take any model name, and sampling parameters that Kimi fixes")
    p.add_argument("--log", choices=("json", "text", "off"), default="off",
                   help="one line for every request and event, on stderr; off (default): only warnings, as plain text")
    p.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="info",
                   help="default: info; debug tells what exceptions say, which may quote what clients sent")
    p.add_argument("--otel", metavar="URL", help="send OpenTelemetry traces to this OTLP/HTTP collector, e.g. http://127.0.0.1:4318")
    p.add_argument("--ready-file", type=Path, help="appears with the base URL in it once requests are answered")
    p.add_argument("--exit-with-parent", type=int, metavar="PID", help="end when process PID, which started this one, ends")
    p.add_argument("--member", type=Member.parse, help=argparse.SUPPRESS)  # which worker: told by the process that has them


def run(args) -> dict:
    from tidelock.loop.rundir import RunDir
    from tidelock.sandbox.level import die_with_parent
    from tidelock.service import logs, server
    from tidelock.service.server import bind, serving
    from tidelock.tokens.errors import UserError

    if args.exit_with_parent:
        die_with_parent()
        if os.getppid() != args.exit_with_parent:  # it died before we could ask to be told
            raise UserError(f"process {args.exit_with_parent}, which started this server, is gone")
    if args.workers > 1 and args.member is None:
        return fleet(args)
    bind(args.host, args.port, shared=args.member is not None).close()  # a taken port is said before the model is loaded
    state = state_of(RunDir(args.dir).existing(), args)
    state.lenient = args.lenient
    if args.otel:
        from tidelock.service.tracing import Tracing

        state.tracing = Tracing.to(args.otel)
    state.access_log = logs.configure(args.log, args.log_level)

    async def main() -> str:
        stop = asyncio.Event()
        for name in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(name, stop.set)
        async with serving(state, args.host, args.port, args.ready_file) as running:
            if args.member is None:
                print(f"serving {state.model} ({answered_by(state)}) at {running.base_url}", flush=True)
                print(f"console at {running.base_url.removesuffix('/v1')}/console/", flush=True)
            waiter = asyncio.create_task(stop.wait())
            await asyncio.wait([waiter, running.task], return_when=asyncio.FIRST_COMPLETED)
            waiter.cancel()
            return running.base_url

    with contextlib.closing(state.policy), contextlib.closing(state.traces):
        url = server.run(main())
    if state.tracing is not None:
        state.tracing.close()
    return {"base_url": url}


def state_of(run_dir, args):
    """The release's own engine, or other servers where a file names them; then nothing here imports PyTorch."""
    from tidelock.tokens.errors import UserError

    if upstreams := run_dir.upstreams(args.upstreams):
        if args.weights:
            raise UserError(f"--weights is for a model that is loaded here, and {upstreams} lets other servers answer")
        return run_dir.gateway_state(upstreams, args.member)
    from tidelock.engine import Limits

    return run_dir.service_state(Limits(max_batch=args.max_batch), args.weights, args.member)


def answered_by(state) -> str:
    upstreams = getattr(state.policy, "upstreams", None)
    return f"upstreams {', '.join(u.name for u in upstreams)}" if upstreams else f"weights version {state.weights_version}"


def fleet(args) -> dict:
    """Starts this same command once for each worker, and keeps them."""
    from tidelock.loop.rundir import RunDir
    from tidelock.service.fleet import Fleet

    RunDir(args.dir).existing()
    threads = max(1, int(os.environ["OMP_NUM_THREADS"]) // args.workers)
    os.environ["TIDELOCK_THREADS"] = os.environ["OMP_NUM_THREADS"] = str(threads)  # they share the processor

    def argv(member: Member, port: int) -> list[str]:
        given = {"host": args.host, "port": port, "max-batch": args.max_batch, "weights": args.weights, "log": args.log,
                 "log-level": args.log_level, "otel": args.otel, "upstreams": args.upstreams, "exit-with-parent": os.getpid(),
                 "ready-file": member.ready_file, "member": member}  # fmt: skip
        options = [word for name, value in given.items() if value is not None for word in (f"--{name}", str(value))]
        lenient = ["--lenient"] if args.lenient else []
        return [sys.executable, "-m", "tidelock.cli.main", "serve", str(args.dir), *options, *lenient]

    def ready(url: str) -> None:
        print(f"serving with {args.workers} workers at {url}", flush=True)
        print(f"console at {url.removesuffix('/v1')}/console/", flush=True)

    return {"base_url": Fleet(argv, args.workers).run(args.host, args.port, args.ready_file, ready)}
