"""Whatever goes wrong on the other side is one `PolicyError` with a status and a line of words."""

import asyncio
import json
import socket
from contextlib import asynccontextmanager

import pytest
import torch
from aiohttp import web
from policies import TEMPLATE, engine_of

from tidelock.remote import TextPolicy, TokenPolicy
from tidelock.tokens.policy import PolicyError, SamplingParams

PROMPT = TEMPLATE.render([], generation_prompt=True)
PARAMS = SamplingParams(max_tokens=8, temperature=0.0)


def choice(ids=(65,), finish=None, **fields):
    content = [{"token_id": i, "logprob": -1.0, "top_logprobs": []} for i in ids]
    return {"index": 0, "token_ids": list(ids), "finish_reason": finish, "logprobs": {"content": content}, **fields}


def tokens_event(*args, **fields):
    return {"request_id": "r", "choices": [choice(*args, **fields)]}


def text_event(text="a", finish=None):
    return {"id": "c", "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish}]}


GOOD = {"tokens": tokens_event, "text": text_event}


@asynccontextmanager
async def site(**handlers):
    """The port of a server that answers POSTs to /NAME with the handler of that name, and any other with `rest`."""
    app = web.Application()
    rest = handlers.pop("rest", None) or refused(404, "nothing here")
    for name, handler in handlers.items():
        app.router.add_post("/inference/v1/" + name, handler)
    app.router.add_post("/{path:.*}", rest)
    runner = web.AppRunner(app)
    await runner.setup()
    listener = web.TCPSite(runner, "127.0.0.1", 0)
    await listener.start()
    try:
        yield listener._server.sockets[0].getsockname()[1]
    finally:
        await runner.cleanup()


def policy_at(kind, port):
    url = f"http://127.0.0.1:{port}"
    return TokenPolicy(url, "k") if kind == "tokens" else TextPolicy(f"{url}/v1", "k", "m", TEMPLATE)


def ask(kind, handler=None, port=None, params=PARAMS):
    """Every chunk of one answer from a server that answers with `handler`."""

    async def inside():
        async with site(rest=handler) as bound:
            return [c async for c in policy_at(kind, port or bound).generate(PROMPT, params)]

    return asyncio.run(asyncio.wait_for(inside(), 20))


def stream(*lines, cut=False):
    async def handler(request):
        response = web.StreamResponse()
        await response.prepare(request)
        for line in lines:
            await response.write(line if isinstance(line, bytes) else b"data: " + json.dumps(line).encode() + b"\n\n")
        if cut:
            request.transport.abort()
        return response

    return handler


def refused(status, body):
    async def handler(request):
        return web.Response(status=status, text=body if isinstance(body, str) else json.dumps(body))

    return handler


def closed_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


FAULTS = {
    "the connection is refused": (lambda good: dict(port=closed_port()), 502),
    "too many requests": (lambda good: dict(handler=refused(429, {"error": {"message": "later", "type": "rate_limit"}})), 429),
    "a page of HTML": (lambda good: dict(handler=refused(503, "<html>\nbusy")), 503),
    "paused, in vLLM's words": (lambda good: dict(handler=refused(503, {"error": "the engine is paused"})), 503),
    "cut in mid-stream": (lambda good: dict(handler=stream(good(), cut=True)), 502),
    "ended without a reason": (lambda good: dict(handler=stream(good(), b"data: [DONE]\n\n")), 502),
    "not JSON": (lambda good: dict(handler=stream(b"data: {oops\n\n")), 502),
    "JSON of another kind": (lambda good: dict(handler=stream(b"data: [1, 2]\n\n")), 502),
    "choices that are none": (lambda good: dict(handler=stream({"choices": [7]})), 502),
    "an error event": (lambda good: dict(handler=stream(good(), {"error": {"message": "no", "code": 507}})), 507),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", GOOD)
def test_a_broken_server(kind, fault):
    options, status = FAULTS[fault]
    with pytest.raises(PolicyError) as e:
        ask(kind, **options(GOOD[kind]))
    assert e.value.status == status and str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("broken", [
    choice((65,), "stop", logprobs=None), choice((65, 66), "stop", logprobs=choice((65,))["logprobs"]),
    choice((65,), "stop", token_ids="A"), choice((65,), "stop", token_ids=[None]), choice((65,), "content_filter"),
    choice((65,), "stop", weight_versions=[{"version": "1"}]), choice((65,), "stop", sampling_mask=[3]),
])  # fmt: skip
def test_an_answer_whose_numbers_do_not_fit_together_is_no_answer(broken):
    with pytest.raises(PolicyError) as e:
        ask("tokens", stream({"choices": [broken]}, b"data: [DONE]\n\n"))
    assert e.value.status == 502


def test_a_server_that_says_versions_at_the_end_is_waited_for_and_split_there():
    spans = [{"version": "3", "start": 0, "end": 3}, {"version": "step-4", "start": 3, "end": 5}]
    events = [tokens_event((1, 2)), tokens_event((3, 4)), tokens_event((5,), "stop", weight_versions=spans, stop_reason=5),
              {"choices": [], "usage": {"prompt_tokens_details": {"cached_tokens": 2}}}]  # fmt: skip
    chunks = ask("tokens", stream(*events, b"data: [DONE]\n\n"))
    assert [(c.ids, c.weights_version, c.finish_reason) for c in chunks] == [
        ((1, 2), 3, None), ((3,), 3, None), ((4,), -1, None), ((5,), -1, "stop")]  # fmt: skip
    assert chunks[-1].cached_tokens == 2 and chunks[-1].stop is None


def test_kept_sets_and_candidates_come_through():
    content = [{"token_id": 7, "logprob": -3.0, "rank": 4, "top_logprobs": [
        {"token_id": 7, "logprob": -3.0}, {"token_id": 1, "logprob": -0.5}, {"token_id": 2, "logprob": -1.5}]}]
    event = tokens_event((7,), "stop", logprobs={"content": content}, sampling_mask=[[7, 1]], stop_reason="end",
                         sampled_logprobs=[-0.7], weight_versions=[{"version": "1", "start": 0, "end": 1}])  # fmt: skip
    (chunk,) = ask("tokens", stream(event), params=SamplingParams(max_tokens=4, top_logprobs=2))
    assert chunk.top_logprobs == (((1, -0.5), (2, -1.5)),) and chunk.kept == ((7, 1),)
    assert (chunk.sampled_logprobs, chunk.logprobs, chunk.stop) == ((-0.7,), (-3.0,), "end")


@pytest.mark.parametrize("kind", GOOD)
def test_a_request_is_aborted_also_before_its_first_word(kind):
    async def inside():
        over = asyncio.Event()

        async def silent(request):
            await over.wait()
            return web.Response()

        async with site(rest=silent, abort_requests=refused(200, {"aborted": 0})) as port:
            policy = policy_at(kind, port)

            async def answer():
                return [c async for c in policy.generate(PROMPT, PARAMS, "x")]

            waiting = asyncio.create_task(answer())
            await asyncio.sleep(0.2)
            await policy.abort("x")
            (chunk,) = await asyncio.wait_for(waiting, 5)
            over.set()
        return chunk

    assert asyncio.run(asyncio.wait_for(inside(), 10)).finish_reason == "abort"


def test_an_event_of_a_megabyte_is_one_line():
    event = tokens_event((1,), "length", routed_experts=None, padding="x" * 1_000_000)
    assert ask("tokens", stream(event))[-1].finish_reason == "length"


def test_the_engines_own_failures_look_the_same():
    async def one(engine, params=PARAMS):
        return [c async for c in engine.generate(PROMPT, params)]

    engine = engine_of()
    engine.close()
    with pytest.raises(PolicyError):
        asyncio.run(one(engine))
    engine = engine_of(queue=0)
    with pytest.raises(PolicyError) as full:
        asyncio.run(one(engine))
    assert full.value.status == 429
    engine.close()
    from tidelock.engine import Engine
    from tidelock.models import TransformerLM, preset

    broken = TransformerLM(preset("nano-k3", 288), seed=0)
    engine = Engine(broken)
    with torch.no_grad():
        broken.norm.weight.fill_(float("nan"))
    with pytest.raises(PolicyError) as nan:
        asyncio.run(one(engine))
    assert nan.value.status == 500
    engine.close()


def test_vllms_empty_answer_to_an_abort_is_an_answer():
    async def inside():
        async with site(abort_requests=refused(200, "")) as port:
            await policy_at("tokens", port).abort("x")

    asyncio.run(asyncio.wait_for(inside(), 10))
