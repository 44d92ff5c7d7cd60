"""What a pool of upstreams is worth: `python -m benchmarks.routing` (about a minute; two engines, real servers all round).

Three questions, each asked of `tidelock serve` in front of two more of it with untrained nano models, by token ids:
prefix affinity (which share of prompt tokens is not prefilled again, against spreading turns over both engines), fairness
(how long a modest tenant waits while another sends 60 requests at once, against one line for all), failover (what clients
see while one of the two is killed and comes back, with and without retries).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp

from tidelock.loop.registry import Registry
from tidelock.loop.rundir import MODEL
from tidelock.models import TransformerLM, preset, save_checkpoint
from tidelock.service.db import Database
from tidelock.service.keys import KeyStore
from tidelock.service.ledger import Ledger
from tidelock.tokens.tokenizer import BPETokenizer

POOL = '[pool]\nchoice = "{choice}"\nretries = {retries}\nwait_s = 60\nprobe_s = 0.5\n'
ONE = '[[upstream]]\nname = "{name}"\nurl = "{url}"\nkind = "tokens"\napi_key_env = "{key}"\nmax_in_flight = {most}\n'
WORDS = "tide moon sea shore wave rock boat sand wind star gull kelp reef cove buoy mast".split()


class Server:
    """One `tidelock serve` on a port of its own; it can be killed and started again."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.port = directory, free_port()
        self._process: subprocess.Popen | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> Server:
        env = dict(os.environ, OMP_NUM_THREADS="1", TIDELOCK_THREADS="1")
        argv = [sys.executable, "-m", "tidelock", "serve", str(self.directory), "--port", str(self.port), "--lenient",
                "--exit-with-parent", str(os.getpid())]  # fmt: skip
        with open(self.directory / "log", "ab") as log:
            self._process = subprocess.Popen(argv, stdout=log, stderr=log, env=env)
        return self

    async def ready(self, http: aiohttp.ClientSession) -> float:
        """Seconds until it answered."""
        began = time.perf_counter()
        while time.perf_counter() - began < 60:
            with contextlib.suppress(aiohttp.ClientError):
                async with http.get(self.url + "/health") as response:
                    if response.status == 200:
                        return time.perf_counter() - began
            await asyncio.sleep(0.02)
        raise RuntimeError(f"no server after 60 s: see {self.directory / 'log'}")

    def stop(self, how: int = signal.SIGTERM) -> None:
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait()
            self._process = None


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def keys(directory: Path, customers: list[str], **options) -> list[str]:
    db = Database(directory / "service" / "service.sqlite")
    store, ledger, secrets = KeyStore.open(db, directory / "service" / "pepper"), Ledger(db), []
    for customer in customers:
        secrets.append(store.create(customer, **options)[1])
        ledger.topup(customer, 10**13)  # of a tier whose limits nothing here meets
    db.close()
    return secrets


def engines(root: Path) -> list[Server]:
    tokenizer = BPETokenizer.train([" ".join(WORDS)] * 4, 400)
    model = TransformerLM(preset("nano-k3", tokenizer.vocab_size), seed=0)
    out = []
    for n in range(2):
        directory = root / f"engine{n}"
        tokenizer.save(directory / "tokenizer")
        save_checkpoint(directory / "checkpoints" / "first", model)
        Registry(directory).release(directory / "checkpoints" / "first")
        (directory / "service").mkdir()
        os.environ[f"ENGINE_{n}_KEY"] = keys(directory, ["gateway"], role="admin")[0]
        out.append(Server(directory))
    return out


