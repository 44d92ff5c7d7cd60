"""What a stream owes its reader: signs of life, an honest end, no more than it can take; and several answers at once."""

from __future__ import annotations

import asyncio
import json
import socket
from urllib.parse import urlsplit

import httpx2 as httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidelock.service.stops import StopFilter
from tidelock.tokens.message import Message, ToolCall
from tidelock.tokens.stops import StopFinder

BODIES = {
    "/chat/completions": {"model": "tide", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2000},
    "/responses": {"model": "tide", "input": "hi", "max_output_tokens": 2000},
    "/messages": {"model": "tide", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2000},
}


def post(service, path: str, body: dict, secret: str | None = None, **options) -> httpx.Response:
    headers = {"authorization": f"Bearer {secret or service.key()}"}
    return httpx.post(service.running.base_url + path, json=body, headers=headers, **options)


def usage_rows(service) -> list[dict]:
    return [dict(row) for row in service.state.ledger.db.read("SELECT * FROM usage")]


@pytest.mark.parametrize("path", BODIES)
def test_a_silent_engine_is_covered_by_keep_alives_before_and_between_tokens(service, path):
    service.state.keep_alive_s, service.policy.pause_s, service.policy.per_chunk = 0.03, 0.4, 20
    answer = post(service, path, {**BODIES[path], "stream": True})
    sign = "event: ping" if path == "/messages" else ": keep-alive"
    assert answer.text.startswith(sign) and answer.text.count(sign) >= 3
    assert answer.text.rstrip().endswith('{"type":"message_stop"}' if path == "/messages" else "[DONE]")


@pytest.mark.parametrize("path", BODIES)
def test_a_client_that_leaves_stops_the_sampling_and_pays_for_what_was_sampled(service, path):
    service.policy.turns = [Message("assistant", "word " * 300)]
    service.policy.per_chunk, service.policy.pause_s = 3, 0.005
    headers = {"authorization": f"Bearer {service.key()}"}
    with httpx.stream("POST", service.running.base_url + path, json={**BODIES[path], "stream": True}, headers=headers) as r:
        next(r.iter_raw())
    service.wait(lambda: service.state.traces.leaves())  # billed before it is traced
    (row,) = usage_rows(service)
    assert 0 < row["completion_tokens"] == len(service.policy.sampled[0]) < 300 and row["finish_reason"] == "abort"
    (leaf,) = service.state.traces.leaves()
    assert leaf.sampled == row["completion_tokens"]


def test_a_reader_that_stops_reading_is_taken_for_gone(service):
    service.state.stall_timeout_s, service.state.context_length = 0.3, 10**6
    service.policy.turns, service.policy.per_chunk = [Message("assistant", "word " * 60_000)], 1000
    url = urlsplit(service.running.base_url)
    body = json.dumps({**BODIES["/chat/completions"], "max_tokens": 900_000, "stream": True}).encode()
    secret = service.key(nano_usd=10**12)
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect((url.hostname, url.port))
        client.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + secret.encode()
            + b"\r\nContent-Length: " + str(len(body)).encode() + b"\r\n\r\n" + body
        )  # fmt: skip
        service.wait(lambda: usage_rows(service))
    (row,) = usage_rows(service)
    assert row["completion_tokens"] == sum(map(len, service.policy.sampled)) > 0


