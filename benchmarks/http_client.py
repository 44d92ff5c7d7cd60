"""What a request to a model server costs its client: ours (`tidelock/remote/http.py`) beside aiohttp, in turns.

    python -m benchmarks.http_client

A small streamed chat completion is asked for and read to its end, over kept connections, on uvloop. `us` is the processor
time of this process alone; the server is another one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import aiohttp
import uvloop

from benchmarks.gateway import free_port, wait_for
from tidelock.remote.http import Client, Server, header_lines

BODY = json.dumps({"model": "tide", "max_tokens": 20, "stream": True, "messages": [{"role": "user", "content": "When?"}]}).encode()
HEADERS = {"Authorization": "Bearer k", "Content-Type": "application/json"}


async def cost_us(ask: Callable[[], Awaitable[None]], requests: int, at_once: int) -> float:
    async def several() -> None:
        for _ in range(requests // at_once):
            await ask()

    began = time.process_time()
    await asyncio.gather(*(several() for _ in range(at_once)))
    return (time.process_time() - began) / requests * 1e6


async def measure(url: str, args: argparse.Namespace) -> dict[tuple[str, int], list[float]]:
    server, client = Server.at(url), Client()
    head = server.head("POST", "/v1/chat/completions") + header_lines(HEADERS)
    no_limit = aiohttp.ClientTimeout(total=None, sock_connect=5)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar()) as session:

        async def ours() -> None:
            answer = await client.send(server, head, BODY)
            while await answer.some():
                pass

        async def theirs() -> None:
            async with session.post(f"{url}/v1/chat/completions", data=BODY, headers=HEADERS, timeout=no_limit) as response:
                while await response.content.readany():
                    pass

        took: dict[tuple[str, int], list[float]] = {}
        for _ in range(args.rounds):
            for at_once in (1, 32):
                for name, ask in (("tidelock", ours), (f"aiohttp {aiohttp.__version__}", theirs)):
                    took.setdefault((name, at_once), []).append(await cost_us(ask, args.requests, at_once))
        client.close()
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--requests", type=int, default=3200, help="per round and client")
    args = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as directory:
        said, log, port = Path(directory) / "said.json", Path(directory) / "log", free_port()
        said.write_text(json.dumps({"short": [[1, 2, 3], "Twice a day."], "long": [[1] * 100, "x " * 100]}))
        argv = [sys.executable, "-m", "benchmarks.gateway_upstream", "--port", str(port), "--said", str(said)]
        with log.open("wb") as out:
            process = subprocess.Popen(argv, stdout=out, stderr=out, preexec_fn=lambda: os.sched_setaffinity(0, {cores[-1]}))
        try:
            os.sched_setaffinity(0, {cores[0]})
            wait_for(port, process, log)
            took = uvloop.run(measure(f"http://127.0.0.1:{port}", args))
        finally:
            process.terminate()
            process.wait()
    print("| client | at once | us a request (median, least) |", "|---|---:|---:|", sep="\n")
    for (name, at_once), values in sorted(took.items(), key=lambda item: item[0][1]):
        print(f"| {name} | {at_once} | {statistics.median(values):.0f}, {min(values):.0f} |")


if __name__ == "__main__":
    main()
