"""`tidelock top`: a server's tokens, batch, queue, cache and latencies, live."""

from __future__ import annotations

import dataclasses
import time

from .main import command


def add(subparsers) -> None:
    p = command(subparsers, "top", run, "watch a server: tokens/s, batch, queue, cache hits, latencies, weights version",
                "tidelock top http://127.0.0.1:8000")  # fmt: skip
    p.add_argument("url", help="the server's address (with or without /v1)")
    p.add_argument("--interval", type=float, default=1.0, help="seconds between two looks (default 1)")
    p.add_argument("--frames", type=int, help="end after so many pictures (default: until Ctrl-C)")


def run(args) -> dict:
    from rich.console import Console
    from rich.live import Live

    from tidelock.loop.top import Frame, View
    from tidelock.tokens.errors import UserError

    if args.interval <= 0 or (args.frames is not None and args.frames < 1):
        raise UserError("--interval and --frames must be positive")
    url = args.url.rstrip("/").removesuffix("/v1")
    view, last, frame, shown = View(url), look(url), None, 0
    console = Console(stderr=args.json == "-")
    try:
        with Live(console=console, refresh_per_second=10, transient=False) as live:
            while args.frames is None or shown < args.frames:
                time.sleep(args.interval)
                now = look(url)
                frame, last = Frame.between(last, now), now
                live.update(view.draw(frame))
                shown += 1
    except KeyboardInterrupt:
        pass
    return dataclasses.asdict(frame) if frame else {}


def look(url: str):
    """One scrape. Raises UserError when nobody answers, or not with metrics."""
    import urllib.request

    from tidelock.loop.top import Scrape
    from tidelock.tokens.errors import UserError

    try:
        with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
            scrape = Scrape.read(answer.read().decode(errors="replace"))
    except (OSError, ValueError) as e:
        raise UserError(f"cannot read {url}/metrics: {getattr(e, 'reason', e)}") from None
    if ("tidelock_weights_version",) not in scrape.values:
        raise UserError(f"{url}/metrics is not a Tidelock server's")
    return scrape
