"""A text endpoint behind the Policy interface: deltas in any shape, handed on as they come; errors in one line."""

import asyncio
import json
import time

import pytest
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st

from tidelock.remote import TextPolicy, text
from tidelock.remote.rendering import Form, Rendering
from tidelock.tokens.directives import response_format, thinking_effort, tool_choice
from tidelock.tokens.message import Message, ToolCall, ToolSpec
from tidelock.tokens.policy import Constraint, PolicyError, Reported, SamplingParams
from tidelock.tokens.template import canonical, get_template
from tidelock.tokens.tokenizer import BPETokenizer, ByteTokenizer

TEMPLATE = get_template("xtml", ByteTokenizer())
BPE = BPETokenizer.train(["the tides and the moon, the tide and the sea"] * 3, 320)
TEMPLATES = [TEMPLATE, get_template("xtml", BPE), get_template("xtml", BPE, thinking=False), get_template("chatml", BPE),
             get_template("chatml", ByteTokenizer()), get_template("k2-thinking", BPE), get_template("k2", BPE)]  # fmt: skip
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
            chunks, parser, prompt = [], TEMPLATE.parser(1), TEMPLATE.render(HISTORY, generation_prompt=True)
            async for chunk in policy.generate(prompt, SamplingParams(max_tokens=9, temperature=0.5, seed=3)):
                parser.feed(chunk.ids)
                chunks.append(chunk)
                assert chunk.weights_version == -1 and not policy.exact
            assert [c.finish_reason is not None for c in chunks] == [False] * (len(chunks) - 1) + [True]
            return parser.finish(), policy.last, seen, chunks
        finally:
            await runner.cleanup()

    return asyncio.run(asyncio.wait_for(inside(), 20))


def test_the_endpoint_sees_the_conversation_and_we_see_its_answer():
    events = [delta(role="assistant", content=""), delta(reasoning_content="so"), delta(content="fo"), delta(content="ur"),
              delta("stop"), {"id": "c1", "choices": [], "usage": {"total_tokens": 5}, "trace": {"node": "n"}}]  # fmt: skip
    message, last, sent, chunks = ask(events)
    assert (message.reasoning, message.content) == ("so", "four")
    assert 1 <= len(chunks) <= 4 and chunks[-1].reported == Reported()  # what came together is handed on together
    assert last == {"id": "c1", "usage": {"total_tokens": 5}, "trace": {"node": "n"}}
    assert [m["role"] for m in sent["messages"]] == ["system", "user", "assistant", "tool"]
    assert sent["messages"][2]["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"x": 1}'}
    assert sent["messages"][2]["reasoning_content"] == "hm" and sent["messages"][3]["tool_call_id"] == "functions.f:0"
    assert sent["tools"][0]["function"]["name"] == "f" and sent["authorization"] == "Bearer sk-x"
    assert (sent["max_tokens"], sent["temperature"], sent["seed"], sent["metadata"]) == (9, 0.5, 3, {"session_id": "s"})


def test_calls_split_over_deltas_are_put_together():
    events = [delta(tool_calls=[part(0, id="a", name="f", arguments='{"x"'), part(1, id="b", name="g", arguments="")]),
              delta(tool_calls=[part(0, arguments=": [1, 2]}")]), delta("tool_calls")]  # fmt: skip
    message, _, _, _ = ask(events)
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


TEXTS = st.text(st.characters(codec="utf-8"), max_size=12)
VALUES = st.none() | st.booleans() | st.integers(-9, 9) | TEXTS | st.lists(st.integers(0, 9), max_size=2)
CALLS = st.lists(st.dictionaries(st.sampled_from("abc"), VALUES, max_size=3), max_size=2)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(TEMPLATES), TEXTS, TEXTS, CALLS, st.randoms(use_true_random=False))
def test_a_turn_rendered_piece_by_piece_reads_as_the_turn_it_was(template, reasoning, content, calls, rng):
    said = canonical([Message("assistant", content, reasoning, tuple(ToolCall("", "fn", c) for c in calls))])[0]
    turn, ids = Rendering(Form(template)), []
    for kind, text in (("reasoning", reasoning), ("content", content)):
        while text:
            n = rng.randint(1, len(text))
            ids += turn.say(kind, text[:n])
            text = text[n:]
    ids += turn.end(said.tool_calls)
    parser = template.parser()
    parser.feed(ids)
    read = parser.finish()
    assert (read.content, read.tool_calls) == (said.content, said.tool_calls)
    assert read.reasoning == (reasoning if Form(template).thinks else "")
    if template.tokenizer.identity == "bytes" and Form(template).thinks:  # pieces of bytes are the whole's bytes
        assert ids == template.sampled(said) and read.verbatim is None


