"""Holds and settlements per second, on SQLite and on a throw-away PostgreSQL, both with every commit on the disk.

    python benchmarks/ledger.py [--requests 4000] [--at-once 200] [--drivers]

A request is a hold and a settlement with its usage row, awaited one after the other; `at-once` of them run at the same
time on one event loop and share commits. "cpu" is this process's time per request, both threads. Each row is the median
of three rounds, the databases taking turns. `--drivers` compares psycopg and asyncpg on the same batches instead.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from tidelock.service.books import Admission, Metered
from tidelock.service.db import Database
from tidelock.service.ladder import Ladder, Limits
from tidelock.service.ledger import Ledger
from tidelock.service.local_postgres import LocalPostgres, local_postgres, missing
from tidelock.service.prices import Counts, Price, PriceBook
from tidelock.service.till import Till

PRICE = Price(input_nano=300, cached_input_nano=30, output_nano=1500)
WIDE = Ladder("wide", ((0, Limits(10**6, 10**9, 10**10, 10**11)),))  # everything is counted, nobody is refused
ROUNDS = 3


class Bench:
    def __init__(self, target: str, customers: int, limited: bool = False) -> None:
        self.db = Database(target)
        self.name, self.customers, self.n = self.db.name + " + limits" * limited, customers, 0
        self.ladder = WIDE if limited else None
        PriceBook("v1", {"m": PRICE}).register(self.db)
        ledger = Ledger(self.db)
        for c in range(customers):
            ledger.open_account(f"c{c}")
            ledger.topup(f"c{c}", 10**15)

    def round(self, requests: int, at_once: int) -> tuple[float, float, float, float]:
        """(requests/s, µs of processor per request, operations per commit, p99 ms of hold + settle)."""
        till, first = Till(self.db), self.n
        self.n += requests
        took: list[float] = []

        async def one(n: int, gate: asyncio.Semaphore) -> None:
            async with gate:
                begun = time.perf_counter()
                customer = f"c{n % self.customers}"
                ask = Admission(f"r{n}", customer, "key", "m", PRICE, "v1", 200, 100, 60, ladder=self.ladder, reserve=300)
                hold = await till.hold(ask)
                await till.settle(hold, Metered(Counts(200, 50, completion=60), "stop"))
                took.append(time.perf_counter() - begun)

        async def all_of_them() -> None:
            gate = asyncio.Semaphore(at_once)
            await asyncio.gather(*(one(n, gate) for n in range(first, first + requests)))

        wall, cpu = time.perf_counter(), time.process_time()
        asyncio.run(all_of_them())
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        till.close()
        p99 = sorted(took)[int(len(took) * 0.99)]
        return requests / wall, cpu / requests * 1e6, till.operations / till.commits, p99 * 1e3


def speed(args: argparse.Namespace, postgres: LocalPostgres | None, directory: Path) -> None:
    print(f"{'database':17} {'customers':>9} {'at once':>8} {'requests/s':>11} {'cpu µs':>7} {'per commit':>11} {'p99 ms':>7}")
    for customers in (100, 1):
        benches = [Bench(str(directory / f"{customers}-{limited}.sqlite"), customers, limited) for limited in (False, True)]
        if postgres:
            benches += [Bench(postgres.database(), customers, limited) for limited in (False, True)]
        for at_once in (1, 16, args.at_once):
            requests = args.requests if at_once > 1 else args.requests // 8
            rounds = [[bench.round(requests, at_once) for bench in benches] for _ in range(ROUNDS)]
            for bench, *measured in zip(benches, *rounds, strict=True):
                rate, cpu, group, p99 = (statistics.median(column) for column in zip(*measured, strict=True))
                print(f"{bench.name:17} {customers:9} {at_once:8} {rate:11.0f} {cpu:7.0f} {group:11.1f} {p99:7.1f}")
        for bench in benches:
            assert Ledger(bench.db).audit().sound
            bench.db.close()


def drivers(postgres: LocalPostgres) -> None:
    """The shape of a batch: lock, read, update and insert 64 rows each, commit."""
    import asyncpg
    import psycopg

    url, names, seq = postgres.database(), [f"c{n}" for n in range(64)], 0
    insert = "INSERT INTO t SELECT * FROM unnest({0}::text[], {1}::bigint[], {2}::text[], {3}::bigint[])"
    ours = psycopg.connect(url, autocommit=True)
    schema = ours.execute("SELECT current_schema()").fetchone()[0]
    ours.execute("CREATE TABLE t (c text, s bigint, k text, n bigint, PRIMARY KEY (c, s))")
    ours.execute("CREATE TABLE a (c text PRIMARY KEY, b bigint)")
    ours.execute("INSERT INTO a SELECT unnest(%s::text[]), 0", (names,))

    def by_psycopg() -> None:
        nonlocal seq
        with ours.pipeline(), ours.transaction():
            ours.execute("SELECT * FROM a WHERE c = ANY(%s) ORDER BY c FOR UPDATE", (names,)).fetchall()
            ours.execute("UPDATE a SET b = b + 1 FROM unnest(%s::text[]) AS new(c) WHERE a.c = new.c", (names,))
            for _ in range(3):
                seq += 1
                ours.execute(insert.format("%s", "%s", "%s", "%s"), (names, [seq] * 64, ["k"] * 64, [1] * 64))

    async def by_asyncpg(theirs) -> None:
        nonlocal seq
        async with theirs.transaction():
            await theirs.fetch("SELECT * FROM a WHERE c = ANY($1) ORDER BY c FOR UPDATE", names)
            await theirs.execute("UPDATE a SET b = b + 1 FROM unnest($1::text[]) AS new(c) WHERE a.c = new.c", names)
            for _ in range(3):
                seq += 1
                await theirs.execute(insert.format("$1", "$2", "$3", "$4"), names, [seq] * 64, ["k"] * 64, [1] * 64)

    async def main() -> None:
        theirs = await asyncpg.connect(user="tidelock", database=ours.info.dbname, host=str(postgres.directory),
                                       server_settings={"search_path": schema})
        results: dict[str, list[tuple[float, float]]] = {"psycopg": [], "asyncpg": []}
        for _ in range(5):
            for name, seen in results.items():
                wall, cpu = time.perf_counter(), time.process_time()
                for _ in range(30):
                    if name == "psycopg":
                        by_psycopg()
                    else:
                        await by_asyncpg(theirs)
                seen.append((30 * 64 / (time.perf_counter() - wall), (time.process_time() - cpu) / (30 * 64) * 1e6))
        for name, seen in results.items():
            rate, cpu = (statistics.median(column) for column in zip(*seen, strict=True))
            print(f"{name:10} {rate:8.0f} operations/s in batches of 64, {cpu:5.1f} µs of our processor each")

    asyncio.run(main())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=4000, help="per round")
    parser.add_argument("--at-once", type=int, default=200)
    parser.add_argument("--drivers", action="store_true", help="psycopg beside asyncpg (pip install asyncpg)")
    args = parser.parse_args()
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tidelock-ledger-")))
        if reason := missing():
            print(f"without PostgreSQL: {reason}")
        postgres = None if reason else stack.enter_context(local_postgres(durable=True))
        if args.drivers and postgres:
            drivers(postgres)
        else:
            speed(args, postgres, directory)


if __name__ == "__main__":
    main()
