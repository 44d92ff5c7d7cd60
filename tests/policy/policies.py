"""A real engine, a real server over it, and one policy on trial."""

from __future__ import annotations

import asyncio
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tidelock.engine import Engine, Limits
from tidelock.loop.rundir import MODEL, PRICES
from tidelock.models import TransformerLM, preset
from tidelock.service.server import serving
from tidelock.service.state import open_state
from tidelock.tokens.template import get_template
from tidelock.tokens.tokenizer import ByteTokenizer

TEMPLATE = get_template("xtml", ByteTokenizer())
CONTEXT = 2048


@contextmanager
def served(directory: Path, engine):
    """The root URL, the state and an admin's key of a server over `engine`."""
    ready, stop, box = threading.Event(), threading.Event(), {}

    async def main():
        state = open_state(directory, policy=engine, template=TEMPLATE, prices=PRICES, model=MODEL, context_length=CONTEXT,
                           weights_version=engine.version)  # fmt: skip
        _, secret = state.keys.create("ann", "t", role="admin")
        state.ledger.topup("ann", 10**12)
        async with serving(state) as running:
            box.update(url=running.base_url.removesuffix("/v1"), state=state, key=secret)
            ready.set()
            await asyncio.to_thread(stop.wait)

    thread = threading.Thread(target=lambda: asyncio.run(main()), daemon=True)
    thread.start()
    assert ready.wait(30)
    try:
        yield box
    finally:
        stop.set()
        thread.join(20)


def engine_of(seed: int = 0, version: int = 1, **limits) -> Engine:
    model = TransformerLM(preset("nano-k3", TEMPLATE.tokenizer.vocab_size + 7), seed=seed)
    return Engine(model, version, template=TEMPLATE, boundary_id=TEMPLATE.stop_ids[0], limits=Limits(context=CONTEXT, **limits))


def serving_model(engine: Engine) -> TransformerLM:
    return engine._scheduler.weights.model


@dataclass
class Case:
    policy: object
    engine: Engine
    checkpoint: Path  # of other weights

    @property
    def exact(self) -> bool:
        return self.policy.exact
