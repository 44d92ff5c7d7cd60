"""The whole service in front of upstreams that misbehave: what the client sees, what is billed, what the rows say."""

import asyncio
import io
import json
import random
import subprocess
import sys
from contextlib import asynccontextmanager

import aiohttp
import pytest
from scripted import PRICE
from faulty import LATE, TEMPLATE, Faulty, upstreams
from rich.console import Console

from tidelock.loop.top import Frame, Scrape, View
from tidelock.service.prices import PriceBook
from tidelock.service.server import serving
from tidelock.service.state import open_state
from tidelock.service.upstreams import read_upstreams
from tidelock.tokens.tokenizer import BPETokenizer

FILE = """
[pool]
choice = "round-robin"
wait_s = 5
"""
ONE = """
[[upstream]]
name = "{name}"
url = "{url}"
kind = "{kind}"
model = "m"
connect_s = 0.5
first_token_s = 2
idle_s = 1
max_in_flight = {most}
"""


class Gateway:
    def __init__(self, state, base_url, http, secret):
        self.state, self.base_url, self.http, self.secret = state, base_url, http, secret
        self.root = base_url.removesuffix("/v1")

    async def chat(self, text="hi", stream=True, secret=None, **more):
        """(status, the events or the body, whether [DONE] came)."""
        messages = [{"role": "user", "content": text}]
        body = {"model": "tide", "messages": messages, "stream": stream, "max_tokens": 500, **more}
        headers = {"Authorization": f"Bearer {secret or self.secret}"}
        async with self.http.post(f"{self.base_url}/chat/completions", json=body, headers=headers) as response:
            if not stream or response.status != 200:
                return response.status, await response.json(), False
            events = [line[6:] for line in (await response.text()).split("\n") if line.startswith("data: ")]
        done = events[-1:] == ["[DONE]"]
        return 200, [json.loads(e) for e in events if e != "[DONE]"], done

    async def usage(self, n):
        """The rows, once there are so many: a bill of a client that left is written after it is gone."""
        for _ in range(300):
            rows = self.state.ledger.db.read("SELECT * FROM usage ORDER BY created", ())
            if len(rows) >= n:
                break
            await asyncio.sleep(0.01)
        assert len(rows) == n and self.state.ledger.audit().sound
        return rows


@asynccontextmanager
async def gateway(directory, *servers, kinds="tokens", most=64, extra="probe_s = 0.05\n"):
    async with upstreams(*servers), aiohttp.ClientSession() as http:
        kinds = [kinds] * len(servers) if isinstance(kinds, str) else kinds
        listed = [ONE.format(name="abc"[n], url=s.url + ("/v1" if k == "chat" else ""), kind=k, most=most)
                  for n, (s, k) in enumerate(zip(servers, kinds))]  # fmt: skip
        (directory / "upstreams.toml").write_text(FILE + extra + "".join(listed))
        front = read_upstreams(directory / "upstreams.toml", TEMPLATE)
        prices = PriceBook("v1", {"tide": PRICE})
        state = open_state(directory / "service", policy=front.pool, template=TEMPLATE, prices=prices, model="tide",
                           context_length=8192, weights_version=-1)  # fmt: skip
        _, secret = state.keys.create("ann")
        state.ledger.topup("ann", 10**12)
        async with serving(state) as running:
            yield Gateway(state, running.base_url, http, secret)
        assert not front.pool._jobs and all(u.in_flight == 0 for u in front.pool.upstreams)
        state.traces.close()
        state.ledger.db.close()


def run(work):
    return asyncio.run(asyncio.wait_for(work, 40))


def said(events):
    return "".join(c["delta"].get("content") or "" for e in events for c in e.get("choices", []))


