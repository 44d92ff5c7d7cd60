"""The real server on a free localhost port, in front of a policy that replays scripted turns as real template ids."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import openai
import pytest

from tidelock.service.db import Database
from tidelock.service.local_postgres import local_postgres, missing
from tidelock.service.prices import Price, PriceBook
from tidelock.service.server import Running, serving
from tidelock.service.state import ServiceState, open_state
from tidelock.tokens.message import Message
from tidelock.tokens.policy import Chunk, PolicyError, SamplingParams
from tidelock.tokens.template import get_template
from tidelock.tokens.tokenizer import ByteTokenizer

PRICE = Price(input_nano=300, cached_input_nano=30, output_nano=1500)


@dataclass
class ScriptedPolicy:
    """Answers with `turns` in order (the last one for ever), `per_chunk` tokens at a time, `pause_s` apart."""

    template: object
    turns: list[Message] = field(default_factory=lambda: [Message("assistant", "hello", reasoning="hm")])
    literal: list[int] | None = None  # these ids instead of a turn
    per_chunk: int = 5
    pause_s: float = 0.0
    fail_after: int | None = None  # chunks before a PolicyError
    cached_tokens: int = 0
    version: int = 1
    exact: bool = True
    prompts: list[tuple[int, ...]] = field(default_factory=list)
    params: list[SamplingParams] = field(default_factory=list)
    sampled: list[list[int]] = field(default_factory=list)  # by request: what was handed out
    aborted: set[str] = field(default_factory=set)
    swapped: list[tuple[str, int]] = field(default_factory=list)

    async def generate(self, prompt_ids, params, request_id=None):
        self.prompts.append(tuple(prompt_ids))
        self.params.append(params)
        handed_out: list[int] = []
        self.sampled.append(handed_out)
        turn = self.turns[min(len(self.prompts), len(self.turns)) - 1]
        ids = self.literal or self.template.render([turn])[len(self.template.generation_prompt()) :]
        finish = "length" if params.max_tokens < len(ids) else "stop"
        ids = ids[: params.max_tokens]
        for n, start in enumerate(range(0, len(ids), self.per_chunk)):
            if self.fail_after == n:
                raise PolicyError("the engine is full", status=503)
            await asyncio.sleep(self.pause_s)
            if request_id in self.aborted:
                yield Chunk((), (), self.version, "abort")
                return
            part = tuple(ids[start : start + self.per_chunk])
            handed_out += part
            last = start + self.per_chunk >= len(ids)
            reason, cached = (finish, self.cached_tokens) if last else (None, 0)
            yield Chunk(part, (-0.5,) * len(part), self.version, reason, cached)

    async def count(self, prompt_ids):
        return len(prompt_ids)

    async def abort(self, request_id):
        self.aborted.add(request_id)

    async def swap(self, checkpoint, version):
        if checkpoint == "missing":
            raise PolicyError("no such checkpoint", status=400, kind="invalid_request_error")
        self.swapped.append((checkpoint, version))
        self.version = version


@dataclass
class Service:
    state: ServiceState
    policy: ScriptedPolicy
    running: Running

    def key(self, customer: str = "ann", nano_usd: int = 1_000_000_000, **options) -> str:
        _, secret = self.state.keys.create(customer, **options)
        if nano_usd:
            self.state.ledger.topup(customer, nano_usd)
        return secret

    def client(self, secret: str | None = None, **options) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.running.base_url, api_key=secret or self.key(), **options)

    def async_client(self, secret: str) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=self.running.base_url, api_key=secret, max_retries=0)

    def wait(self, condition: Callable[[], bool]) -> None:
        """The server finishes a turn after its client has gone; give it a moment."""
        pause = threading.Event()
        for _ in range(500):
            if condition():
                return
            pause.wait(0.01)
        raise AssertionError("the server did not get there within 5 s")


@pytest.fixture(scope="session")
def postgres():
    """One throw-away PostgreSQL for the session; tests make databases in it. Skips, with the reason, where there is none."""
    if reason := missing():
        pytest.skip(f"PostgreSQL: {reason}")
    with local_postgres() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgres"])
def target(request, tmp_path):
    """What `Database` is opened on: the same tests run on both."""
    if request.param == "sqlite":
        return str(tmp_path / "service.sqlite")
    return request.getfixturevalue("postgres").database()


@pytest.fixture
def db(target):
    database = Database(target)
    yield database
    database.close()


@pytest.fixture
def template(request):
    return get_template(getattr(request, "param", "xtml"), ByteTokenizer())


@pytest.fixture
def service(tmp_path, template):
    policy = ScriptedPolicy(template)
    state = open_state(
        tmp_path,
        policy=policy,
        template=template,
        prices=PriceBook("v1", {"tide": PRICE}),
        model="tide",
        context_length=4096,
        weights_version=1,
    )
    ready, stop = threading.Event(), threading.Event()
    box: list[Running] = []

    async def serve() -> None:
        async with serving(state) as running:
            box.append(running)
            ready.set()
            await asyncio.to_thread(stop.wait)

    thread = threading.Thread(target=asyncio.run, args=(serve(),), daemon=True)
    thread.start()
    assert ready.wait(10)
    yield Service(state, policy, box[0])
    stop.set()
    thread.join(10)
    assert state.ledger.audit().sound
    state.traces.close()
    state.ledger.db.close()
