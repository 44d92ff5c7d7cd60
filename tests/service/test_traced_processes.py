"""A trace through real processes: a client's `traceparent`, `tidelock serve --log json --otel` in front of another Tidelock, the
collector that both tell, and what a process writes on stderr meanwhile."""

from __future__ import annotations

import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx2 as httpx
import pytest

pytest.importorskip("opentelemetry.sdk")

from test_tracing import PARENT, TRACE, Collector  # noqa: E402

from tidelock.service.db import Database  # noqa: E402
from tidelock.service.keys import KeyStore  # noqa: E402
from tidelock.service.ledger import Ledger  # noqa: E402
from tidelock.tokens.tokenizer import BPETokenizer  # noqa: E402

WORDS = "the password is swordfish"
ROOT = Path(__file__).parents[2]
POOL = """
[pool]
choice = "round-robin"
context_length = 4096
probe_s = 1000
"""
ONE = """
[[upstream]]
name = "{name}"
url = "{url}"
kind = "{kind}"
model = "tide"
api_key_env = "UPSTREAM_KEY"
probe = ""
"""
UPSTREAM = """
import asyncio, sys
from scripted import PRICE, ScriptedPolicy
from tidelock.loop.rundir import RunDir
from tidelock.service.prices import PriceBook
from tidelock.service.server import serving
from tidelock.service.state import open_state
from tidelock.service.tracing import Tracing

async def main():
    template = RunDir(sys.argv[1]).template()
    state = open_state(sys.argv[2], policy=ScriptedPolicy(template), template=template, prices=PriceBook("v1", {"tide": PRICE}),
                       model="tide", context_length=4096, weights_version=1)
    state.tracing = Tracing.to(sys.argv[3])
    secret = state.keys.create("gateway", role="admin")[1]
    state.ledger.topup("gateway", 10**12)
    async with serving(state) as running:
        print(running.base_url, secret, flush=True)
        await asyncio.to_thread(sys.stdin.read)
    state.tracing.close()

asyncio.run(main())
"""


class Refuser(http.server.BaseHTTPRequestHandler):
    """An upstream that fails every request, and keeps what it was sent."""

    def do_POST(self) -> None:
        self.server.posts.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(500)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *args) -> None:
        pass


def listening(handler):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.posts = []
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_port}"


def spans(collector) -> list:
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    messages = [ExportTraceServiceRequest.FromString(body) for _, _, body in collector.posts]
    return [span for m in messages for r in m.resource_spans for scope in r.scope_spans for span in scope.spans]


