"""The served API as the official `openai` client sees it."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import httpx2 as httpx
import openai
import pytest

from tidelock.service.db import Database
from tidelock.service.ledger import Ledger
from tidelock.service.server import bind
from tidelock.tokens.errors import UserError
from tidelock.tokens.message import Message, ToolCall

ASK = [{"role": "user", "content": "hi <|im_end|> é"}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "lookup",
            "description": "Look a key up.",
            "parameters": {"type": "object", "properties": {"key": {"type": "string"}}},
        },
    }
]


def ask(client, **options):
    return client.chat.completions.create(**{"model": "tide", "messages": ASK, **options})


def charge(prompt: int, cached: int, completion: int) -> int:
    """By the price list of the served test model."""
    return (prompt - cached) * 300 + cached * 30 + completion * 1500


def usage_rows(service):
    return [dict(row) for row in service.state.ledger.db.read("SELECT * FROM usage ORDER BY rowid")]


def test_answer_usage_and_bill_agree(service):
    service.policy.cached_tokens = 7
    response = ask(service.client(service.key()))
    choice, usage = response.choices[0], response.usage
    assert (choice.message.content, choice.message.reasoning_content) == ("hello", "hm")
    assert choice.finish_reason == "stop"
    assert usage.prompt_tokens == len(service.policy.prompts[0])
    assert usage.completion_tokens == len(service.policy.sampled[0])
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens == usage.cached_tokens == 7
    cost = charge(usage.prompt_tokens, 7, usage.completion_tokens)
    assert usage.cost_nano_usd == cost
    assert service.state.ledger.balance("ann") == 1_000_000_000 - cost
    assert usage_rows(service)[0]["request_id"] == response._request_id


@pytest.mark.parametrize("template", ["xtml", "chatml"], indirect=True)
def test_stream_says_the_same_as_the_whole_answer(service):
    call = ToolCall("functions.lookup:0", "lookup", {"key": 'a "b" <|sep|>\n', "n": [1, {"x": None}]})
    service.policy.turns = [Message("assistant", "looking", reasoning="let me see", tool_calls=(call, call))]
    client = service.client()
    whole = ask(client, tools=TOOLS, max_tokens=2000).choices[0].message
    text = {"content": "", "reasoning_content": ""}
    calls: dict[int, dict] = {}
    chunks = list(ask(client, tools=TOOLS, max_tokens=2000, stream=True, stream_options={"include_usage": True}))
    for chunk in chunks[:-1]:
        delta = chunk.choices[0].delta
        for field in text:
            text[field] += getattr(delta, field, None) or ""
        for part in delta.tool_calls or []:
            known = calls.setdefault(part.index, {"id": part.id, "name": part.function.name, "arguments": ""})
            known["arguments"] += part.function.arguments or ""
    assert text == {"content": whole.content, "reasoning_content": whole.reasoning_content}
    assert [(c["id"], c["name"], json.loads(c["arguments"])) for c in calls.values()] == [
        (c.id, c.function.name, json.loads(c.function.arguments)) for c in whole.tool_calls
    ]
    assert chunks[-2].choices[0].finish_reason == "tool_calls"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == len(service.policy.sampled[1])
    assert chunks[-2].choices[0].usage["completion_tokens"] == chunks[-1].usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-2].trace == chunks[-1].trace
    assert service.state.traces.get(chunks[-1].trace["node"]) is not None


@pytest.mark.parametrize("template", ["xtml", "chatml"], indirect=True)
def test_a_tool_round_trip_extends_the_ids_that_were_sampled(service):
    call = ToolCall("functions.lookup:0", "lookup", {"key": "k"})
    service.policy.turns = [Message("assistant", reasoning="I look", tool_calls=(call,)), Message("assistant", "42")]
    client = service.client()
    options = {"tools": TOOLS, "extra_body": {"metadata": {"session_id": "s1", "sandbox_level": "landlock-7"}}}
    first = ask(client, **options)
    assert first.choices[0].finish_reason == "tool_calls" and first.choices[0].message.content is None
    said = first.choices[0].message
    messages = [*ASK, said.model_dump(), {"role": "tool", "tool_call_id": said.tool_calls[0].id, "content": "42"}]
    second = ask(client, messages=messages, **options)
    assert second.choices[0].message.content == "42"
    first_ids = (*service.policy.prompts[0], *service.policy.sampled[0])
    assert service.policy.prompts[1][: len(first_ids)] == first_ids
    traces = service.state.traces
    node = second.trace["node"]
    assert tuple(traces.ids(node)) == (*service.policy.prompts[1], *service.policy.sampled[1])
    path = traces.path(node)
    assert list(traces.ids(node)) == service.state.template.render([step.message for step in path])
    assert [n.message.role for n in path] == ["system", "user", "assistant", "tool", "assistant"]
    assert first.trace["node"] == path[2].id
    answer = path[-1]
    assert answer.sampled == len(answer.logprobs) == sum(n for _, n in answer.weights_versions)
    assert answer.sandbox == "landlock-7" and answer.scope.endswith("/s1") and answer.exact
    assert answer.template == service.state.template.hash


def test_a_client_that_sends_other_text_does_not_get_the_stored_ids(service):
    client = service.client()
    ask(client)
    changed = [*ASK, {"role": "assistant", "content": "goodbye"}, {"role": "user", "content": "?"}]
    ask(client, messages=changed)
    first_ids = (*service.policy.prompts[0], *service.policy.sampled[0])
    assert service.policy.prompts[1][: len(first_ids)] != first_ids


def test_sessions_and_keys_do_not_share_traces(service):
    secrets = [service.key(), service.key(), service.key("bob")]
    nodes = {ask(service.client(secret)).trace["node"] for secret in secrets}
    nodes.add(ask(service.client(secrets[0]), extra_body={"metadata": {"session_id": "other"}}).trace["node"])
    assert len(nodes) == 4


def test_a_wrong_key_is_401(service):
    with pytest.raises(openai.AuthenticationError) as caught:
        ask(service.client("sk-wrong"))
    assert caught.value.type == "invalid_authentication_error" and service.policy.prompts == []


def test_a_revoked_key_is_401_at_once(service):
    secret = service.key()
    client = service.client(secret)
    ask(client)
    service.state.keys.revoke(service.state.keys.list()[0].id)
    with pytest.raises(openai.AuthenticationError):
        ask(client)


def test_an_empty_balance_is_429_without_retries_or_sampling(service):
    with pytest.raises(openai.RateLimitError) as caught:
        ask(service.client(service.key(nano_usd=0)))
    assert caught.value.type == "exceeded_current_quota_error"
    assert caught.value.response.headers["x-should-retry"] == "false"
    assert caught.value.response.request.headers["x-stainless-retry-count"] == "0"
    assert service.policy.prompts == [] and usage_rows(service) == []


def test_a_small_balance_shortens_the_answer_to_what_it_covers(service):
    service.policy.turns = [Message("assistant", "x" * 500)]
    prompt = ask(service.client()).usage.prompt_tokens
    secret = service.key("bob", nano_usd=charge(prompt, 0, 40) + 7)
    response = ask(service.client(secret), max_tokens=400)
    assert response.usage.completion_tokens == 40 and response.choices[0].finish_reason == "length"
    assert service.state.ledger.balance("bob") == 7


def test_a_stream_stops_where_the_money_ends_with_a_defined_error_and_an_exact_bill(service):
    service.policy.turns = [Message("assistant", "x" * 900)]
    prompt = ask(service.client()).usage.prompt_tokens
    secret = service.key("bob", nano_usd=charge(prompt, 0, 333) + 7)
    body = {"model": "tide", "messages": ASK, "stream": True, "max_tokens": 800}
    response = httpx.post(
        service.running.base_url + "/chat/completions", json=body, headers={"authorization": f"Bearer {secret}"}
    )
    events = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
    said = "".join(event["choices"][0]["delta"].get("content") or "" for event in events[:-1])
    error = events[-1]["error"]
    assert (error["type"], error["code"]) == ("exceeded_current_quota_error", "insufficient_quota")
    assert "[DONE]" not in response.text and "x" * 300 in said
    row = usage_rows(service)[-1]
    assert (row["customer"], row["completion_tokens"]) == ("bob", 333) and service.state.ledger.balance("bob") == 7


def test_concurrent_requests_on_a_small_balance_never_overspend(service):
    service.policy.turns, service.policy.pause_s = [Message("assistant", "x" * 60)], 0.002
    secret = service.key(nano_usd=2_000_000)

    async def burst() -> list:
        client = service.async_client(secret)
        sessions = [{"metadata": {"session_id": str(n)}} for n in range(25)]
        calls = [ask(client, max_tokens=200, extra_body=session) for session in sessions]
        return await asyncio.gather(*calls, return_exceptions=True)

    results = asyncio.run(burst())
    refused = [result for result in results if isinstance(result, openai.RateLimitError)]
    answered = [result for result in results if not isinstance(result, BaseException)]
    assert refused and answered and len(refused) + len(answered) == 25
    spent = sum(result.usage.cost_nano_usd for result in answered)
    assert spent == 2_000_000 - service.state.ledger.balance("ann") <= 2_000_000
    assert len(usage_rows(service)) == len(answered)


def test_a_client_that_leaves_mid_stream_pays_exactly_the_sampled_tokens(service):
    service.policy.turns = [Message("assistant", "word " * 300)]
    service.policy.per_chunk, service.policy.pause_s = 3, 0.01
    stream = ask(service.client(), stream=True, max_tokens=2000)
    for _ in range(4):
        next(iter(stream))
    stream.close()
    service.wait(lambda: service.state.traces.leaves())
    (row,) = usage_rows(service)
    assert row["completion_tokens"] == len(service.policy.sampled[0]) < 300
    assert row["nano_usd"] == charge(row["prompt_tokens"], 0, row["completion_tokens"])
    assert row["finish_reason"] == "abort"
    (leaf,) = service.state.traces.leaves()
    leaf = leaf if isinstance(leaf, str) else leaf.id
    assert service.state.traces.get(leaf).sampled == row["completion_tokens"]


def test_a_client_that_leaves_a_whole_answer_does_not_keep_the_engine_busy(service):
    service.policy.turns = [Message("assistant", "word " * 300)]
    service.policy.per_chunk, service.policy.pause_s = 3, 0.01
    with pytest.raises(openai.APITimeoutError):
        ask(service.client(timeout=0.2, max_retries=0), max_tokens=2000)
    service.wait(lambda: usage_rows(service))
    assert usage_rows(service)[0]["completion_tokens"] == len(service.policy.sampled[0]) < 300
    assert len(service.policy.aborted) == 1


def test_a_failure_before_the_first_token_is_a_plain_error_and_free(service):
    service.policy.fail_after = 0
    for stream in (False, True):
        with pytest.raises(openai.InternalServerError) as caught:
            ask(service.client(service.key("cy"), max_retries=0), stream=stream)
        assert caught.value.status_code == 503 and caught.value.type == "engine_overloaded_error"
        assert caught.value.response.headers["retry-after"] == "1"
    assert service.state.ledger.balance("cy") == 2_000_000_000 and usage_rows(service) == []


def test_a_failure_mid_stream_is_an_error_event_and_bills_what_was_sent(service):
    service.policy.fail_after = 2
    secret = service.key()
    body = {"model": "tide", "messages": ASK, "stream": True}
    response = httpx.post(
        service.running.base_url + "/chat/completions", json=body, headers={"authorization": f"Bearer {secret}"}
    )
    events = [line for line in response.text.splitlines() if line]
    assert json.loads(events[-1].removeprefix("data: "))["error"]["type"] == "engine_overloaded_error"
    assert "[DONE]" not in response.text
    assert usage_rows(service)[0]["completion_tokens"] == len(service.policy.sampled[0]) == 10
    with pytest.raises(openai.APIError, match="the engine is full"):
        list(ask(service.client(secret), stream=True))


def test_a_failure_of_a_whole_answer_is_free(service):
    service.policy.fail_after = 2
    with pytest.raises(openai.InternalServerError):
        ask(service.client(max_retries=0))
    assert service.state.ledger.balance("ann") == 1_000_000_000
    assert service.state.traces.leaves() == []


BAD_FIELDS = [
    ("temperature", 3),
    ("top_p", 0),
    ("n", 2),
    ("max_tokens", 0),
    ("max_tokens", 5000),
    ("stop", ["x" * 33]),
    ("tool_choice", "required"),
    ("tools", [{"type": "function", "function": {"name": "1 bad"}}]),
    ("tools", TOOLS * 2),
    ("messages", []),
    ("messages", [{"role": "wizard", "content": "x"}]),
    ("messages", [{"role": "user"}]),
    ("messages", [{"role": "user", "content": "x" * 5000}]),
    ("messages", [*ASK, {"role": "assistant", "content": "x"}]),
    ("messages", [*ASK, {"role": "tool", "content": "x"}]),
    ("messages", [*ASK, {"role": "tool", "content": "x", "tool_call_id": "functions.lookup:0"}]),
]


def test_a_bad_field_is_400_and_named(service):
    client = service.client()
    for field, value in BAD_FIELDS:
        with pytest.raises(openai.BadRequestError) as caught:
            ask(client, **{field: value})
        assert caught.value.type == "invalid_request_error" and caught.value.param.startswith(field)
    assert service.policy.prompts == []


def test_a_body_that_is_no_json_is_400_and_an_unknown_route_404(service):
    headers = {"authorization": f"Bearer {service.key()}"}
    url = service.running.base_url
    assert httpx.post(url + "/chat/completions", content=b"{", headers=headers).status_code == 400
    missing = httpx.get(url + "/nothing")
    assert (missing.status_code, missing.json()["error"]["type"]) == (404, "resource_not_found_error")


def test_an_unknown_model_is_404(service):
    with pytest.raises(openai.NotFoundError) as caught:
        ask(service.client(), model="other")
    assert caught.value.type == "resource_not_found_error"


def test_consent_is_recorded_on_every_node(service):
    secret = service.key(training_consent=True)
    for n, (said, expected) in enumerate([(None, (True, "key")), ("false", (False, "request"))]):
        metadata = {"session_id": str(n)} | ({"training_consent": said} if said else {})
        node = ask(service.client(secret), extra_body={"metadata": metadata}).trace["node"]
        assert {(step.consent, step.consent_source) for step in service.state.traces.path(node)} == {expected}


def test_feedback_reaches_only_the_own_answers_and_repeats_do_nothing(service):
    secret = service.key()
    node = ask(service.client(secret)).trace["node"]
    url = service.running.base_url + "/feedback"
    body = {"node": node, "success": True, "reward": 1.0, "source": "user"}

    def give(key, **changes):
        return httpx.post(url, json={**body, **changes}, headers={"authorization": f"Bearer {key}"})

    assert give(secret).json()["recorded"] is True
    assert give(secret).json()["recorded"] is False
    (outcome,) = service.state.traces.outcomes(node)
    assert (outcome.success, outcome.reward, outcome.source) == (True, 1.0, "user")
    assert give(service.key("bob")).status_code == 404
    assert give(secret, node="none").status_code == 404
    assert give(secret, reward="much").json()["error"]["param"] == "reward"


def test_models_and_balance(service):
    secret = service.key(nano_usd=1_500_000_001)
    (model,) = service.client(secret).models.list().data
    assert (model.id, model.context_length) == ("tide", 4096)
    response = httpx.get(
        service.running.base_url + "/users/me/balance", headers={"authorization": f"Bearer {secret}"}
    )
    assert '"available_balance":1.500000001' in response.text
    service.state.ledger.grant("ann", 2_000_000_000, lot="welcome")
    data = httpx.get(service.running.base_url + "/users/me/balance", headers={"authorization": f"Bearer {secret}"}).json()["data"]
    assert (data["available_balance"], data["voucher_balance"], data["cash_balance"]) == (3.500000001, 2.0, 1.500000001)
    assert httpx.get(service.running.base_url + "/models").status_code == 401


def test_only_an_admin_swaps_weights_and_health_tells_the_version(service):
    root = service.running.base_url.removesuffix("/v1")
    admin, user = service.key("root", role="admin"), service.key()

    def swap(key, checkpoint):
        body = {"checkpoint": checkpoint, "version": 2}
        return httpx.post(root + "/admin/weights", json=body, headers={"authorization": f"Bearer {key}"}).status_code

    assert swap(user, "ckpt") == 403
    assert swap(admin, "missing") == 400
    assert httpx.get(root + "/health").json()["weights_version"] == 1
    assert swap(admin, "ckpt") == 200
    assert httpx.get(root + "/health").json() == {
        "status": "ok",
        "model": "tide",
        "weights_version": 2,
        "exact": True,
    }
    node = ask(service.client(user)).trace["node"]
    assert {version for version, _ in service.state.traces.get(node).weights_versions} == {2}


KILLED_SERVER = """
import asyncio, sys
from scripted import PRICE, ScriptedPolicy
from tidelock.service.prices import PriceBook
from tidelock.service.server import serving
from tidelock.service.state import open_state
from tidelock.tokens.message import Message
from tidelock.tokens.template import get_template
from tidelock.tokens.tokenizer import ByteTokenizer

