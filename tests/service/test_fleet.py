"""Several workers behind one port are one server: one trace, one set of books, honest metrics, and nobody outlives it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2 as httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tidelock.loop.top import Scrape
from tidelock.service.db import Database
from tidelock.service.fleet import Fleet
from tidelock.service.keys import KeyStore
from tidelock.service.ledger import Ledger
from tidelock.service.scrape import merged
from tidelock.tokens.errors import UserError
from tidelock.tokens.message import Message
from tidelock.tokens.template import get_template
from tidelock.tokens.tokenizer import ByteTokenizer
from tidelock.tokens.trace import Trace

ROOT = Path(__file__).parents[2]


def eventually(condition, seconds: float = 20.0):
    deadline = time.monotonic() + seconds
    while not (seen := condition()):
        assert time.monotonic() < deadline, "the server did not get there"
        time.sleep(0.05)
    return seen


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def samples(text: str) -> dict[tuple, float]:
    return {(s.name, *sorted(s.labels.items())): s.value for f in text_string_to_metric_families(text) for s in f.samples}


class Server:
    def __init__(self, directory: Path, database: str) -> None:
        self.directory = directory
        template = get_template("xtml", ByteTokenizer())
        texts = {"short": "a tide", "long": "w " * 80}
        said = {name: [template.sampled(Message("assistant", text)), text] for name, text in texts.items()}
        (directory / "said.json").write_text(json.dumps(said))
        self.db = Database(database)
        _, self.secret = KeyStore.open(self.db, directory / "pepper").create("ann")
        self.ledger = Ledger(self.db)
        self.ledger.topup("ann", 10**13)
        argv = [sys.executable, str(ROOT / "benchmarks" / "gateway_server.py"), "--dir", str(directory), "--said",
                str(directory / "said.json"), "--database", database, "--workers", "2"]  # fmt: skip
        self.process = subprocess.Popen(argv, env={**os.environ, "PYTHONPATH": str(ROOT)})
        eventually(lambda: self.process.poll() is not None or (directory / "ready").exists())
        self.url = (directory / "ready").read_text().strip()

    def ask(self, messages: list[dict], session: str) -> httpx.Response:
        """Over a connection of its own, so that the kernel picks the worker anew."""
        body = {"model": "tide", "messages": messages, "max_tokens": 50, "metadata": {"session_id": session}}
        headers = {"authorization": f"Bearer {self.secret}"}
        return httpx.post(f"{self.url}/chat/completions", json=body, headers=headers, timeout=30)

    def metrics(self) -> dict[tuple, float]:
        return samples(httpx.get(self.url.removesuffix("/v1") + "/metrics").text)

    def answered(self) -> dict[str, float]:
        """Chat completions by worker."""
        found = {}
        for (name, *labels), value in self.metrics().items():
            told = dict(labels)
            if name == "tidelock_http_responses_total" and told["route"] == "/v1/chat/completions":
                found[told["worker"]] = found.get(told["worker"], 0) + value
        return found


@pytest.fixture
def server(tmp_path, target):
    server = Server(tmp_path, target)
    yield server
    if server.process.poll() is None:
        server.process.terminate()
    server.process.wait(30)
    server.db.close()


def talk(server: Server, session: str, turns: int, broken: list[str]) -> list[dict]:
    """A conversation over several connections; the answers' bodies. A turn that dies with its worker is said again."""
    messages: list[dict] = []
    answers = []
    for turn in range(turns):
        messages.append({"role": "user", "content": f"{session}, turn {turn}"})
        for _ in range(20):
            try:
                answer = server.ask(messages, session)
                break
            except httpx.TransportError as error:
                broken.append(type(error).__name__)
                time.sleep(0.05)
        assert answer.status_code == 200, answer.text
        answers.append({**answer.json(), "request_id": answer.headers["x-request-id"]})
        said = answers[-1]["choices"][0]["message"]
        messages.append({"role": "assistant", "content": said["content"], "reasoning_content": said.get("reasoning_content")})
    return answers


def test_a_worker_killed_under_load_loses_nothing_and_comes_back(server):
    broken: list[str] = []
    workers = children(server.process.pid)
    assert len(workers) == 2
    with ThreadPoolExecutor(6) as pool:
        talks = [pool.submit(talk, server, f"s{n}", 12, broken) for n in range(6)]
        eventually(lambda: (server.directory / "trace.jsonl").stat().st_size > 1000)  # it has answered something
        os.kill(workers[0], signal.SIGKILL)
        answers = [answer for each in talks for answer in each.result()]
    eventually(lambda: {dict(labels).get("worker") for _, *labels in server.metrics()} == {"0", "1"})
    assert len(set(children(server.process.pid)) - {workers[0]}) == 2
    rows = {row["request_id"]: row for row in server.db.read("SELECT * FROM usage")}
    assert len(rows) == server.db.read("SELECT COUNT(*) FROM usage")[0][0] and len(answers) == 72
    for answer in answers:  # every bill a client was told is its one row; a request that died with its worker was free
        assert rows[answer["request_id"]]["nano_usd"] == answer["usage"]["cost_nano_usd"]
    assert all(row["nano_usd"] == 0 or row["finish_reason"] != "lost" for row in rows.values())
    eventually(lambda: not server.db.read("SELECT 1 FROM holds WHERE state = 'open'"))
    assert server.ledger.audit().sound
    # one trace: each turn hangs below the answer it follows, whichever worker gave that
    trace = Trace.read(server.directory / "trace.jsonl")
    for n in range(6):
        nodes = [answer["trace"]["node"] for answer in talks[n].result()]
        assert [node.id for node in trace.path(nodes[-1])][1::2] == nodes
    assert len((server.directory / "trace-1.jsonl").read_bytes()) > 1000


def test_metrics_of_all_workers_add_up_and_nobody_outlives_the_parent(server):
    for n in range(24):
        assert server.ask([{"role": "user", "content": f"hi {n}"}], "s").status_code == 200
    assert sum(server.answered().values()) == 24 and set(server.answered()) == {"0", "1"}
    workers = children(server.process.pid)
    server.process.kill()
    eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))


def test_a_worker_that_cannot_start_ends_the_server_with_its_words(tmp_path):
    fleet = Fleet(lambda member, port: [sys.executable, "-c", "raise SystemExit('no such thing')"], 2)
    with pytest.raises(UserError, match="worker [01] did not start"):
        fleet.run("127.0.0.1", 0, tmp_path / "ready")
    assert not (tmp_path / "ready").exists()


def test_a_worker_that_keeps_crashing_is_given_up(tmp_path):
    code = "import sys, pathlib; pathlib.Path(sys.argv[1]).write_text(''); sys.exit(3)"
    fleet = Fleet(lambda member, port: [sys.executable, "-S", "-c", code, str(member.ready_file)], 1)
    with pytest.raises(UserError, match="ended 6 times within"):
        fleet.run("127.0.0.1", 0, tmp_path / "ready", lambda url: None)


def test_samples_of_every_shape_get_their_worker():
    text = b'# HELP a Of a\n# TYPE a counter\na_total{x="1 {"} 2.0\n# HELP b Of b\n# TYPE b gauge\nb 1.0\n'
    one = merged([(0, text), (3, text)])
    found = samples(one.decode())
    assert one.count(b"# TYPE") == 2 and Scrape.read(one.decode()).values == {("a_total", "1 {"): 4.0, ("b",): 2.0}
    assert found["a_total", ("worker", "3"), ("x", "1 {")] == 2.0 and found["b", ("worker", "0")] == 1.0 and len(found) == 4