@pytest.mark.parametrize("kind", ["tokens", "chat"])
def test_one_trace_from_the_client_through_the_gateway_s_second_try_into_the_upstream(tmp_path, kind):
    run = tmp_path / "run"
    BPETokenizer.train(["tides and moons"], 300).save(run / "tokenizer")
    (run / "service").mkdir()
    db = Database(run / "service" / "service.sqlite")
    _, secret = KeyStore.open(db, run / "service" / "pepper").create("ann")
    Ledger(db).topup("ann", 10**12)
    db.close()
    (collector, otel), (refuser, broken) = listening(Collector), listening(Refuser)
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}", "OMP_NUM_THREADS": "1"}
    upstream = subprocess.Popen([sys.executable, "-c", UPSTREAM, str(run), str(tmp_path / "upstream"), otel], stdin=subprocess.PIPE,
                                stdout=subprocess.PIPE, text=True, env=env)  # fmt: skip
    url, key = upstream.stdout.readline().split()
    places = [("a", broken), ("b", url.removesuffix("/v1"))]
    (run / "service" / "upstreams.toml").write_text(
        POOL + "".join(ONE.format(name=n, url=u + ("/v1" if kind == "chat" else ""), kind=kind) for n, u in places))
    argv = [sys.executable, "-m", "tidelock.cli.main", "serve", str(run), "--port", "0", "--ready-file", str(tmp_path / "ready"),
            "--log", "json", "--otel", otel]  # fmt: skip
    gateway = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**env, "UPSTREAM_KEY": key})
    deadline = time.monotonic() + 60
    while not (tmp_path / "ready").exists():
        assert gateway.poll() is None and time.monotonic() < deadline, gateway.stderr.read()
        time.sleep(0.05)
    base, told = (tmp_path / "ready").read_text().strip(), {}
    for n in range(4):  # in turn: half of them come to the broken one first
        trace = f"{n:01x}{TRACE[1:]}"
        headers = {"authorization": f"Bearer {secret}", "traceparent": f"00-{trace}-{PARENT}-01"}
        body = {"model": "tide-nano", "messages": [{"role": "user", "content": f"{WORDS} {n}"}], "max_tokens": 50}
        answer = httpx.post(f"{base}/chat/completions", json=body, headers=headers, timeout=30)
        assert answer.status_code == 200, answer.text
        told[trace] = answer.headers["x-request-id"]
    gateway.send_signal(signal.SIGTERM)  # what is not sent yet is sent now
    _, err = gateway.communicate(timeout=30)
    upstream.stdin.close()
    assert upstream.wait(30) == 0 and gateway.returncode == 0
    for server in (collector, refuser):
        server.shutdown()
        server.server_close()

    tried = {headers["traceparent"].split("-")[1]: headers["traceparent"] for path, headers in refuser.posts}
    assert refuser.posts and set(tried) < set(told) and all(secret not in str(headers) for _, headers in refuser.posts)
    asked = "/inference/v1/generate" if kind == "tokens" else "/v1/chat/completions"
    for trace, request_id in told.items():
        ours = [span for span in spans(collector) if span.trace_id.hex() == trace]
        root = next(span for span in ours if span.parent_span_id.hex() == PARENT)
        ids = {a.key: a.value.string_value for a in root.attributes}
        assert root.name == "POST /v1/chat/completions" and ids["tidelock.request_id"] == request_id
        policy = next(span for span in ours if span.name == "chat tide-nano")
        assert policy.parent_span_id == root.span_id
        there = next(span for span in ours if span.parent_span_id == policy.span_id)
        assert there.name == f"POST {asked}"  # the upstream's own, which another process sent
        assert {span.name for span in ours if span.parent_span_id == root.span_id} == {"hold", "chat tide-nano", "settle", "trace"}
        if trace in tried:  # the first try was told the same as the second
            assert tried[trace] == f"00-{trace}-{policy.span_id.hex()}-01"
    lines = [json.loads(line) for line in err.splitlines()]  # nothing else than JSON comes from the process
    access = [line for line in lines if line["logger"] == "tidelock.access" and line.get("route") == "/v1/chat/completions"]
    assert [line["request_id"] for line in access] == list(told.values()) and all(line["customer"] == "ann" for line in access)
    assert all(line["nano_usd"] > 0 and line["status"] == 200 for line in access)
    everything = err + str([span.SerializeToString() for span in spans(collector)])
    assert not any(word in everything for word in (secret, key, "swordfish"))


@pytest.mark.parametrize("options, said", [
    (["--otel", "localhost:4318"], "write http://HOST:4318"), (["--log", "yaml"], "invalid choice"),
])  # fmt: skip
def test_nonsense_is_said_before_anything_is_served(tmp_path, options, said):
    BPETokenizer.train(["tides and moons"], 300).save(tmp_path / "tokenizer")
    (tmp_path / "service").mkdir()
    (tmp_path / "service" / "upstreams.toml").write_text(POOL + ONE.format(name="a", url="http://127.0.0.1:9", kind="tokens"))
    env = {**os.environ, "PYTHONPATH": str(ROOT), "UPSTREAM_KEY": "x"}
    done = subprocess.run([sys.executable, "-m", "tidelock.cli.main", "serve", str(tmp_path), "--port", "0", *options],
                          capture_output=True, text=True, timeout=60, env=env)  # fmt: skip
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr and done.stdout == ""