def test_reasoning_that_comes_after_the_answer_began_is_left_out():
    turn = Rendering(Form(TEMPLATE))
    first = turn.say("content", "a")
    assert turn.say("reasoning", "late") == [] and first + turn.say("content", "b") + turn.end() == TEMPLATE.sampled(
        Message("assistant", "ab"))  # fmt: skip


def generate(handler_events, params, policy_options=(), prompt=None, template=TEMPLATE):
    async def inside():
        seen = {}

        async def handler(request):
            seen.update(await request.json())
            response = web.StreamResponse()
            await response.prepare(request)
            for event in handler_events:
                if isinstance(event, float):  # a pause
                    await asyncio.sleep(event)
                    continue
                await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
            return response

        app = web.Application()
        app.router.add_post("/chat/completions", handler)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        try:
            policy = TextPolicy(f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}", "k", "m", template,
                                **dict(policy_options))  # fmt: skip
            began = time.monotonic()
            chunks = [c async for c in policy.generate(prompt or PROMPT, params)]
            return chunks, {**seen, "took_s": time.monotonic() - began}
        finally:
            await runner.cleanup()

    return asyncio.run(asyncio.wait_for(inside(), 20))


PROMPT = TEMPLATE.render(HISTORY[:2], generation_prompt=True)


@pytest.mark.parametrize("most", [1, 3, 30, 31, 32, 60, 200])
def test_a_metered_answer_is_never_longer_than_asked_and_says_so(most):
    usage = {"choices": [], "usage": {"completion_tokens": 2}}
    events = [delta(content="abc"), delta(content="defgh"), delta("stop"), usage]
    chunks, _ = generate(events, SamplingParams(max_tokens=most), {"metered": True})
    ids = [i for c in chunks for i in c.ids]
    whole = TEMPLATE.sampled(Message("assistant", "abcdefgh"))
    fits = len(whole) - len(Rendering(Form(TEMPLATE), "content").end())
    assert len(ids) <= most and whole[: len(ids)] == ids
    assert chunks[-1].finish_reason == ("stop" if most >= fits else "length")
    assert (ids == whole) == (most >= len(whole))


def test_an_answer_that_was_begun_goes_on_where_the_server_can_and_is_refused_where_not():
    begun = [*PROMPT, *Rendering(Form(TEMPLATE)).say("content", "Once")]
    events = [delta(content=" upon"), delta("stop")]
    chunks, sent = generate(events, SamplingParams(), {"dialect": "kimi"}, begun)
    assert sent["messages"][-1] == {"role": "assistant", "content": "Once", "partial": True}
    whole = [*begun[len(PROMPT) :], *(i for c in chunks for i in c.ids)]
    assert whole == TEMPLATE.sampled(Message("assistant", "Once upon"))
    with pytest.raises(PolicyError, match="begun answer") as e:
        generate(events, SamplingParams(), {}, begun)
    assert e.value.status == 400
    for raw in ([1, 2, 3], [1, *TEMPLATE.generation_prompt()]):  # ids of no conversation
        with pytest.raises(PolicyError) as e:
            generate(events, SamplingParams(), {}, raw)
        assert e.value.status == 400
    quiet = [*PROMPT, *Rendering(Form(TEMPLATE)).say("content", "x")[:-1]]  # no thought, please
    assert generate(events, SamplingParams(), {"dialect": "kimi"}, quiet)[1]["thinking"] == {"type": "disabled"}
    assert "thinking" not in generate(events, SamplingParams(), {}, quiet)[1]


