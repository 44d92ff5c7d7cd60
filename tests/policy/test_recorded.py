"""What real servers really sent (`data/SERVER-VERSION.WHAT.txt`: status and content type, then the body as it came), read by
our policies. Recorded with a random model of a few million weights, five tokens an answer."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web

from tidelock.remote import TextPolicy, TokenPolicy, tokens
from tidelock.service.answer import Sample
from tidelock.service.upstreams import faults
from tidelock.tokens.message import Message
from tidelock.tokens.policy import Chunk, PolicyError, Reported, SamplingParams
from tidelock.tokens.template import get_template
from tidelock.tokens.tokenizer import ByteTokenizer

DATA = Path(__file__).parent / "data"
TEMPLATE = get_template("xtml", ByteTokenizer())
PROMPT = TEMPLATE.render([Message("user", "how many tides")], generation_prompt=True)


def recorded(what: str) -> tuple[int, str, bytes]:
    head, _, body = (DATA / f"{what}.txt").read_bytes().partition(b"\n")
    _, status, kind = head.decode().split(" ", 2)
    return int(status), kind.strip(), body


@contextlib.asynccontextmanager
async def playing(what: str, piece: int = 1 << 20, **others) -> AsyncIterator[tuple[str, list]]:
    """(root URL, what was asked) of a server that plays the recording in pieces of so many bytes; `others` by path."""
    asked: list[tuple[str, dict | None]] = []
    status, kind, body = recorded(what)

    async def answer(request: web.Request) -> web.StreamResponse:
        text = await request.text()
        asked.append((request.path_qs, json.loads(text) if text else None))
        if request.path in others:
            return web.Response(body=recorded(others[request.path])[2] if others[request.path] else b"", status=200)
        response = web.StreamResponse(status=status, headers={"content-type": kind})
        await response.prepare(request)
        for start in range(0, len(body), piece):
            await response.write(body[start : start + piece])
        if "hold" in others:
            await asyncio.sleep(30)
        return response

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}", asked
    finally:
        await runner.cleanup()


def run(work):
    return asyncio.run(asyncio.wait_for(work, 30))


def read(what: str, policy_of, params=SamplingParams(max_tokens=200), piece: int = 1 << 20) -> list[Chunk]:
    async def work():
        async with playing(what, piece) as (url, _):
            return [c async for c in policy_of(url).generate(PROMPT, params, "r1")]

    return run(work())


def vllm(url: str, **options) -> TokenPolicy:
    return TokenPolicy(url, "k", dialect="vllm", **options)


def chat(url: str) -> TextPolicy:
    return TextPolicy(url + "/v1", "k", "m", TEMPLATE, metered=True)


def refused(what: str, policy_of) -> PolicyError:
    with pytest.raises(PolicyError) as error:
        read(what, policy_of)
    return error.value


# -- vLLM's token routes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("piece", [1 << 20, 7])
@pytest.mark.parametrize("wait", [True, False])
def test_vllm_s_stream_of_tokens(piece, wait):
    chunks = read("vllm-0.32.0.tokens", lambda url: vllm(url, await_versions=wait), piece=piece)
    ids = [i for c in chunks for i in c.ids]
    assert len(ids) == 6 == sum(len(c.logprobs) for c in chunks) and all(p < 0 for c in chunks for p in c.logprobs)
    assert chunks[-1].finish_reason == "length" and chunks[-1].reported == Reported(4, 6, 0)
    sample = Sample()
    for chunk in chunks:
        sample.add(chunk)
    assert sample.versions == [(-1, 6)]  # it calls its first weights "default", which is no number


@pytest.mark.parametrize("said,versions", [
    (b'"version":"7","start":0,"end":6', [(7, 6)]),
    (b'"version":"7","start":0,"end":1000000', [(7, 6)]),  # a server that says so of every token to come
    (b'"version":"7","start":2,"end":6', [(-1, 5), (7, 1)]),  # not of all: then what each part said stands
    (b'"version":"7","start":0,"end":-3', [(-1, 6)]),
    (b'"version":"default","start":0,"end":6', [(-1, 6)]),
])  # fmt: skip
def test_versions_that_are_told_at_the_end_are_those_of_what_was_handed_on_before(monkeypatch, tmp_path, said, versions):
    text = (DATA / "vllm-0.32.0.tokens.txt").read_bytes()
    assert b'"version":"default","start":0,"end":6' in text
    (tmp_path / "x.txt").write_bytes(text.replace(b'"version":"default","start":0,"end":6', said))
    monkeypatch.setattr(__import__(__name__), "DATA", tmp_path)
    sample = Sample()
    for chunk in read("x", lambda url: vllm(url, await_versions=False)):
        sample.add(chunk)
    assert sample.versions == versions and len(sample.ids) == 6


@pytest.mark.parametrize("what", ["tokens-bad-id", "tokens-too-long"])
def test_vllm_refuses_a_prompt_in_a_stream_that_has_begun_and_it_is_the_request_s_own_fault(what):
    error = refused(f"vllm-0.32.0.{what}", vllm)
    assert error.status == 400 and faults.own_fault(error) and "127.0.0.1" not in str(faults.told(error))


def test_vllm_ends_an_aborted_stream_with_abort_and_says_nothing_to_who_aborted():
    chunks = read("vllm-0.32.0.tokens-aborted", lambda url: vllm(url, await_versions=False))
    assert chunks[-1].finish_reason == "abort" and chunks[-1].ids == ()
    assert recorded("vllm-0.32.0.abort") == (200, "", b"")


def test_an_abort_that_vllm_may_not_have_understood_ends_with_hanging_up(monkeypatch):
    """It says 200 and nothing else, whether it knew the request or not."""
    monkeypatch.setattr(tokens, "ABORTED_WITHIN_S", 0.2)

    async def work():
        others = {"/inference/v1/abort_requests": "vllm-0.32.0.abort", "hold": ""}
        async with playing("vllm-0.32.0.tokens-aborted", **others) as (url, _):
            policy = vllm(url)
            policy._server._parsed = lambda lines, parsed=policy._server._parsed: ([], None)  # nothing is heard of it
            stream = policy.generate(PROMPT, SamplingParams(max_tokens=9), "r1")
            first = asyncio.create_task(anext(aiter(stream)))
            await asyncio.sleep(0.1)
            await policy.abort("r1")
            return await asyncio.wait_for(first, 2)

    assert run(work()).finish_reason == "abort"


def test_vllm_knows_no_deadline_so_we_hang_up_on_it():
    async def work():
        async with playing("vllm-0.32.0.tokens", hold="") as (url, asked):
            policy = vllm(url, await_versions=False)
            policy._server._parsed = _only(policy._server._parsed, 3)
            chunks = [c async for c in policy.generate(PROMPT, SamplingParams(max_tokens=9, deadline_s=0.3), "r1")]
            return chunks

    chunks = run(work())
    assert chunks[-1].finish_reason == "deadline" and 0 < sum(len(c.ids) for c in chunks)


def _only(parsed, most):
    """Of the events the first few: the rest of the answer is still on its way."""
    def some(lines):
        events, failure = parsed(lines)
        return events[:most], failure
    return some


def test_stop_strings_stay_with_who_reads_the_answer_where_that_is_asked_for():
    """vLLM looks for them in the thought too, and would end the turn there."""

    async def work(**options):
        async with playing("vllm-0.32.0.tokens") as (url, asked):
            async for _ in vllm(url, **options).generate(PROMPT, SamplingParams(max_tokens=9, stop=("x",))):
                pass
            return asked[0][1]["sampling_params"]

    assert run(work())["stop"] == ["x"] and "stop" not in run(work(stops=False))


def test_weights_are_loaded_between_a_pause_and_a_resume_and_a_path_without_any_is_not_tried(tmp_path):
    """A path that is none ends vLLM's workers and with them the server."""
    (tmp_path / "good").mkdir()
    (tmp_path / "good" / "model.safetensors").touch()

    async def work(checkpoint):
        others = dict.fromkeys(["/pause", "/collective_rpc", "/reset_prefix_cache", "/update_weight_version", "/resume"], "")
        async with playing("vllm-0.32.0.abort", **others) as (url, asked):
            with contextlib.suppress(PolicyError):
                await vllm(url).swap(str(tmp_path / checkpoint), 7)
            return asked

    asked = run(work("good"))
    assert [path for path, _ in asked] == ["/pause?mode=wait", "/collective_rpc", "/reset_prefix_cache",
                                           "/update_weight_version", "/resume"]  # fmt: skip
    assert asked[1][1] == {"method": "reload_weights", "kwargs": {"weights_path": str(tmp_path / "good")}}
    assert asked[3][1] == {"new_version": "7"} and run(work("nowhere")) == []


