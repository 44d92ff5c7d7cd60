"""The official client against a real model: what it sees, what is stored and what is charged are one thing."""

import asyncio
import contextlib
import threading

import openai
import pytest

from tidelock.engine import Engine
from tidelock.loop.rundir import MODEL, PRICES
from tidelock.models import TransformerLM, preset
from tidelock.service.server import serving
from tidelock.service.state import open_state
from tidelock.tokens.template import get_template
from tidelock.tokens.tokenizer import ByteTokenizer


@contextlib.contextmanager
def running(tmp_path):
    """A server on a free port with an untrained nano model over byte tokens; yields (state, base_url)."""
    template = get_template("xtml", ByteTokenizer())
    engine = Engine(TransformerLM(preset("nano-k3", 288), seed=0), 1, boundary_id=template.stop_ids[0], template=template)
    ready, stop, box = threading.Event(), threading.Event(), {}

    async def main():
        state = open_state(tmp_path, policy=engine, template=template, prices=PRICES, model=MODEL, context_length=2048,
                           weights_version=1)  # fmt: skip
        async with serving(state) as server:
            box.update(state=state, url=server.base_url)
            ready.set()
            while not stop.is_set():
                await asyncio.sleep(0.02)

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    assert ready.wait(30)
    try:
        yield box["state"], box["url"]
    finally:
        stop.set()
        thread.join()
        engine.close()


def test_stream_and_whole_answers_tool_history_balance_and_refusals(tmp_path):
    with running(tmp_path) as (state, url):
        key, secret = state.keys.create("ann", "t", training_consent=True)
        state.ledger.topup("ann", 10**9)
        client = openai.OpenAI(base_url=url, api_key=secret, max_retries=0)
        ask = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 20, "seed": 4}
        whole = client.chat.completions.create(**ask)
        streamed = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
        text = "".join(c.choices[0].delta.content or "" for c in streamed if c.choices)
        assert text == (whole.choices[0].message.content or "")
        assert whole.usage.completion_tokens == streamed[-1].usage.completion_tokens == 20
        node = state.traces.get(whole.trace["node"])
        assert node.sampled == 20 and node.exact and node.weights_versions == ((1, 20),) and node.consent
        assert state.ledger.balance("ann") < 10**9 and state.ledger.audit().sound

        history = [
            {"role": "user", "content": "add"},
            {"role": "assistant", "content": None, "tool_calls": [
                {"id": "call_x", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}]},
            {"role": "tool", "tool_call_id": "call_x", "content": "2"},
        ]  # fmt: skip
        tools = [{"type": "function", "function": {"name": "add", "description": "d", "parameters": {"type": "object"}}}]
        client.chat.completions.create(model=MODEL, messages=history, tools=tools, max_tokens=4)

        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=url, api_key="sk-wrong", max_retries=0).chat.completions.create(**ask)
        _, poor = state.keys.create("bob", "t")
        with pytest.raises(openai.RateLimitError) as empty:
            openai.OpenAI(base_url=url, api_key=poor).chat.completions.create(**ask)
        assert empty.value.type == "exceeded_current_quota_error"
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(**{**ask, "model": "gpt-0"})
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(**{**ask, "max_tokens": 10**6})
        assert [m.id for m in client.models.list()] == [MODEL]
