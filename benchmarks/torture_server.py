"""One server of the money torture: the real service, in front of the scripted upstream."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp

from tidelock.service.prices import Price, PriceBook
from tidelock.service.server import serving
from tidelock.service.state import open_state
from tidelock.tokens.policy import Chunk, PolicyError, Reported, Source
from tidelock.tokens.template import get_template
from tidelock.tokens.tokenizer import ByteTokenizer

BOOK = PriceBook("torture", {"tide": Price(input_nano=300, cached_input_nano=30, output_nano=1500)})


class Upstream:
    """A policy behind HTTP. Everything that can go wrong on the way is a PolicyError."""

    exact = True  # ids come out of it, and ids are billed

    def __init__(self, url: str, patience_s: float) -> None:
        self._url, self._patience_s = url, patience_s
        self._session: aiohttp.ClientSession | None = None
        self._source = Source("torture", True)
        self._running: dict[str, aiohttp.ClientResponse] = {}

    async def generate(self, prompt_ids, params, request_id=None) -> AsyncIterator[Chunk]:
        if self._session is None:
            timeout = aiohttp.ClientTimeout(total=None, sock_read=self._patience_s)
            self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout)
        asked = {"request_id": request_id, "max_tokens": params.max_tokens, "prompt_tokens": len(prompt_ids)}
        try:
            async with self._session.post(f"{self._url}/generate", json=asked) as response:
                if response.status != 200:
                    raise PolicyError("the upstream is full", status=503)
                self._running[request_id] = response
                async for line in response.content:
                    said = json.loads(line)
                    ids = tuple(said.get("ids", ()))
                    reported = Reported.of(said.get("usage"))
                    yield Chunk(ids, (-0.5,) * len(ids), 1, said.get("finish"), source=self._source, reported=reported)
                    if "finish" in said:
                        return
        except TimeoutError:
            raise PolicyError("the upstream stalled", status=504, kind="timeout_error") from None
        except (aiohttp.ClientError, ValueError, ConnectionError) as error:
            raise PolicyError(f"the upstream broke off: {type(error).__name__}", status=502) from None
        finally:
            self._running.pop(request_id, None)
        raise PolicyError("the upstream broke off", status=502)

    async def count(self, prompt_ids) -> int:
        return len(prompt_ids)

    async def abort(self, request_id) -> None:
        if response := self._running.get(request_id):
            response.close()


async def run(args: argparse.Namespace) -> None:
    template = get_template("xtml", ByteTokenizer())
    policy = Upstream(args.upstream, args.patience)
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
