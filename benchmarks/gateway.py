"""What the gateway costs: added latency, requests and streams per second, beside LiteLLM's proxy, in one run.

    python -m benchmarks.gateway                                     # SQLite, beside a direct client
    python -m benchmarks.gateway --litellm VENV/bin/python           # with the peer: pip install 'litellm[proxy]==1.108.7'
    python -m benchmarks.gateway --portkey FOLDER                    # another: npm install @portkey-ai/gateway@1.15.2
    python -m benchmarks.gateway --dir /dev/shm                      # files where a flush costs nothing

Ours has everything on: keys, limits, ledger with hold and settlement, usage rows, trace, metrics. LiteLLM has its master
key and no database (its keys and budgets want prisma's engine, which is downloaded from elsewhere), so it does less;
Portkey's open gateway has neither keys nor books, it only passes requests on. Every
server has one core to itself; load and upstream share the other one. Latency is measured one request at a time, direct and
through in turn, and the table gives the difference of the quantiles; how long the disk takes to flush stands beside it,
because a bill is on the disk before its answer ends. "tidelock" asks the upstream through the service's own pool, "hop"
with one plain request, "stub" has the answer in the process: no upstream, an upper bound.
`cpu us` is the processor time of the server itself per request, from /proc.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.gateway_load import MARK, Load, Measured
from tidelock.charts import bars, standalone
from tidelock.service.db import Database
from tidelock.service.keys import KeyStore
from tidelock.service.ladder import Limits
from tidelock.service.ledger import Ledger
from tidelock.service.local_postgres import local_postgres
from tidelock.service.tiers import Tiers
from tidelock.tokens.message import Message
from tidelock.tokens.template import get_template
from tidelock.tokens.tokenizer import BPETokenizer

HERE = Path(__file__).parent
WIDE = Limits(10**6, 10**9, 10**10, 10**11)  # everything is counted, nobody is refused
ANSWER, STREAMED_TOKENS = "Tides follow the moon, twice a day.", 110
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass
class Server:
    name: str
    port: int
    process: subprocess.Popen
    keys: list[str]
    path: str = "/v1/chat/completions"
    headers: dict[str, str] = field(default_factory=dict)
    latency: dict[str, list[Measured]] = field(default_factory=dict)
    rate: dict[str, list[tuple[Measured, float]]] = field(default_factory=dict)  # with cpu seconds

    def cpu_s(self) -> float:
        """Of the process and its children, so far."""
        stats = [Path(f"/proc/{pid}/stat").read_text() for pid in (self.process.pid, *children(self.process.pid))]
        return sum(sum(map(int, stat.rpartition(")")[2].split()[11:13])) for stat in stats) / TICKS


def children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        found = [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        return found + [below for child in found for below in children(child)]
    return []


# ---- what is asked ---------------------------------------------------------------------------------------------------


def bodies(tokens: int) -> dict[str, bytes]:
    """By name. Each holds MARK in its last message; `stream` may have an answer of more than `tokens`."""
    last = {"role": "user", "content": f"request {MARK.decode()}: when is the tide?"}
    question = [{"role": "system", "content": "You answer in one sentence."}, last]
    tools = [
        {"type": "function", "function": {
            "name": f"look_up_{n}", "description": "Looks one thing up in the tables of the harbour office. " * 3,
            "parameters": {"type": "object", "required": ["place"], "properties": {
                "place": {"type": "string", "description": "harbour"},
                "day": {"type": "integer", "minimum": 1, "maximum": 31}}},
        }} for n in range(12)
    ]  # fmt: skip
    talk: list[dict] = [{"role": "system", "content": "You are the harbour's clerk. Be brief and exact. " * 40}]
    for n in range(18):
        function = {"name": "look_up_1", "arguments": f'{{"place": "pier {n}"}}'}
        call = {"id": f"call_{n}", "type": "function", "function": function}
        talk += [
            {"role": "user", "content": f"And at pier {n}? " + "The fog is thick and the pilot wants to know soon. " * 8},
            {"role": "assistant", "content": "I look.", "reasoning_content": "The tables know. " * 4, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": f"call_{n}", "content": f"high water 0{n % 10}:10, 4.2 m; " * 25},
        ]
        answer = "High water is early, at about four metres. " * 3
        talk.append({"role": "assistant", "content": answer, "reasoning_content": ""})
    small = {"model": "tide", "messages": question, "max_tokens": tokens - 1}
    large = {"model": "tide", "messages": [*talk, last], "tools": tools, "max_tokens": tokens - 1}
    stream = {**small, "max_tokens": tokens + 100, "stream": True, "stream_options": {"include_usage": True}}
    return {name: json.dumps(body).encode() for name, body in (("small", small), ("37 kB", large), ("stream", stream))}


def prepare(directory: Path) -> tuple[Path, Path]:
    """(a tokenizer trained on our own sources, the two canned answers as a file)."""
    sources = (path.read_text() for path in sorted((HERE.parent / "tidelock" / "service").rglob("*.py")))
    tokenizer = BPETokenizer.train(sources, 4096)
    tokenizer.save(directory / "tokenizer")
    template = get_template("xtml", tokenizer)
    words = "word "
    while len(template.sampled(Message("assistant", words))) < STREAMED_TOKENS:
        words += "word "
    texts = {"short": ANSWER, "long": words}
    said = {name: [template.sampled(Message("assistant", text)), text] for name, text in texts.items()}
    (directory / "said.json").write_text(json.dumps(said))
    return directory / "tokenizer", directory / "said.json"


# ---- who answers -----------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(stack: ExitStack, argv: list[str], core: int, log: Path, env: dict[str, str] | None = None) -> subprocess.Popen:
    with open(log, "ab") as out:
        process = subprocess.Popen(
            argv, stdout=out, stderr=out, env={**os.environ, "PYTHONPATH": str(HERE.parent), **(env or {})},
            preexec_fn=lambda: os.sched_setaffinity(0, {core}),
        )  # fmt: skip
    stack.callback(process.wait)
    stack.callback(process.terminate)
    return process


def wait_for(port: int, process: subprocess.Popen, log: Path, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.2)
    raise SystemExit(f"a server did not start; its log ends:\n{log.read_text()[-3000:]}")


def ours(stack: ExitStack, name: str, directory: Path, shared: tuple[Path, Path], database: str | None, upstream: str | None,
         args: argparse.Namespace, workers: int = 1) -> Server:  # fmt: skip
    own = directory / name.replace(" ", "-")
    own.mkdir()
    db = Database(database or str(own / "service.sqlite"))
    keys, ledger, tiers, secrets = KeyStore.open(db, own / "pepper"), Ledger(db), Tiers(db), []
    for n in range(args.customers):
        _, secret = keys.create(f"c{n:03}")
        secrets.append(secret)
        ledger.topup(f"c{n:03}", 10**15)
        tiers.set_caps(f"c{n:03}", WIDE)
    db.close()
    port, log = free_port(), own / "log"
    argv = [sys.executable, str(HERE / "gateway_server.py"), "--dir", str(own), "--tokenizer", str(shared[0]), "--said",
            str(shared[1]), "--port", str(port), *(["--database", database] if database else []),
            *(["--upstream", upstream] if upstream else []), *(["--by-hand"] if name == "hop" else []),
            *(["--workers", str(workers)] if workers > 1 else []),
            *(["--profile", f"{args.profile}.{own.name}"] if args.profile else [])]  # fmt: skip
    process = start(stack, argv, 0, log)
    wait_for(port, process, log)
    while not (own / "ready").exists():  # of several workers the first one answers before the last one does
        time.sleep(0.1)
    return Server(name, port, process, secrets)


def litellm(stack: ExitStack, directory: Path, python: Path, upstream: str) -> Server:
    config, log, port = directory / "litellm.yaml", directory / "litellm.log", free_port()
    config.write_text(
        f"model_list:\n- model_name: tide\n  litellm_params: {{model: openai/tide, api_base: {upstream}/v1, api_key: none}}\n"
        "general_settings: {master_key: sk-master}\nlitellm_settings: {telemetry: false}\n"
    )
    argv = [str(python.parent / "litellm"), "--config", str(config), "--host", "127.0.0.1", "--port", str(port),
            "--num_workers", "1"]  # fmt: skip
    env = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR", "NO_DOCS": "True"}
    process = start(stack, argv, 0, log, env)
    wait_for(port, process, log)
    return Server("litellm", port, process, ["sk-master"])


def portkey(stack: ExitStack, directory: Path, folder: Path, upstream: str) -> Server:
    log, port = directory / "portkey.log", free_port()
    script = folder / "node_modules" / "@portkey-ai" / "gateway" / "build" / "start-server.js"
    if not script.exists():
        raise SystemExit(f"{folder} has no @portkey-ai/gateway: npm install @portkey-ai/gateway@1.15.2 there")
    process = start(stack, ["node", str(script), f"--port={port}", "--headless"], 0, log, {"NODE_ENV": "production"})
    wait_for(port, process, log)
    where = {"x-portkey-provider": "openai", "x-portkey-custom-host": f"{upstream}/v1"}
    return Server("portkey", port, process, ["none"], headers=where)


# ---- measuring -------------------------------------------------------------------------------------------------------


def load(server: Server, body: bytes, connections: int) -> Load:
    return Load(server.port, server.path, [(key, body) for key in server.keys], connections, server.headers)


def measure(servers: list[Server], kinds: dict[str, bytes], args: argparse.Namespace) -> None:
    for server in servers:
        for body in kinds.values():
            _run(load(server, body, 4), server, requests=100)
    for kind in kinds.keys() - {"stream"}:
        for _ in range(args.rounds):
            for server in servers:
                seen = _run(load(server, kinds[kind], 1), server, requests=args.sequential)
                server.latency.setdefault(kind, []).append(seen)
    for kind in kinds:
        for _ in range(args.rounds):
            for server in servers[1:]:
                before = server.cpu_s()
                at_once = max(1, args.connections // 4) if kind == "stream" else args.connections
                seen = _run(load(server, kinds[kind], at_once), server, seconds=args.seconds)
                server.rate.setdefault(kind, []).append((seen, server.cpu_s() - before))


def _run(load: Load, server: Server, **until: float) -> Measured:
    measured = load.run(**until)
    load.close()
    if measured.errors:
        first = measured.first_error.decode(errors="replace")
        raise SystemExit(f"{server.name}: {measured.errors} errors, the first:\n{first}")
    return measured


def flush_ms(directory: Path) -> tuple[float, float]:
    """(p50, p99) of writing 4 kB and flushing it, where the books lie."""
    took = []
    with open(directory / "flush", "wb", buffering=0) as file:
        for _ in range(100):
            file.write(b"x" * 4096)
            begun = time.perf_counter()
            os.fdatasync(file.fileno())
            took.append(time.perf_counter() - begun)
    took.sort()
    return took[50] * 1e3, took[98] * 1e3


def results(servers: list[Server], kinds: dict[str, bytes]) -> list[dict]:
    rows = []
    for server in servers:
        for kind in kinds:
            row: dict = {"server": server.name, "request": kind, "bytes": len(kinds[kind])}
            if kind in server.latency:
                direct = servers[0].latency[kind]
                pooled, base = ([x for m in seen for x in m.latencies_s] for seen in (server.latency[kind], direct))
                for name, share in (("p50", 0.5), ("p99", 0.99)):
                    row[f"{name} ms"] = Measured(1, pooled).ms(share)
                    row[f"added {name} ms"] = row[f"{name} ms"] - Measured(1, base).ms(share)
            if kind in server.rate:
                runs = server.rate[kind]
                row["per s"] = statistics.median(m.rate for m, _ in runs)
                row["loaded p99 ms"] = statistics.median(m.ms(0.99) for m, _ in runs)
                row["cpu us"] = statistics.median(cpu / max(len(m.latencies_s), 1) * 1e6 for m, cpu in runs)
            rows.append(row)
    return rows


COLUMNS = ("p50 ms", "p99 ms", "added p50 ms", "added p99 ms", "per s", "loaded p99 ms", "cpu us")


def table(rows: list[dict]) -> str:
    lines = ["| server | request | " + " | ".join(COLUMNS) + " |", "|---|---|" + "---:|" * len(COLUMNS)]
    for row in rows:
        cells = [f"{row[c]:.2f}" if "ms" in c and c in row else f"{row[c]:.0f}" if c in row else "" for c in COLUMNS]
        lines.append(f"| {row['server']} | {row['request']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--database", choices=["sqlite", "postgres"], default="sqlite")
    parser.add_argument("--litellm", type=Path, metavar="PYTHON", help="of a virtual environment that has litellm[proxy]")
    parser.add_argument("--portkey", type=Path, metavar="FOLDER", help="with node_modules/@portkey-ai/gateway in it")
    parser.add_argument("--dir", type=Path, help="where databases and journals are made (default: the usual temporary place)")
    parser.add_argument("--customers", type=int, default=50)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0, help="of load per round and server")
    parser.add_argument("--sequential", type=int, default=300, help="requests per round and server, one after the other")
    parser.add_argument("--only", default="", help="kinds of request, by comma: small,37 kB,stream")
    parser.add_argument("--servers", default="stub,tidelock", help="which of ours, by comma: stub,hop,tidelock")
    parser.add_argument("--profile", type=Path, metavar="PREFIX", help="cProfile's statistics of our servers go to PREFIX.NAME")
    parser.add_argument("--out", type=Path, help="write gateway.{md,json,svg} here")
    args = parser.parse_args()
    if len(os.sched_getaffinity(0)) < 2:
        raise SystemExit("this needs two cores: one for the server, one for load and upstream")
    kinds = {k: b for k, b in bodies(STREAMED_TOKENS).items() if not args.only or k in args.only.split(",")}
    with ExitStack() as stack:
        os.sched_setaffinity(0, {1})
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tidelock-gateway-", dir=args.dir)))
        shared = prepare(directory)
        flush = flush_ms(directory)
        postgres = stack.enter_context(local_postgres(durable=True)) if args.database == "postgres" else None
        port = free_port()
        argv = [sys.executable, str(HERE / "gateway_upstream.py"), "--port", str(port), "--said", str(shared[1])]
        upstream = start(stack, argv, 1, directory / "upstream.log")
        wait_for(port, upstream, directory / "upstream.log")
        url = f"http://127.0.0.1:{port}"
        servers = [Server("direct", port, upstream, ["none"])]
        for name in args.servers.split(","):
            database = postgres.database() if postgres else None
            servers.append(ours(stack, name, directory, shared, database, None if name == "stub" else url, args))
        if args.litellm:
            servers.append(litellm(stack, directory, args.litellm, url))
        if args.portkey:
            servers.append(portkey(stack, directory, args.portkey, url))
        measure(servers, kinds, args)
        rows = results(servers, kinds)
        head = (f"{args.database}; {args.connections} connections (streams: a quarter), {args.customers} customers, "
                f"{args.rounds} rounds; a flush of the disk takes {flush[0]:.2f} ms (p99 {flush[1]:.2f}); "
                f"load {os.getloadavg()[0]:.1f}")  # fmt: skip
        print(head, table(rows), sep="\n\n")
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / "gateway.md").write_text(f"{head}\n\n{table(rows)}\n")
            (args.out / "gateway.json").write_text(json.dumps({"setting": head, "rows": rows}, indent=1) + "\n")
            rates = [(f"{r['server']}, {r['request']}", r["per s"], f"{r['per s']:.0f}/s") for r in rows if "per s" in r]
            (args.out / "gateway.svg").write_text(standalone(bars(rates, left=130)))


if __name__ == "__main__":
    main()
