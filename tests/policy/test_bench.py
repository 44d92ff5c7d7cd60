"""The benchmark and the live view, against a real server: what they say is what the server did."""

import asyncio
import json

import pytest
from aiohttp import web
from policies import MODEL, engine_of, served
from hypothesis import given, settings
from hypothesis import strategies as st

from tidelock.cli.main import main
from tidelock.loop.bench.load import agents, poisson, reusable
from tidelock.loop.top import Frame, Scrape, View, quantile, sparkline


@pytest.fixture(scope="module")
def box(tmp_path_factory):
    engine = engine_of()
    with served(tmp_path_factory.mktemp("bench"), engine) as box:
        yield {**box, "engine": engine}
    engine.close()


def test_every_answer_is_counted_once_on_both_sides(box, tmp_path, capsys):
    before = box["engine"].stats.decoded
    assert main(["bench", "serve", f"tokens:{box['url']}", f"chat:{box['url']}/v1", "--api-key", box["key"], "--model", MODEL,
                 "--load", "both", "--requests", "4", "--rate", "50", "--conversations", "3", "--turns", "2", "--branch", "0.9",
                 "--rounds", "2", "--out", str(tmp_path / "out"), "--json", str(tmp_path / "r.json")]) == 0  # fmt: skip
    result = json.loads((tmp_path / "r.json").read_text())
    assert [(r["kind"], r["load"], r["rounds"]) for r in result["median"]] == [
        ("tokens", "poisson", 2), ("chat", "poisson", 2), ("tokens", "agents", 2), ("chat", "agents", 2)]  # fmt: skip
    rows = result["rounds"]
    assert all(r["errors"] == 0 and r["ttft_p50"] <= r["ttft_p95"] and r["itl_p50"] > 0 for r in rows)
    sampled = sum(r["sampled_tokens"] for r in rows)
    assert box["engine"].stats.decoded - before >= sampled - sum(r["requests"] for r in rows)  # the first of each is a prefill's
    exact = [r for r in rows if r["kind"] == "tokens"]
    loads = [poisson(f"0/{i}", 4, 50.0) if r["load"] == "poisson" else agents(f"0/{i}", 3, 2, branch=0.9)
             for r in exact for i in (r["round"],)]  # fmt: skip
    assert [r["requests"] for r in exact] == [load.requests for load in loads]
    assert [r["sampled_tokens"] for r in exact] == [sum(s.answer for x in load.starts for s in x.step.all()) for load in loads]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "bench.md", "bench.json", *(f"{load}-{plot}.svg" for load in ("poisson", "agents") for plot in ("ttft", "itl", "speed"))}
    import xml.etree.ElementTree as xml

    for file in (tmp_path / "out").glob("*.svg"):
        assert xml.parse(file).getroot().tag.endswith("svg")
    assert "TTFT p50" in capsys.readouterr().out


def test_llamas_own_route_is_spoken_too():
    """Its events, as b1-0c1e570 sends them; the real thing runs in benchmarks/serving.py."""
    from tidelock.remote.sse import Endpoint
    from tidelock.loop.bench.clients import LlamaClient, Measured
    from tidelock.loop.bench.load import Step

    async def handler(request):
        body = await request.json()
        assert body["prompt"] == [1, 2, 260, 3, 260] and body["ignore_eos"] and body["cache_prompt"]
        response = web.StreamResponse()
        await response.prepare(request)
        for event in ({"content": "a", "tokens": [7], "stop": False}, {"content": "", "tokens": [8, 9], "stop": False},
                      {"content": "", "tokens": [], "stop": True, "timings": {"cache_n": 3, "prompt_n": 2}}):  # fmt: skip
            await response.write(f"data: {json.dumps(event)}\n\n".encode())
        return response

    async def inside():
        app = web.Application()
        app.router.add_post("/completion", handler)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        client = LlamaClient("x", Endpoint(f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}", "k"), 260)
        measured = Measured(0.0)
        history = await client.ask(client.begin((1, 2)), Step((3,), 3), measured)
        await runner.cleanup()
        return history, measured

    history, measured = asyncio.run(inside())
    assert history == [1, 2, 260, 3, 260, 7, 8, 9, 260]
    assert (measured.prompt_tokens, measured.completion_tokens, measured.cached_tokens, len(measured.gaps)) == (5, 3, 3, 2)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 8), st.integers(1, 8), st.floats(0, 1))
def test_a_seed_is_a_load_and_no_path_outgrows_the_context(seed, conversations, turns, branch):
    load = agents(seed, conversations, turns, branch=branch, context=1200)
    assert load == agents(seed, conversations, turns, branch=branch, context=1200)

    def longest(step):
        return len(step.new) + step.answer + 8 + max(map(longest, step.then), default=0)

    assert all(len(s.opening) + longest(s.step) <= max(1200, len(s.opening) + 456) for s in load.starts)
    prompts = sum(_prompts(s.step, len(s.opening)) for s in load.starts)
    assert 0 <= reusable(load) < prompts


def _prompts(step, before):
    here = before + len(step.new)
    return here + sum(_prompts(s, here + step.answer) for s in step.then)


def test_servers_that_are_none_or_gone_are_one_clear_line(capsys, tmp_path):
    assert main(["bench", "serve", "ftp://x"]) == 2
    assert "is no server" in capsys.readouterr().err
    assert main(["bench", "serve", "tokens:http://127.0.0.1:1", "--load", "poisson", "--requests", "2", "--rate", "99"]) == 1
    assert "some requests failed; the first said: http://127.0.0.1:1" in capsys.readouterr().out
    assert main(["bench", "serve", "http://x", "--rate", "0"]) == 2
    assert main(["top", "http://127.0.0.1:1", "--frames", "1"]) == 2
    assert "cannot read http://127.0.0.1:1/metrics" in capsys.readouterr().err


def test_top_shows_what_moved(box, capsys, tmp_path):
    assert main(["top", box["url"] + "/v1", "--frames", "1", "--interval", "0.1", "--json", str(tmp_path / "f.json")]) == 0
    frame = json.loads((tmp_path / "f.json").read_text())
    assert frame["version"] == 1 and frame["running"] == 0 and frame["rss"] > 0
    assert "tokens/s" in capsys.readouterr().out


def test_rates_and_quantiles_are_of_the_interval():
    def scrape(at, tokens, counts):
        lines = [f"tidelock_generated_tokens_total {tokens}", "tidelock_weights_version 4", 'tidelock_requests{state="running"} 3']
        lines += [f'tidelock_time_to_first_token_seconds_bucket{{le="{b}"}} {n}' for b, n in counts.items()]
        return Scrape.read("\n".join(lines) + "\n", at)

    a = scrape(0.0, 100, {"0.1": 5, "0.2": 5, "+Inf": 5})
    b = scrape(2.0, 400, {"0.1": 5, "0.2": 9, "+Inf": 9})
    frame = Frame.between(a, b)
    assert (frame.tokens, frame.running, frame.version, frame.hit) == (150.0, 3, 4, None)
    assert frame.ttft == (pytest.approx(0.15), pytest.approx(0.195)) and frame.itl == (None, None)
    assert quantile([], [(0.1, 0.0), (float("inf"), 2.0)], 0.5) == 0.1  # beyond the last bound: at least that
    assert sparkline([0, 1, 2, 4]) == "▁▃▅█"
    View("x").draw(frame)