@pytest.mark.parametrize("kind", ["tokens", "chat"])
def test_the_first_word_is_there_before_the_upstream_says_the_second(tmp_path, kind):
    async def work():
        server = Faulty(gate=asyncio.Event(), gate_at=0 if kind == "chat" else 30)  # ids begin with markup
        async with gateway(tmp_path, server, kinds=kind) as g:
            body = {"model": "tide", "messages": [{"role": "user", "content": "hi"}], "stream": True, "max_tokens": 500}
            headers = {"Authorization": f"Bearer {g.secret}"}
            async with g.http.post(f"{g.base_url}/chat/completions", json=body, headers=headers) as response:
                seen = b""
                while b"wo" not in seen:
                    seen += await response.content.readany()
                assert not server.sent[0].ended and server.running == 1
                server.gate.set()
                seen += await response.read()
            assert seen.rstrip().endswith(b"data: [DONE]")

    run(work())


@pytest.mark.parametrize("kind", ["tokens", "chat"])
@pytest.mark.parametrize("fault", LATE)
def test_a_cut_answer_is_an_error_without_an_end_and_what_was_sent_is_billed(tmp_path, fault, kind):
    async def work():
        server = Faulty(fault=lambda n, body: fault)
        async with gateway(tmp_path, server, kinds=kind) as g:
            status, events, done = await g.chat(stream_options={"include_usage": True})
            assert status == 200 and not done and "error" in events[-1]
            assert not any(c.get("finish_reason") for e in events for c in e.get("choices", []))
            assert "127.0.0.1" not in json.dumps(events) and "secret" not in json.dumps(events)
            (row,) = await g.usage(1)
            node = next(n for n in g.state.traces.nodes.values() if n.sampled)
            delivered = list(node.ids[-node.sampled :])
            assert row["completion_tokens"] == node.sampled and node.finish_reason == "abort"
            if kind == "tokens":
                assert delivered == server.sent[0].ids
            parser = TEMPLATE.parser()
            parser.feed(delivered)
            assert said(events) == parser.finish().content and server.sent[0].text in ("", said(events))
            assert (row["upstream"], row["upstream_completion"], row["finish_reason"]) == ("a", None, "abort")

    run(work())


@pytest.mark.parametrize("kind", ["tokens", "chat"])
@pytest.mark.parametrize("usage", [True, False])
def test_a_whole_answer_keeps_what_the_upstream_said_of_it(tmp_path, kind, usage):
    async def work():
        server = Faulty(usage=usage)
        async with gateway(tmp_path, server, kinds=kind) as g:
            _, hidden, done = await g.chat()
            assert done and not any(e.get("usage") for e in hidden)
            status, whole, _ = await g.chat(stream=False)
            assert status == 200 and whole["choices"][0]["message"]["content"] == server._text() == said(hidden)
            for sent, row in zip(server.sent, await g.usage(2)):
                ours = len(sent.ids) if kind == "tokens" else len(TEMPLATE.sampled(parsed(sent.text)))
                theirs = (len(sent.ids) if kind == "tokens" else len(sent.text)) if usage else None
                assert (row["upstream"], row["upstream_completion"]) == ("a", theirs)
                assert row["upstream_cached"] == (3 if usage else None)
                assert row["completion_tokens"] == (ours if kind == "tokens" or not usage else min(ours, theirs))
                assert kind == "tokens" or not usage or row["prompt_tokens"] == row["upstream_prompt"] == 11
            node = g.state.traces.get(whole["trace"]["node"])
            assert node.exact == (kind == "tokens")
            assert {v for v, _ in node.weights_versions} == {7 if kind == "tokens" else -1}
            _, counted, _ = await g.chat(stream_options={"include_usage": True})
            assert counted[-1]["usage"]["completion_tokens"] == (await g.usage(3))[-1]["completion_tokens"]

    run(work())


def parsed(text):
    from tidelock.tokens.message import Message

    return Message("assistant", text)


