"""How throughput grows from one worker to two, on PostgreSQL, where database, load and upstream share two cores with them.

    python -m benchmarks.gateway_workers [--share 0.25] [--rounds 3]

Two workers and all that they need do not fit on two cores, so the ratio of their rates would tell about the machine. Each
worker therefore gets a fixed share of a core (a cgroup's quota, in periods of 10 ms), the same for one worker as for two,
and small enough that the others never lack time: what is left to slow two workers down is what they share, the locks and
the commits. It needs leave to make cgroups (version 1, `cpu`); the processor time per request is printed beside the rates,
because work that one worker does not have and two have would show there.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks.gateway import HERE, STREAMED_TOKENS, Server, bodies, children, free_port, ours, prepare, start, wait_for
from benchmarks.gateway_load import Load, Measured
from tidelock.service.local_postgres import local_postgres

GROUPS = Path("/sys/fs/cgroup/cpu")
PERIOD_US = 10_000


@contextmanager
def share(pid: int, of_a_core: float) -> Iterator[Path]:
    """The process and its threads get no more than that."""
    group = GROUPS / f"tidelock-bench-{pid}"
    try:
        group.mkdir()
        (group / "cpu.cfs_period_us").write_text(str(PERIOD_US))
        (group / "cpu.cfs_quota_us").write_text(str(int(PERIOD_US * of_a_core)))
        (group / "cgroup.procs").write_text(str(pid))
    except OSError as error:
        raise SystemExit(f"this needs leave to make cgroups in {GROUPS}: {error}") from error
    try:
        yield group
    finally:
        (GROUPS / "cgroup.procs").write_text(str(pid))
        group.rmdir()


def throttled(group: Path) -> tuple[int, int]:
    """(periods in which it ran out, periods)."""
    told = dict(line.split() for line in (group / "cpu.stat").read_text().splitlines())
    return int(told["nr_throttled"]), int(told["nr_periods"])


def measure(server: Server, workers: list[int], body: bytes, args: argparse.Namespace) -> tuple[Measured, float, float]:
    """(answers, seconds of processor, share of the periods in which the workers had used theirs up)."""
    with ExitStack() as stack:
        groups = [stack.enter_context(share(pid, args.share)) for pid in workers]
        load = Load(server.port, server.path, [(key, body) for key in server.keys], args.connections)
        load.run(seconds=1.5)
        cpu, before = server.cpu_s(), [throttled(group) for group in groups]
        seen = load.run(seconds=args.seconds)
        load.close()
        full = [(b[0] - a[0]) / max(b[1] - a[1], 1) for a, b in zip(before, map(throttled, groups), strict=True)]
        if seen.errors:
            raise SystemExit(f"{seen.errors} errors, the first:\n{seen.first_error.decode(errors='replace')}")
        return seen, server.cpu_s() - cpu, min(full)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=0.25, help="of a core, for each worker")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--connections", type=int, default=192)
    parser.add_argument("--customers", type=int, default=400)
    parser.add_argument("--no-fsync", action="store_true", help="PostgreSQL without fsync")
    parser.set_defaults(profile=None)
    args = parser.parse_args()
    body = bodies(STREAMED_TOKENS)["small"]
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tidelock-workers-")))
        shared = prepare(directory)
        postgres = stack.enter_context(local_postgres(durable=not args.no_fsync))
        os.sched_setaffinity(0, {1})
        port, log = free_port(), directory / "upstream.log"
        argv = [sys.executable, str(HERE / "gateway_upstream.py"), "--port", str(port), "--said", str(shared[1])]
        wait_for(port, start(stack, argv, 1, log), log)
        url = f"http://127.0.0.1:{port}"
        servers = {}
        for n in (1, 2):
            server = ours(stack, f"{n} workers", directory, shared, postgres.database(), url, args, workers=n)
            servers[n] = (server, children(server.process.pid) if n > 1 else [server.process.pid])
        seen: dict[int, list[tuple[Measured, float, float]]] = {1: [], 2: []}
        for _ in range(args.rounds):
            for n, (server, workers) in servers.items():
                seen[n].append(measure(server, workers, body, args))
                time.sleep(0.5)
        print(f"{args.share:g} of a core each, {args.connections} connections, {args.customers} customers, "
              f"load {os.getloadavg()[0]:.1f}\n")  # fmt: skip
        print("| workers | requests/s | p99 ms | cpu us | periods used up |\n|---:|---:|---:|---:|---:|")
        rates = {}
        for n, runs in seen.items():
            rates[n] = statistics.median(m.rate for m, _, _ in runs)
            cpu = statistics.median(c / len(m.latencies_s) for m, c, _ in runs) * 1e6
            print(f"| {n} | {rates[n]:.0f} | {statistics.median(m.ms(0.99) for m, _, _ in runs):.0f} | {cpu:.0f} "
                  f"| {statistics.median(full for _, _, full in runs):.0%} |")  # fmt: skip
        print(f"\nfrom one worker to two: {rates[2] / rates[1]:.2f} times")


if __name__ == "__main__":
    main()
