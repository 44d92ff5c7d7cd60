"""The money torture: customers with tiny balances, many parallel streams each, and everything breaking at once.

    python benchmarks/money_torture.py                                   # SQLite, one server
    python benchmarks/money_torture.py --database postgres --workers 4   # a throw-away PostgreSQL, four servers
    python benchmarks/money_torture.py --customers 6 --streams 5-15      # a short one

Everything is in force: organisations with projects, members and keys, the published tier ladder, caps of projects and keys.
The upstream cuts streams after 40 or 60 tokens, stalls, sends malformed events, refuses; clients leave mid-stream;
servers are killed with -9 at random moments and started again; the database goes away twice. Then the books must say:
nobody spent more than was paid in, every answer that any client saw a token of has exactly one usage row, every bill
that a client was told is that row, no row charges more tokens than the upstream sent, no hold is left and no limit's
reservation (the counts are exactly what replaying every hold gives, and free again in time), who was refused paid nothing,
everything sums to zero, every hash chain holds, and the reconciliation of upstream, trace, usage and ledger finds nothing.
Exits with 1 if not.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # it runs from a checkout, installed or not
os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:2])  # and so do the servers it starts

import torture_verdict  # noqa: E402
import torture_world  # noqa: E402

from tidelock.service.db import Database, StorageDown  # noqa: E402
from tidelock.service.ledger import Ledger  # noqa: E402
from tidelock.service.local_postgres import LocalPostgres, local_postgres  # noqa: E402


@dataclass
class Seen:
    """What a client knows about one of its requests."""

    request_id: str
    customer: str
    saw_tokens: bool = False
    told: dict | None = None  # the usage of a finished answer
    end: str = ""


@dataclass
class Server:
    directory: Path
    port: int
    argv: list[str]
    process: subprocess.Popen | None = None
    kills: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> None:
        (self.directory / "ready").unlink(missing_ok=True)
        with open(self.directory / "log", "ab") as log:
            self.process = subprocess.Popen(self.argv, stdout=log, stderr=log)

    async def ready(self) -> None:
        """Waits until it answers; one that ended because the database was away is started again."""
        for _ in range(600):
            if (self.directory / "ready").exists():
                return
            if self.process.poll() is not None:
                self.start()
            await asyncio.sleep(0.1)
        raise SystemExit(f"a server did not start within a minute:\n{(self.directory / 'log').read_text()[-2000:]}")


@dataclass
class Torture:
    args: argparse.Namespace
    servers: list[Server]
    organizations: dict[str, torture_world.Organization]
    postgres: LocalPostgres | None
    database: str
    rng: random.Random
    seen: list[Seen] = field(default_factory=list)
    outages: int = 0
    unanswered: int = 0  # requests whose server died before its first byte
    done: bool = False

    # ---- clients -----------------------------------------------------------------------------------------------

    async def customer(self, name: str) -> None:
        """From an address of its own: who uses a revoked key is taken for somebody who guesses keys."""
        low, high = (int(n) for n in self.args.streams.split("-"))
        number = int(name[1:])
        connector = aiohttp.TCPConnector(limit=0, local_addr=(f"127.0.{1 + number // 250}.{1 + number % 250}", 0))
        timeout = aiohttp.ClientTimeout(total=self.args.patience)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            await asyncio.gather(*(self.request(session, name, n) for n in range(self.rng.randint(low, high))))

    async def request(self, session: aiohttp.ClientSession, customer: str, n: int) -> None:
        rng = random.Random(f"{self.args.seed} {customer} {n}")
        await asyncio.sleep(rng.random() * self.args.spread)
        stream = rng.random() < 0.8
        leaves_after = rng.randint(1, 12) if rng.random() < 0.15 else None
        body = {"model": "tide", "messages": [{"role": "user", "content": "go on"}], "stream": stream,
                "max_tokens": 8000, "metadata": {"session_id": f"s{n}"}}  # fmt: skip
        kinds = torture_world.KEYS
        used = rng.choices(list(kinds), list(kinds.values()))[0]
        headers = {"authorization": f"Bearer {self.organizations[customer].secrets[used]}"}
        known = None
        try:
            url = await self.open_door(rng)
            async with session.post(f"{url}/chat/completions", json=body, headers=headers) as response:
                known = Seen(response.headers.get("x-request-id", ""), customer)
                self.seen.append(known)
                if response.status != 200:
                    known.end = f"{response.status} {(await response.json())['error']['code'] or ''}".strip()
                elif stream:
                    await self.read(response, known, leaves_after)
                else:
                    known.told = (await response.json())["usage"]
                    known.saw_tokens, known.end = True, "finished"
        except (aiohttp.ClientError, TimeoutError, ConnectionError):
            if known is not None:
                known.end = "connection broke"
            else:
                self.unanswered += 1

    async def open_door(self, rng: random.Random) -> str:
        """A server that accepts connections now, as a load balancer would find it."""
        while True:
            server = rng.choice(self.servers)
            if (server.directory / "ready").exists() and server.process.poll() is None:
                return server.url
            await asyncio.sleep(0.1)

    async def read(self, response: aiohttp.ClientResponse, known: Seen, leaves_after: int | None) -> None:
        events = 0
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                known.end = f"stopped: {event['error']['code'] or event['error']['type']}"
                return
            for choice in event["choices"]:
                known.saw_tokens |= bool(choice["delta"].get("content"))
                if choice.get("usage"):
                    known.told, known.end = choice["usage"], "finished"
            events += 1
            if events == leaves_after:
                known.end = "client left"
                response.close()
                return
        known.end = known.end or "connection broke"

    # ---- chaos -------------------------------------------------------------------------------------------------

    async def killer(self) -> None:
        while not self.done:
            await asyncio.sleep(self.rng.uniform(0.3, 2 * self.args.kill_every))
            server = self.rng.choice(self.servers)
            if self.done or not (server.directory / "ready").exists():
                continue
            server.process.kill()
            server.process.wait()
            server.kills += 1
            (server.directory / "ready").unlink(missing_ok=True)
            await asyncio.sleep(self.rng.uniform(0.0, 0.5))
            server.start()
            await server.ready()

    async def outage(self) -> None:
        """The database goes away: PostgreSQL crashes, SQLite's file is locked by somebody else."""
        for _ in range(2):
            await asyncio.sleep(self.args.outage_after)
            if self.done:
                return
            self.outages += 1
            if self.postgres:
                await asyncio.to_thread(self.postgres.stop, "immediate")
                await asyncio.sleep(self.args.outage)
                await asyncio.to_thread(self.postgres.start)
            else:
                await asyncio.to_thread(self.lock_out)

    def lock_out(self) -> None:
        intruder = sqlite3.connect(self.database, timeout=30, isolation_level=None)
        intruder.execute("BEGIN IMMEDIATE")
        time.sleep(self.args.outage)
        intruder.execute("ROLLBACK")
        intruder.close()

    # ---- the whole thing ---------------------------------------------------------------------------------------

    async def run(self) -> float:
        for server in self.servers:
            server.start()
        await asyncio.gather(*(server.ready() for server in self.servers))
        began = time.perf_counter()
        chaos = [asyncio.create_task(self.killer()), asyncio.create_task(self.outage())] if not self.args.calm else []
        gate = asyncio.Semaphore(self.args.at_once)

        async def in_turn(name: str) -> None:
            async with gate:
                await self.customer(name)

        await asyncio.gather(*(in_turn(name) for name in self.organizations))
        wall_s = time.perf_counter() - began
        self.done = True
        await asyncio.gather(*chaos)
        await asyncio.gather(*(server.ready() for server in self.servers))
        return wall_s

    async def settled(self, ledger: Ledger) -> float:
        """Seconds until the servers' own upkeep has closed every hold, at most two minutes."""
        began = time.perf_counter()
        while time.perf_counter() - began < 120:
            with suppress(StorageDown):
                if ledger.db.read("SELECT COUNT(*) FROM holds WHERE state = 'open'")[0][0] == 0:
                    break
            await asyncio.sleep(0.25)
        return time.perf_counter() - began