def test_a_vllm_that_takes_no_weights_says_how_to_start_one_that_does(tmp_path):
    (tmp_path / "model.safetensors").touch()

    async def work():
        async with playing("vllm-0.32.0.tokens-no-model") as (url, _):  # 404, as every route outside of development mode
            await vllm(url).swap(str(tmp_path), 7)

    with pytest.raises(PolicyError, match="VLLM_SERVER_DEV_MODE=1") as error:
        run(work())
    assert error.value.status == 400


# -- text -------------------------------------------------------------------------------------------------------------

TEXT = ["vllm-0.32.0", "llama.cpp-0c1e570", "sglang-0.5.23"]


@pytest.mark.parametrize("piece", [1 << 20, 7])
@pytest.mark.parametrize("server", TEXT)
def test_a_stream_of_text_with_its_usage(server, piece):
    chunks = read(f"{server}.chat", chat, piece=piece)
    assert chunks[-1].finish_reason == "length" and chunks[-1].reported.completion_tokens == 5
    assert chunks[-1].reported.prompt_tokens > 0 and sum(len(c.ids) for c in chunks) > 0


def test_of_its_own_times_each_tells_what_it_tells():
    assert read("vllm-0.32.0.chat", chat)[-1].times.queued_s >= 0 and read("vllm-0.32.0.chat", chat)[-1].times.prefill_s > 0
    told = read("llama.cpp-0c1e570.chat", chat)[-1].times
    assert told.queued_s is None and told.prefill_s > 0 and told.decode_s > 0


def test_what_was_cached_is_told():
    assert read("llama.cpp-0c1e570.chat-again", chat)[-1].cached_tokens > 50


@pytest.mark.parametrize("what", [f"{server}.chat-too-long" for server in TEXT] + ["vllm-0.32.0.chat-bad"])
def test_a_request_that_is_wrong_is_its_own_fault(what):
    error = refused(what, chat)
    assert error.status == 400 and faults.own_fault(error) and error.quoted and len(str(error)) > 20


def test_a_model_that_is_not_there_is_the_operator_s_fault():
    error = refused("vllm-0.32.0.chat-no-model", chat)
    assert error.status == 404 and not faults.own_fault(error) and "other" not in str(faults.told(error))