def test_an_answer_of_a_mixed_pool_says_in_the_trace_who_gave_it(tmp_path):
    async def work():
        async with gateway(tmp_path, Faulty(), Faulty(), kinds=["tokens", "chat"]) as g:
            for n in range(4):
                _, body, _ = await g.chat(f"q{n}", stream=False)
                node = g.state.traces.get(body["trace"]["node"])
                by = (await g.usage(n + 1))[-1]["upstream"]
                assert (node.exact, node.weights_versions[0][0]) == ((True, 7) if by == "a" else (False, -1))
            assert {row["upstream"] for row in await g.usage(4)} == {"a", "b"}
            status, body, _ = await g.chat(logprobs=True, stream=False, temperature=1.0)
            assert status == 400
            assert g.state.inexact("b") and not g.state.inexact("a")

    run(work())


def test_health_and_metrics_tell_of_each_upstream_and_of_no_address(tmp_path):
    async def work():
        servers = [Faulty(fault=lambda n, body: "500"), Faulty()]
        async with gateway(tmp_path, *servers, extra="probe_s = 1000\n") as g:
            while g.state.policy.version != 7:  # the first look is over; the next ones shall not take it back
                await asyncio.sleep(0.01)
            servers[0].healthy = False
            for n in range(10):
                assert (await g.chat(f"q{n}"))[2]
            async with g.http.get(f"{g.root}/health") as response:
                health = await response.json()
            async with g.http.get(f"{g.root}/metrics") as response:
                metrics = await response.text()
            assert [u["name"] for u in health["upstreams"]] == ["a", "b"] and health["weights_version"] == 7
            assert health["status"] == "degraded" and health["upstreams"][0]["state"] == "open"
            for line in ('tidelock_upstream_failures_total{cause="500",upstream="a"} 5.0',
                         'tidelock_upstream_retries_total{upstream="a"} 5.0',
                         'tidelock_upstream_requests_total{upstream="b"} 10.0',
                         'tidelock_upstream_state{state="open",upstream="a"} 1.0',
                         'tidelock_upstream_in_flight{upstream="b"} 0.0',
                         'tidelock_upstream_cached_tokens_total{upstream="b"} 30.0',
                         "tidelock_pool_waiting 0.0"):  # fmt: skip
                assert line in metrics, line
            assert "127.0.0.1" not in metrics + json.dumps(health)
            frame = Frame.between(Scrape(0.0, {}), Scrape.read(metrics, 2.0))
            assert [u[:3] for u in frame.upstreams] == [("a", "open", 0), ("b", "closed", 0)]
            assert frame.upstreams[0][4] >= 2.5 and frame.upstreams[1][3:] == (5.0, 0.0)
            console = Console(file=io.StringIO(), width=100)
            console.print(View("u").draw(frame))
            assert "half-open" not in console.file.getvalue() and "open" in console.file.getvalue()

    run(work())


def test_a_full_line_is_the_clients_429_and_costs_nothing(tmp_path):
    async def work():
        server = Faulty(gate=asyncio.Event())
        async with gateway(tmp_path, server, most=1, extra="max_waiting = 1\n") as g:
            first, second = (asyncio.create_task(g.chat(f"q{n}")) for n in range(2))
            while not (server.running and g.state.policy.waiting):
                await asyncio.sleep(0.01)
            status, body, _ = await g.chat("q2")
            assert (status, body["error"]["type"]) == (429, "engine_overloaded_error")
            server.gate.set()
            assert (await first)[2] and (await second)[2]
            await g.usage(2)

    run(work())