def happened(torture: Torture, ledger: Ledger) -> dict:
    usage = ledger.db.read("SELECT customer, nano_usd, finish_reason FROM usage")
    spent = Counter()
    for row in usage:
        spent[row["customer"]] += row["nano_usd"]
    ends = Counter(known.end for known in torture.seen)
    return {
        "customers": len(torture.organizations),
        "requests": len(torture.seen),
        "without an answer": torture.unanswered,
        "ends": dict(ends.most_common()),
        "refused by a limit": ends["429 rate_limit_exceeded"],
        "refused by a budget": ends["429 budget_reached"],
        "usage_rows": len(usage),
        "of which settled for a dead server": sum(row["finish_reason"] == "lost" for row in usage),
        "kill -9": sum(server.kills for server in torture.servers),
        "database outages": torture.outages,
        "transactions": ledger.audit().transactions,
        "customers that used their balance up": sum(nano > 0.97 * torture.args.balance for nano in spent.values()),
    }


def tokens_sent(log: Path) -> Counter[str]:
    sent: Counter[str] = Counter()
    for line in log.read_text().splitlines():
        request_id, tokens = line.split()
        sent[request_id] += int(tokens)
    return sent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--database", choices=["sqlite", "postgres"], default="sqlite")
    parser.add_argument("--workers", type=int, default=1, help="server processes")
    parser.add_argument("--customers", type=int, default=250)
    parser.add_argument("--streams", default="20-200", help="per customer, at the same time; LOW-HIGH")
    parser.add_argument("--at-once", type=int, default=5, help="customers at the same time")
    parser.add_argument("--balance", type=int, default=10_000_000, help="nano-USD per customer (default: one cent)")
    parser.add_argument("--spread", type=float, default=1.0, help="seconds over which a customer's streams begin")
    parser.add_argument("--kill-every", type=float, default=4.0, help="seconds between kills, on average")
    parser.add_argument("--outage", type=float, default=2.0, help="seconds the database is away")
    parser.add_argument("--outage-after", type=float, default=10.0, help="seconds")
    parser.add_argument("--stall", type=float, default=3.0, help="seconds an upstream says nothing; servers wait a third")
    parser.add_argument("--patience", type=float, default=60.0, help="of clients, seconds")
    parser.add_argument("--no-fsync", action="store_true", help="PostgreSQL without fsync: faster, survives all but power loss")
    parser.add_argument("--calm", action="store_true", help="no kills, no outage")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="PATH")
    args = parser.parse_args()
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tidelock-torture-")))
        postgres = stack.enter_context(local_postgres(durable=not args.no_fsync)) if args.database == "postgres" else None
        database = postgres.database() if postgres else str(directory / "service.sqlite")
        db = Database(database)
        stack.callback(db.close)
        ledger = Ledger(db)
        organizations = torture_world.make(db, directory / "pepper", args.customers, args.balance)
        upstream_port = free_port()
        log = directory / "upstream.log"
        upstream = subprocess.Popen([sys.executable, str(HERE / "torture_upstream.py"), "--port", str(upstream_port),
                                     "--log", str(log), "--stall", str(args.stall)])  # fmt: skip
        stack.callback(upstream.wait)
        stack.callback(upstream.kill)
        servers = []
        for n in range(args.workers):
            own = directory / f"server{n}"
            own.mkdir()
            (own / "pepper").write_bytes((directory / "pepper").read_bytes())
            port = free_port()
            argv = [sys.executable, str(HERE / "torture_server.py"), "--dir", str(own), "--database", database, "--port",
                    str(port), "--upstream", f"http://127.0.0.1:{upstream_port}", "--patience",
                    str(args.stall / 3)]  # fmt: skip
            servers.append(Server(own, port, argv))
            stack.callback(lambda server=servers[-1]: server.process and server.process.kill())
        torture = Torture(args, servers, organizations, postgres, database, random.Random(args.seed))

        async def everything() -> tuple[float, float]:
            return await torture.run(), await torture.settled(ledger)

        wall_s, settled_s = asyncio.run(everything())
        upstream.terminate()  # it writes down what it sent on requests that still stalled
        upstream.wait()
        for server in servers:
            server.process.send_signal(signal.SIGTERM)
            server.process.wait()
        journals = [server.directory / "trace.jsonl" for server in servers]
        must_be_zero = torture_verdict.must_be_zero(torture.seen, ledger, tokens_sent(log), args.balance, journals)
        told = happened(torture, ledger) | torture_verdict.compared(journals, db)
    told |= {"seconds": round(wall_s, 1), "seconds until every hold was closed": round(settled_s, 1)}
    print(f"money torture on {args.database}, {args.workers} server(s), seed {args.seed}")
    for name, value in told.items():
        print(f"  {name:36} {value}")
    for name, value in must_be_zero.items():
        print(f"  {name:36} {value}{'' if value == 0 else '   <-- must be 0'}")
    failed = any(must_be_zero.values())
    print("FAILED" if failed else "sound")
    if args.json:
        Path(args.json).write_text(json.dumps({"must_be_zero": must_be_zero, "happened": told}, indent=1) + "\n")
    sys.exit(failed)


if __name__ == "__main__":
    main()