def test_what_a_text_endpoint_cannot_be_held_to_is_refused_and_effort_is_passed_on():
    with pytest.raises(PolicyError) as e:
        generate([], SamplingParams(constraint=Constraint("regex", "a")))
    assert e.value.status == 400
    prompt = TEMPLATE.render([thinking_effort("low"), Message("user", "q")], generation_prompt=True)
    _, sent = generate([delta(content="a"), delta("stop")], SamplingParams(), {}, prompt)
    assert sent["reasoning_effort"] == "low" and [m["role"] for m in sent["messages"]] == ["user"]


def test_a_format_and_a_tool_choice_go_as_parameters_and_never_as_our_words():
    held, events = SamplingParams(constraint=Constraint("lark", "start: x")), [delta(content="a"), delta("stop")]
    tools = (ToolSpec("f", "", {}), ToolSpec("g", "", {}))
    talk = [Message("system", tools=tools), Message("user", "q")]
    for said, options, wanted in (
        ([tool_choice("required")], {}, {"tool_choice": "required"}),
        ([tool_choice("none"), response_format()], {}, {"tool_choice": "none", "response_format": {"type": "json_object"}}),
        ([tool_choice("g")], {}, {"tool_choice": {"type": "function", "function": {"name": "g"}}}),
        ([tool_choice("g")], {"dialect": "kimi"}, {"tool_choice": "required", "tools": [tools[1].openai()]}),
    ):
        _, sent = generate(events, held, options, TEMPLATE.render([*talk, *said], generation_prompt=True))
        assert wanted.items() <= sent.items() and [m["role"] for m in sent["messages"]] == ["user"]


def test_a_connection_lost_after_the_finish_reason_loses_the_usage_and_nothing_else():
    chunks, _ = generate([delta(content="a"), delta("stop")], SamplingParams())
    assert chunks[-1].finish_reason == "stop" and chunks[-1].reported is None


def test_arguments_that_are_no_json_are_passed_on_as_what_they_are():
    message, _, _, _ = ask([delta(tool_calls=[part(0, id="a", name="f", arguments='{"x": tr')]), delta("tool_calls")])
    assert message.tool_calls[0].arguments == {"unreadable_arguments": '{"x": tr'}


@pytest.mark.parametrize("most", [1, 2, 5, 12, 200])
@pytest.mark.parametrize("template", TEMPLATES)
def test_an_answer_that_says_nothing_is_one_however_little_was_asked_for(template, most):
    """llama.cpp's server, whose model ended its turn at once: no ids at all would be taken for an answer that broke off."""
    events = [delta(role="assistant", content=None), delta("stop"), {"choices": [], "usage": {"completion_tokens": 1}}]
    prompt = template.render(HISTORY[:2], generation_prompt=True)
    chunks, _ = generate(events, SamplingParams(max_tokens=most), {"metered": True}, prompt, template)
    ids = [i for c in chunks for i in c.ids]
    assert 1 <= len(ids) <= most and chunks[-1].finish_reason == "stop" and chunks[-1].reported.completion_tokens == 1
    parser = template.parser()
    parser.feed(ids)
    read = parser.finish()
    assert (read.content, read.reasoning, read.tool_calls) == ("", "", ())


def test_an_answer_that_is_cut_by_our_count_still_brings_the_servers_usage():
    """A server with longer tokens than ours says 3 where we count 60: what it cached must not be billed as read anew."""
    usage = {"prompt_tokens": 9, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 8}}
    events = [delta(content="tides and moons " * 3), 0.05, delta(content="and seas"), delta("length"),
              {"choices": [], "usage": usage, "metrics": {"queue_time_ms": 7.0}}]  # fmt: skip
    chunks, _ = generate(events, SamplingParams(max_tokens=20), {"metered": True})
    last = chunks[-1]
    assert sum(len(c.ids) for c in chunks) == 20 and last.finish_reason == "length" and last.cached_tokens == 8
    assert last.reported == Reported(9, 3, 8) and last.times.queued_s == 0.007


def test_a_cut_answer_does_not_wait_long_for_a_server_that_goes_on(monkeypatch):
    monkeypatch.setattr(text, "USAGE_WITHIN_S", 0.2)
    events = [delta(content="tides " * 9), *[0.1] * 20, delta("stop")]
    chunks, seen = generate(events, SamplingParams(max_tokens=20), {"metered": True})
    assert seen["took_s"] < 1 and chunks[-1].finish_reason == "length" and chunks[-1].reported is None