@contextlib.asynccontextmanager
async def gateway(
    root: Path, upstreams: list[Server], http: aiohttp.ClientSession, *, choice: str = "affinity", retries: int = 2,
    most: int = 64,
) -> AsyncIterator[tuple[Server, list[str], float]]:
    """(the server, a key for each of two customers, seconds from its start to its first answer)."""
    directory = Path(tempfile.mkdtemp(dir=root))
    (directory / "tokenizer").symlink_to(upstreams[0].directory / "tokenizer")
    (directory / "service").mkdir()
    listed = [ONE.format(name=f"engine{n}", url=s.url, key=f"ENGINE_{n}_KEY", most=most) for n, s in enumerate(upstreams)]
    pool = POOL.format(choice=choice, retries=retries) + "context_length = 8192\n"
    (directory / "service" / "upstreams.toml").write_text(pool + "".join(listed))
    secrets = keys(directory, ["ann", "bob"])
    server = Server(directory).start()
    try:
        yield server, secrets, await server.ready(http)
    finally:
        server.stop()


async def ask(
    http: aiohttp.ClientSession, server: Server, secret: str, messages: list[dict], most: int = 16
) -> tuple[str, float, str]:
    """(how it went: "whole" | "refused" | "cut", seconds, what was said)."""
    body = {"model": MODEL, "messages": messages, "max_tokens": most, "stream": True, "temperature": 0,
            "thinking": {"type": "disabled"}}  # fmt: skip
    headers = {"Authorization": f"Bearer {secret}"}
    began, said, status = time.perf_counter(), "", "cut"
    try:
        async with http.post(server.url + "/v1/chat/completions", json=body, headers=headers) as response:
            if response.status != 200:
                return "refused", time.perf_counter() - began, await response.text()
            async for line in response.content:
                if line.startswith(b"data: [DONE]"):
                    status = "whole"
                elif line.startswith(b"data: {"):
                    for choice in json.loads(line[6:]).get("choices") or []:
                        said += choice["delta"].get("content") or ""
    except aiohttp.ClientError:
        pass
    return status, time.perf_counter() - began, said


async def counters(http: aiohttp.ClientSession, server: Server) -> dict[str, float]:
    async with http.get(server.url + "/metrics") as response:
        text = await response.text()
    return {name: float(value) for name, value in re.findall(r"^(tidelock_(?:upstream|pool)_\S+) (\S+)$", text, re.M)}


def total(numbers: dict[str, float], name: str, label: str = "") -> float:
    return sum(v for k, v in numbers.items() if k.startswith(f"tidelock_upstream_{name}") and label in k)


# ---- the three questions ----------------------------------------------------------------------------------------


async def affinity(root: Path, upstreams: list[Server], http: aiohttp.ClientSession, seed: int) -> list[list[str]]:
    rows = []
    for choice in ("affinity", "least-loaded", "round-robin"):
        async with gateway(root, upstreams, http, choice=choice) as (server, (secret, _), start_s):
            rng = random.Random(f"{seed}/{choice}")  # other words each time: nothing is cached from before
            system = " ".join(rng.choices(WORDS, k=80))
            gate = asyncio.Semaphore(6)

            async def talk(n: int) -> None:
                first = " ".join(rng.choices(WORDS, k=80))
                messages = [{"role": "system", "content": system}, {"role": "user", "content": first}]
                for _ in range(4):
                    async with gate:
                        how, _, said = await ask(http, server, secret, messages)
                    assert how == "whole", said
                    more = " ".join(rng.choices(WORDS, k=40))
                    messages += [{"role": "assistant", "content": said}, {"role": "user", "content": more}]

            began = time.perf_counter()
            await asyncio.gather(*(talk(n) for n in range(20)))
            took, seen = time.perf_counter() - began, await counters(http, server)
            prompt, cached = total(seen, "prompt_tokens_total"), total(seen, "cached_tokens_total")
            hits, spilled = total(seen, "affinity_total", 'result="hit"'), total(seen, "affinity_total", 'result="spilled"')
            split = sorted(int(v) for k, v in seen.items() if k.startswith("tidelock_upstream_requests_total"))
            rows.append([choice, f"{cached / prompt:.1%}", f"{int(prompt - cached):,}", "/".join(map(str, split)),
                         f"{hits / (hits + spilled):.0%}" if hits + spilled else "-", f"{took:.1f} s",
                         f"{start_s:.2f} s"])  # fmt: skip
    return rows


