"""A text endpoint behind the Policy interface: deltas in any shape, errors in one line."""

import asyncio
import json

import pytest
from aiohttp import web

from tidelock.agent import TextPolicy
from tidelock.tokens.message import Message, ToolCall, ToolSpec
from tidelock.tokens.policy import PolicyError, SamplingParams
from tidelock.tokens.template import get_template
from tidelock.tokens.tokenizer import ByteTokenizer

TEMPLATE = get_template("xtml", ByteTokenizer())
HISTORY = [
    Message("system", "s", tools=(ToolSpec("f", "d", {"type": "object"}),)),
    Message("user", "q"),
    Message("assistant", "", "hm", (ToolCall("functions.f:0", "f", {"x": 1}),)),
    Message("tool", "r", tool_call_id="functions.f:0", name="f"),
]


def delta(finish=None, **fields):
    return {"id": "c1", "choices": [{"index": 0, "delta": fields, "finish_reason": finish}]}


def part(index, **fields):
    call_id = fields.pop("id", None)
    return {"index": index, "function": fields, **({"id": call_id} if call_id else {})}


def ask(events=(), status=200, body=None, port=None):
    """Run one completion against a server that sends `events`; returns (message, last, what the server was sent)."""
    seen = {}

    async def handler(request):
        seen.update(await request.json(), authorization=request.headers["Authorization"])
        if status != 200:
            return web.json_response(body, status=status) if isinstance(body, dict) else web.Response(text=body, status=status)
        response = web.StreamResponse()
        await response.prepare(request)
        for event in events:
            await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        return response

    async def inside():
        app = web.Application()
        app.router.add_post("/v1/chat/completions", handler)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        bound = port or site._server.sockets[0].getsockname()[1]
        policy = TextPolicy(f"http://127.0.0.1:{bound}/v1", "sk-x", "m", TEMPLATE, {"session_id": "s"})
        try:
            parser, prompt = TEMPLATE.parser(1), TEMPLATE.render(HISTORY, generation_prompt=True)
            async for chunk in policy.generate(prompt, SamplingParams(max_tokens=9, temperature=0.5, seed=3)):
                parser.feed(chunk.ids)
                assert chunk.finish_reason and chunk.weights_version == -1 and not policy.exact
            return parser.finish(), policy.last, seen
        finally:
            await runner.cleanup()

    return asyncio.run(asyncio.wait_for(inside(), 20))


def test_the_endpoint_sees_the_conversation_and_we_see_its_answer():
    events = [delta(role="assistant", content=""), delta(reasoning_content="so"), delta(content="fo"), delta(content="ur"),
              delta("stop"), {"id": "c1", "choices": [], "usage": {"total_tokens": 5}, "trace": {"node": "n"}}]  # fmt: skip
    message, last, sent = ask(events)
    assert (message.reasoning, message.content) == ("so", "four")
    assert last == {"id": "c1", "usage": {"total_tokens": 5}, "trace": {"node": "n"}}
    assert [m["role"] for m in sent["messages"]] == ["system", "user", "assistant", "tool"]
    assert sent["messages"][2]["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"x": 1}'}
    assert sent["messages"][2]["reasoning_content"] == "hm" and sent["messages"][3]["tool_call_id"] == "functions.f:0"
    assert sent["tools"][0]["function"]["name"] == "f" and sent["authorization"] == "Bearer sk-x"
    assert (sent["max_tokens"], sent["temperature"], sent["seed"], sent["metadata"]) == (9, 0.5, 3, {"session_id": "s"})


def test_calls_split_over_deltas_are_put_together():
    events = [delta(tool_calls=[part(0, id="a", name="f", arguments='{"x"'), part(1, id="b", name="g", arguments="")]),
              delta(tool_calls=[part(0, arguments=": [1, 2]}")]), delta("tool_calls")]  # fmt: skip
    message, _, _ = ask(events)
    assert [(c.id, c.name, c.arguments) for c in message.tool_calls] == [
        ("functions.f:1", "f", {"x": [1, 2]}), ("functions.g:2", "g", {})]  # fmt: skip


@pytest.mark.parametrize("options,status,words", [
    ({"status": 401, "body": {"error": {"message": "bad key", "type": "invalid_authentication_error"}}}, 401, "bad key"),
    ({"status": 500, "body": "<html>oops"}, 500, "oops"),
    ({"events": [delta(content="a"), {"error": {"message": "out of money", "type": "x"}}]}, 500, "out of money"),
    ({"events": [delta(content="a")]}, 502, "without a finish reason"),
    ({"port": 1}, 502, "127.0.0.1"),
])  # fmt: skip
def test_whatever_goes_wrong_is_one_policy_error(options, status, words):
    with pytest.raises(PolicyError, match=words) as e:
        ask(**options)
    assert e.value.status == status and "\n" not in str(e.value)