def test_tokens_that_come_fast_are_written_together(service):
    service.policy.turns, service.policy.per_chunk = [Message("assistant", "0123456789" * 150)], 1
    body = {**BODIES["/chat/completions"], "stream": True}
    headers = {"authorization": f"Bearer {service.key()}"}
    with httpx.stream("POST", service.running.base_url + "/chat/completions", json=body, headers=headers) as answer:
        lines = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {")]
    assert "".join(e["choices"][0]["delta"].get("content") or "" for e in lines) == "0123456789" * 150
    assert len(lines) < 500


@pytest.mark.parametrize("path", [*BODIES, "/files", "/messages/count_tokens", "/tokenizers/estimate-token-count"])
def test_a_body_that_is_too_large_is_413_and_not_held(service, path):
    service.state.max_body_bytes = 10_000
    body = b"x" * 20_000 if path != "/files" else b"x" * (101 << 20)
    secret = service.key()

    def pieces():
        yield body

    for content in (body, pieces()) if path != "/files" else (body,):
        headers = {"authorization": f"Bearer {secret}", "content-type": "application/json"}
        answer = httpx.post(service.running.base_url + path, content=content, headers=headers)
        assert answer.status_code == 413, answer.text


def test_every_answer_names_its_request_in_every_dialect(service):
    secret = service.key()
    answers = [post(service, path, body, secret) for path, body in BODIES.items()]
    answers += [post(service, path, {**body, "stream": True}, secret) for path, body in BODIES.items()]
    answers += [post(service, path, {}, secret) for path in BODIES] + [post(service, "/nothing", {}, secret)]
    ids = {tuple(a.headers[name] for name in ("x-request-id", "request-id", "msh-request-id")) for a in answers}
    assert len(ids) == len(answers) and all(len(set(same)) == 1 for same in ids)


def test_several_choices_are_sampled_from_one_prompt_that_is_billed_once(service):
    service.state.lenient = True
    service.policy.turns = [Message("assistant", text) for text in ("one", "two", "three")]
    body = {**BODIES["/chat/completions"], "n": 3, "seed": 5, "max_tokens": 100}
    whole = post(service, "/chat/completions", body).json()
    assert {c["message"]["content"] for c in whole["choices"]} == {"one", "two", "three"}
    assert [p.seed for p in service.policy.params] == [5, 6, 7]
    usage = whole["usage"]
    assert usage["prompt_tokens"] == len(service.policy.prompts[0])
    assert usage["completion_tokens"] == sum(map(len, service.policy.sampled))
    assert usage["cost_nano_usd"] == usage["prompt_tokens"] * 300 + usage["completion_tokens"] * 1500
    (row,) = usage_rows(service)
    assert row["completion_tokens"] == usage["completion_tokens"]
    parents = {service.state.traces.get(node).parent for node in whole["trace"]["nodes"]}
    assert len(parents) == 1 and len(set(whole["trace"]["nodes"])) == 3
    service.policy.prompts.clear()
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    streamed = post(service, "/chat/completions", body, service.key("bob"))
    chunks = [json.loads(line[6:]) for line in streamed.text.splitlines() if line.startswith("data: {")]
    texts, ends = {}, []
    for choice in (c for chunk in chunks for c in chunk["choices"]):
        texts[choice["index"]] = texts.get(choice["index"], "") + (choice["delta"].get("content") or "")
        ends += [choice["index"]] if choice["finish_reason"] else []
    assert sorted(texts.values()) == ["one", "three", "two"] and sorted(ends) == [0, 1, 2]
    assert chunks[-1]["usage"]["completion_tokens"] == usage["completion_tokens"]


def test_a_balance_that_does_not_cover_every_choice_is_refused(service):
    service.state.lenient = True
    body = {**BODIES["/chat/completions"], "n": 5}
    prompt = post(service, "/chat/completions", body).json()["usage"]["prompt_tokens"]
    answer = post(service, "/chat/completions", body, service.key("poor", nano_usd=prompt * 300 + 4 * 1500))
    assert answer.status_code == 429 and answer.headers["x-should-retry"] == "false"
    assert service.state.ledger.balance("poor") == prompt * 300 + 4 * 1500


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_join_to_the_text(service, stream):
    service.policy.turns, service.policy.per_chunk = [Message("assistant", "naïve ✓ ok", reasoning="é")], 3
    answer = post(service, "/chat/completions", {**BODIES["/chat/completions"], "logprobs": True, "stream": stream})
    if stream:
        chunks = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
        entries = [e for c in chunks for e in (c["choices"][0]["logprobs"] or {"content": []})["content"]]
    else:
        entries = answer.json()["choices"][0]["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in entries).decode() == "naïve ✓ ok"
    assert all(entry["logprob"] == -0.5 and entry["top_logprobs"] == [] for entry in entries)


def test_stop_strings_cut_what_is_seen_at_any_chunking_and_sampling_ends_there(service):
    service.policy.turns, secret = [Message("assistant", "a b STOP c", reasoning="r")], service.key()
    for per_chunk in (1, 2, 7, 100):
        service.policy.per_chunk = per_chunk
        body = {**BODIES["/chat/completions"], "stop": ["STOP", "zz"], "stream": True}
        answer = post(service, "/chat/completions", body, secret)
        chunks = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
        assert "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks) == "a b "
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    history = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a b ", "reasoning_content": "r"}]
    history.append({"role": "user", "content": "go on"})
    post(service, "/chat/completions", {**BODIES["/chat/completions"], "messages": history}, secret)
    asked = [(*p, *s) for p, s in zip(service.policy.prompts, service.policy.sampled, strict=True)]
    assert any(service.policy.prompts[-1][: len(ids)] == ids for ids in asked)


def test_the_filter_holds_back_only_what_might_become_a_stop_string():
    for stops, pieces, shown in [
        (["abc"], ["xa", "b", "d"], ["x", "", "abd"]),
        (["abc"], ["aab", "c"], ["a", ""]),
        (["b", "ab"], ["xab"], ["x"]),
        ([], ["any"], ["any"]),
    ]:
        stop = StopFilter(stops)
        assert [stop.feed(piece) for piece in pieces] == shown


@given(
    st.text("abc", max_size=12),
    st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=3),
    st.lists(st.integers(0, 12), max_size=5),
)
def test_the_filter_and_the_engine_find_the_same_stop_in_any_pieces(text, stops, cuts):
    finder, found = StopFinder(stops), None
    for end, character in enumerate(text, 1):
        if found := finder.feed(character.encode()):
            break
    stop, edges = StopFilter(stops), sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    shown = "".join(stop.feed(text[a:b]) for a, b in zip(edges, edges[1:], strict=False)) + stop.finish()
    assert stop.found == found and shown == (text[: end - len(found)] if found else text)


def test_a_stop_string_in_the_reasoning_stops_nothing(service):
    """Neither here nor in the engine: a stop is about what the client was going to show."""
    service.policy.turns = [Message("assistant", "an answer", reasoning="to STOP or not")]
    body = {**BODIES["/chat/completions"], "stop": ["STOP"]}
    said = post(service, "/chat/completions", body, service.key()).json()["choices"][0]["message"]
    assert (said["reasoning_content"], said["content"]) == ("to STOP or not", "an answer")
    prompt = service.policy.prompts[-1]
    reader, finder = service.policy.template.text_reader(prompt), StopFinder(["STOP"])
    assert not any(finder.feed(reader(token)) for token in service.policy.sampled[-1])


@pytest.mark.parametrize("template", ["chatml"], indirect=True)
def test_a_call_that_says_only_a_number_is_understood_by_the_tools_declared(service):
    """K2's bare call ids name no tool; which one takes these arguments, the declarations say."""
    call = ToolCall("functions.look:0", "look", {"where": "here"})
    ids = service.policy.template.sampled(Message("assistant", "", tool_calls=(call,)))
    whole, bare = map(service.policy.template.tokenizer.encode, (call.id, "0"))
    at = next(n for n in range(len(ids)) if ids[n : n + len(whole)] == whole)
    service.policy.literal = [*ids[:at], *bare, *ids[at + len(whole) :]]
    tools = [{"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {field: {}}, "required": [field],
              "additionalProperties": False}}} for name, field in (("add", "a"), ("look", "where"))]  # fmt: skip
    body = {**BODIES["/chat/completions"], "tools": tools}
    calls = post(service, "/chat/completions", body, service.key()).json()["choices"][0]["message"]["tool_calls"]
    assert [call["function"]["name"] for call in calls] == ["look"]