async def fairness(root: Path, upstreams: list[Server], http: aiohttp.ClientSession) -> list[list[str]]:
    rows = []
    async with gateway(root, upstreams, http, choice="least-loaded", most=2) as (server, (ann, bob), _):
        for name, greedy in (("alone", None), ("beside another tenant's 60 at once", bob), ("in one line with the 60", ann)):
            flood = [asyncio.create_task(ask(http, server, greedy, [{"role": "user", "content": f"flood {name} {n}"}], 48))
                     for n in range(60 if greedy else 0)]  # fmt: skip
            while greedy and (await counters(http, server))["tidelock_pool_waiting"] < 50:
                await asyncio.sleep(0.01)
            times = []
            for n in range(4):
                how, seconds, said = await ask(http, server, ann, [{"role": "user", "content": f"modest {name} {n}"}], 16)
                assert how == "whole", said
                times.append(seconds)
            at_last = sum(not task.done() for task in flood)
            await asyncio.gather(*flood)
            rows.append([name, f"{times[0] * 1000:.0f} ms", f"{max(times) * 1000:.0f} ms", str(at_last) if greedy else "-"])
    return rows


async def failover(root: Path, upstreams: list[Server], http: aiohttp.ClientSession) -> list[list[str]]:
    rows = []
    for retries in (2, 0):
        async with gateway(root, upstreams, http, choice="least-loaded", retries=retries) as (server, (secret, _), _):
            outcomes: list[str] = []
            began = time.perf_counter()

            async def one(n: int) -> None:
                how, _, _ = await ask(http, server, secret, [{"role": "user", "content": f"fail over {retries} {n}"}], 128)
                outcomes.append(how)

            async def answers() -> float:
                await upstreams[1].ready(http)
                return time.perf_counter() - began

            tasks, life, trusted = [], None, None
            while trusted is None and time.perf_counter() - began < 25:  # 25 requests/s until it is taken back
                tasks.append(asyncio.create_task(one(len(tasks))))
                await asyncio.sleep(0.04)
                at = time.perf_counter() - began
                if at > 2 and life is None:
                    upstreams[1].stop(signal.SIGKILL)
                    await asyncio.sleep(1)
                    upstreams[1].start()
                    life = asyncio.create_task(answers())
                if life is not None and life.done():
                    seen = await counters(http, server)
                    if seen['tidelock_upstream_state{state="closed",upstream="engine1"}'] == 1.0:
                        trusted = at
            await asyncio.gather(*tasks)
            seen, count = await counters(http, server), Counter(outcomes)
            rows.append([str(retries), str(len(outcomes)), str(count["whole"]), str(count["refused"]), str(count["cut"]),
                         f"{int(total(seen, 'retries_total'))}", f"{await life - 2:.1f} s",
                         f"{trusted - await life:.1f} s" if trusted else "not yet"])  # fmt: skip
    return rows


def table(title: str, head: list[str], rows: list[list[str]]) -> None:
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    print(f"\n{title}")
    for row in [head, *rows]:
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


async def main(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(prefix="tidelock-routing-") as name:
        root, began = Path(name), time.perf_counter()
        upstreams = engines(root)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
            try:
                for server in upstreams:
                    server.start()
                for server in upstreams:
                    await server.ready(http)
                table("20 conversations of 4 turns over 2 engines",
                      ["choice", "cached", "prefilled", "requests", "affinity", "took", "gateway up after"],
                      await affinity(root, upstreams, http, args.seed))  # fmt: skip
                table("a modest tenant's 4 requests, 2 engines with 2 places each",
                      ["", "first", "slowest", "of the 60 still to come then"],
                      await fairness(root, upstreams, http))  # fmt: skip
                table("25 requests/s; one of 2 engines killed (SIGKILL) after 2 s, started again a second later",
                      ["retries", "requests", "whole", "refused", "cut", "went elsewhere", "out for", "trusted again after"],
                      await failover(root, upstreams, http))  # fmt: skip
            finally:
                for server in upstreams:
                    server.stop()
        print(f"\n{time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    asyncio.run(main(parser.parse_args()))