@pytest.mark.parametrize("kind", ["tokens", "chat"])
def test_what_was_sent_is_what_was_billed_whatever_happens(tmp_path, kind):
    """Two upstreams with random faults, one of which dies and comes back; clients that stay and clients that leave."""

    async def work():
        rng = random.Random(5)

        def fault(n, body):
            return rng.choices(["", "500", "hang up", "full", "cut", "malformed", "no end"], [8, 1, 1, 1, 1, 1, 1])[0]

        servers = [Faulty(fault, words=lambda n: rng.randint(1, 25), pause_s=0.002) for _ in range(2)]
        async with gateway(tmp_path, *servers, kinds=kind, most=8) as g:
            outcomes = []

            async def client(n):
                await asyncio.sleep(rng.random() * 0.3)
                work = asyncio.create_task(g.chat(f"talk {n}", stream=n % 4 > 0))
                if n % 9 == 4:
                    await asyncio.wait([work], timeout=0.03)
                    work.cancel()
                await asyncio.wait([work])
                outcomes.append(None if work.cancelled() or work.exception() else (n % 4 > 0, *work.result()))

            clients = [asyncio.create_task(client(n)) for n in range(60)]
            await asyncio.sleep(0.1)
            await servers[0].stop()
            await asyncio.sleep(0.1)
            await servers[0].start()
            await asyncio.gather(*clients)
            stayed = [o for o in outcomes if o is not None]
            for streamed, status, body, done in stayed:
                if streamed and status == 200:
                    assert done != ("error" in body[-1])
                    assert done == any(c.get("finish_reason") for e in body for c in e.get("choices", []))
                else:
                    assert status in (200, 429, 502, 503, 504)
            rows = await settled(g)
            sampled = {n.id: n.sampled for n in g.state.traces.nodes.values() if n.sampled}
            assert sum(row["completion_tokens"] for row in rows) <= sum(sampled.values())
            if kind == "tokens":  # to the token
                assert sum(row["completion_tokens"] for row in rows) == sum(sampled.values())
                assert sum(u.tally.generated_tokens for u in g.state.policy.upstreams) >= sum(sampled.values())
            assert len(rows) == len(sampled)
            heard = sum(status == 200 and (not streamed or bool(said(body))) for streamed, status, body, _ in stayed)
            assert heard <= len(rows) and any("error" in body[-1] for s, st, body, _ in stayed if s and st == 200)
            assert not g.state.ledger.db.read("SELECT 1 FROM holds WHERE state = 'open'", ())

    run(work())


async def settled(g):
    for _ in range(300):
        if not g.state.ledger.db.read("SELECT 1 FROM holds WHERE state = 'open'", ()) and not g.state.policy._jobs:
            break
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.1)
    assert g.state.ledger.audit().sound
    return g.state.ledger.db.read("SELECT * FROM usage", ())


def test_a_gateway_starts_from_a_tokenizer_alone_and_never_imports_torch(tmp_path):
    """`tidelock serve` of a directory without any model, in a process of its own."""
    BPETokenizer.train(["tides and moons"], 300).save(tmp_path / "run" / "tokenizer")
    (tmp_path / "run" / "service").mkdir()
    file = tmp_path / "run" / "service" / "upstreams.toml"
    file.write_text(FILE + "context_length = 4096\n" + ONE.format(name="a", url="http://127.0.0.1:9", kind="tokens", most=4))
    program = """
import json, os, signal, sys, threading, time, urllib.request
from tidelock.cli.main import main
ready = sys.argv[2]

def look():
    while not os.path.exists(ready):
        time.sleep(0.01)
    root = open(ready).read().strip().removesuffix("/v1")
    print(json.dumps([json.load(urllib.request.urlopen(root + "/health")), "torch" in sys.modules]), file=sys.stderr)
    os.kill(os.getpid(), signal.SIGTERM)

threading.Thread(target=look, daemon=True).start()
sys.exit(main(["serve", sys.argv[1], "--port", "0", "--ready-file", ready]))
"""
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "run", tmp_path / "ready"], capture_output=True,
                          text=True, timeout=60, check=True)  # fmt: skip
    health, torch = json.loads(next(line for line in done.stderr.splitlines() if line.startswith("[{")))
    assert not torch and health["upstreams"][0]["name"] == "a" and "upstreams a" in done.stdout
    file.write_text(file.read_text().replace("context_length = 4096\n", ""))
    done = subprocess.run([sys.executable, "-m", "tidelock", "serve", tmp_path / "run", "--port", "0"], capture_output=True,
                          text=True, timeout=60)  # fmt: skip
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "nothing released" in done.stderr