def test_a_hundred_streams_at_once_each_get_their_own(service):
    service.policy.pause_s = 0.001
    secret = service.key(nano_usd=10**12)

    async def one(http, n: int) -> str:
        body = {**BODIES["/chat/completions"], "stream": True, "max_tokens": 50, "metadata": {"session_id": str(n)}}
        answer = await http.post(service.running.base_url + "/chat/completions", json=body, timeout=30)
        return answer.text

    async def all_of_them() -> list[str]:
        headers = {"authorization": f"Bearer {secret}"}
        async with httpx.AsyncClient(headers=headers, limits=httpx.Limits(max_connections=100)) as http:
            return await asyncio.gather(*(one(http, n) for n in range(100)))

    assert all("[DONE]" in text for text in asyncio.run(all_of_them()))
    assert len(usage_rows(service)) == 100


@pytest.mark.parametrize("tokens", [1, 2, 3, 30])
def test_money_that_ends_before_there_was_anything_to_show_is_not_taken(service, tokens):
    """The first tokens of an answer may be marks of its form. Who is refused with a plain error has paid nothing; who was
    sent the beginning of an answer has paid for that."""
    service.policy.turns, service.policy.per_chunk = [Message("assistant", "word " * 60)], 1
    body = {**BODIES["/chat/completions"], "stream": True, "max_tokens": 400}
    post(service, "/chat/completions", {**body, "max_tokens": 1, "stream": False})
    prompt = usage_rows(service)[0]["prompt_tokens"]
    secret = service.key("bob", nano_usd=prompt * 300 + tokens * 1500)
    answer = post(service, "/chat/completions", body, secret)
    rows = [row for row in usage_rows(service) if row["customer"] == "bob"]
    if answer.status_code == 200:
        assert tokens == 30 and "insufficient_quota" in answer.text and rows[0]["completion_tokens"] == tokens
    else:
        assert answer.status_code == 429 and tokens < 30 and not rows
        service.wait(lambda: service.state.ledger.balance("bob") == prompt * 300 + tokens * 1500)


@pytest.mark.parametrize("template", ["xtml", "chatml"], indirect=True)
def test_a_chunk_says_one_thing_however_much_was_sampled_at_once(service):
    """LlamaIndex reads the first tool call of a chunk and no other; others read either the thought or the content."""
    calls = tuple(ToolCall(f"functions.lookup:{n}", "lookup", {"key": str(n)}) for n in range(3))
    service.policy.turns, service.policy.per_chunk = [Message("assistant", "looking", "let me see", calls)], 10_000
    tools = [{"type": "function", "function": {"name": "lookup", "parameters": {"type": "object"}}}]
    asked = {**BODIES["/chat/completions"], "tools": tools, "logprobs": True, "stream": True}
    chunks = list(service.client().chat.completions.create(**asked))
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    said = [[d.content, getattr(d, "reasoning_content", None), *(d.tool_calls or ())] for d in deltas]
    assert max(sum(map(bool, things)) for things in said) == 1
    found = [call for delta in deltas for call in delta.tool_calls or ()]
    assert [call.id for call in found if call.id] == [call.id for call in calls]
    for n in range(3):
        assert json.loads("".join(call.function.arguments for call in found if call.index == n)) == {"key": str(n)}
    assert "".join(d.content or "" for d in deltas) == "looking"
    tokens = [token for chunk in chunks for c in chunk.choices for token in (c.logprobs.content if c.logprobs else ())]
    assert "".join(token.token for token in tokens) == "looking"