async def main():
    template = get_template("xtml", ByteTokenizer())
    policy = ScriptedPolicy(template, [Message("assistant", "word " * 300)], per_chunk=3, pause_s=0.01)
    state = open_state(sys.argv[1], policy=policy, template=template, prices=PriceBook("v1", {"tide": PRICE}),
                       model="tide", context_length=4096, weights_version=1)
    secret = sys.argv[2] if len(sys.argv) > 2 else state.keys.create("ann")[1]
    state.ledger.topup("ann", 10_000_000, "only-once")
    async with serving(state) as running:
        print(running.base_url, secret, state.ledger.balance("ann"), flush=True)
        await running.task

asyncio.run(main())
"""


def test_kill_9_mid_stream_is_settled_for_what_is_known_to_have_been_sent(tmp_path):
    def start(*secret: str) -> tuple[subprocess.Popen, list[str]]:
        command = [sys.executable, "-c", KILLED_SERVER, str(tmp_path), *secret]
        path = f"{Path(__file__).parent}:{Path(__file__).parents[2]}"
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path})
        return server, server.stdout.readline().split()

    server, (url, secret, balance) = start()
    assert balance == "10000000"
    stream = ask(openai.OpenAI(base_url=url, api_key=secret), stream=True, max_tokens=2000)
    next(iter(stream))
    server.kill()
    server.wait()
    with pytest.raises(openai.APIConnectionError):
        list(stream)
    ledger = Ledger(Database(tmp_path / "service.sqlite"))
    assert ledger.balance("ann") < 10_000_000 and ledger.audit().sound
    server, (_, _, balance) = start(secret)
    assert balance == "10000000" and ledger.audit().sound
    server.kill()
    server.wait()
    ledger.db.close()


def test_a_taken_port_is_one_clear_line():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match="cannot listen"):
            bind("127.0.0.1", taken.getsockname()[1])


def test_a_lenient_chat_offers_the_allowed_tools_and_no_others(service):
    tools = [{"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in ("lookup", "other")]
    allowed = {"mode": "auto", "tools": [{"type": "function", "function": {"name": "lookup"}}]}
    api = service.client(service.key(profile="lenient"), max_retries=0)
    asked = {"model": "tide", "messages": [{"role": "user", "content": "hi"}], "tools": tools}
    api.chat.completions.create(**asked, tool_choice={"type": "allowed_tools", "allowed_tools": allowed})
    assert "lookup" in (prompt := service.state.template.tokenizer.decode(service.policy.prompts[-1])) and "other" not in prompt
    with pytest.raises(openai.BadRequestError):
        api.chat.completions.create(**asked, tool_choice={"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [{}]}})


def test_a_completion_names_what_made_it_in_words_as_openai_s_document_has_it(service):
    """Where that has no null, nothing is null."""
    answer = service.client().chat.completions.create(model="tide", messages=[{"role": "user", "content": "hi"}])
    assert isinstance(answer.system_fingerprint, str) and answer.choices[0].message.annotations == []
    assert "user" not in service.client().responses.create(model="tide", input="hi").model_fields_set
