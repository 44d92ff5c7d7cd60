"""The official client against a real model: what it sees, what is stored and what is charged are one thing."""

import asyncio
import contextlib
import json
import threading

import anthropic
import jsonschema
import openai
import pytest

from tidelock.engine import Engine, Limits
from tidelock.loop.rundir import MODEL, PRICES
from tidelock.models import TransformerLM, preset
from tidelock.service.server import serving
from tidelock.service.state import open_state
from tidelock.tokens.template import get_template
from tidelock.tokens.tokenizer import ByteTokenizer


@contextlib.contextmanager
def running(tmp_path, **limits):
    """A server on a free port with an untrained nano model over byte tokens; yields (state, base_url)."""
    template = get_template("xtml", ByteTokenizer())
    engine = Engine(TransformerLM(preset("nano-k3", 288), seed=0), 1, boundary_id=template.stop_ids[0], template=template,
                    limits=Limits(**limits))  # fmt: skip
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


PARAMETERS = {
    "type": "object",
    "properties": {"unit": {"type": "string", "enum": ["c", "f"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9},
                   "at": {"type": "object", "properties": {"lat": {"type": "boolean"}}, "required": ["lat"], "additionalProperties": False}},
    "required": ["unit", "days", "at"],
    "additionalProperties": False,
}  # fmt: skip


def test_forced_calls_and_formats_hold_on_every_surface_streamed_and_not(tmp_path):
    with running(tmp_path) as (state, url):
        state.lenient = True
        _, secret = state.keys.create("ann", "t")
        state.ledger.topup("ann", 10**12)
        client = openai.OpenAI(base_url=url, api_key=secret, max_retries=0)
        claude = anthropic.Anthropic(base_url=url.removesuffix("/v1"), api_key=secret, max_retries=0)
        user = [{"role": "user", "content": "weather?"}]
        off = {"thinking": {"type": "disabled"}}
        function = {"name": "weather", "description": "d", "parameters": PARAMETERS}
        tools = [{"type": "function", "function": function}]
        checker = jsonschema.Draft202012Validator(PARAMETERS)

        for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
            chat = {"model": MODEL, "messages": user, "tools": tools, "tool_choice": choice, "extra_body": off}
            chat |= {"max_tokens": 900, "parallel_tool_calls": False}  # untrained weights would call and call
            for seed in range(2):
                said = client.chat.completions.create(**chat, seed=seed).choices[0]
                assert said.finish_reason == "tool_calls" and said.message.tool_calls
                for call in said.message.tool_calls:
                    assert call.function.name == "weather"
                    checker.validate(json.loads(call.function.arguments))
                pieces: dict[int, str] = {}
                for chunk in client.chat.completions.create(**chat, seed=seed, stream=True):
                    for part in chunk.choices[0].delta.tool_calls or []:
                        pieces[part.index] = pieces.get(part.index, "") + (part.function.arguments or "")
                streamed = [json.loads(text) for text in pieces.values()]
                assert streamed == [json.loads(call.function.arguments) for call in said.message.tool_calls]

        answer = client.responses.create(
            model=MODEL, input="weather?", tools=[{"type": "function", **function, "strict": True}], tool_choice="required",
            reasoning={"effort": "none"}, max_output_tokens=900, parallel_tool_calls=False,
        )  # fmt: skip
        for item in answer.output:
            checker.validate(json.loads(item.arguments))
        message = claude.messages.create(
            model=MODEL, max_tokens=900, messages=user, tool_choice={"type": "tool", "name": "weather"}, thinking={"type": "disabled"},
            tools=[{"name": "weather", "input_schema": PARAMETERS}],
        )  # fmt: skip
        assert message.stop_reason == "tool_use" and len(message.content) == 1
        checker.validate(message.content[0].input)

        schema = {"name": "w", "schema": PARAMETERS, "strict": True}
        chat = {"model": MODEL, "messages": user, "extra_body": off, "max_tokens": 200}
        formatted = client.chat.completions.create(**chat, response_format={"type": "json_schema", "json_schema": schema})
        assert formatted.choices[0].finish_reason == "stop"
        checker.validate(json.loads(formatted.choices[0].message.content))
        silent = client.chat.completions.create(**chat, tools=tools, tool_choice="none").choices[0]
        assert not silent.message.tool_calls
        node = state.traces.get(formatted.trace["node"])
        assert node.message.verbatim is None and node.exact  # the form a template writes, held to by construction

        with pytest.raises(openai.BadRequestError):
            bad = {"name": "w", "schema": {"$ref": "#/nowhere"}}
            client.chat.completions.create(**chat, response_format={"type": "json_schema", "json_schema": bad})
        assert state.ledger.audit().sound
