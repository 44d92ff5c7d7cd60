"""The real server on a free localhost port, in front of a policy that replays scripted turns as real template ids."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import openai
import pytest
from scripted import PRICE, ScriptedPolicy

from tidelock.service.db import Database
from tidelock.service.local_postgres import local_postgres, missing
from tidelock.service.prices import PriceBook
from tidelock.service.server import Running, serving
from tidelock.service.state import ServiceState, open_state
from tidelock.tokens.template import get_template
from tidelock.tokens.tokenizer import ByteTokenizer

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


APPEND_ONLY = ("transactions", "entries", "invoices", "adjustments", "usage")


def forced(db: Database, *statements: str) -> None:
    """What no code of ours would do: the triggers that forbid it are taken away first."""
    with db.transaction() as tx:
        for table in APPEND_ONLY:
            if db.name == "sqlite":
                for verb in ("update", "delete"):
                    tx(f"DROP TRIGGER IF EXISTS {table}_{verb}_never")
            else:
                tx(f"ALTER TABLE {table} DISABLE TRIGGER USER")
        for sql in statements:
            tx(sql)


@contextmanager
def _serving(directory, template, database=None):
    policy = ScriptedPolicy(template)
    state = open_state(
        directory,
        policy=policy,
        template=template,
        prices=PriceBook("v1", {"tide": PRICE}),
        model="tide",
        context_length=4096,
        weights_version=1,
        database=database,
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


@pytest.fixture
def service(tmp_path, template):
    with _serving(tmp_path, template) as one:
        yield one


@pytest.fixture
def serving_in():
    """A server that ends when the test wants it to: `with serving_in(directory, template) as service`."""
    return _serving


@pytest.fixture
def pair(tmp_path, template, target):
    """Two servers on one database, on SQLite and on PostgreSQL: what one is told the other must find out."""
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "pepper").write_bytes(b"p" * 64)
    with _serving(tmp_path / "first", template, target) as first, _serving(tmp_path / "second", template, target) as second:
        yield first, second
