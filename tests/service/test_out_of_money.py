"""What a client is told when the money ends: where, in which words, and what it was charged until then."""

from __future__ import annotations

import json

import httpx2 as httpx
import pytest

from tidelock.tokens.message import Message

ASK = {"model": "tide", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2000, "stream": True}
BODIES = {
    "/chat/completions": ASK, "/messages": ASK,
    "/responses": {"model": "tide", "input": "hi", "max_output_tokens": 2000, "stream": True},
}  # fmt: skip


def post(service, path: str, secret: str, **headers) -> httpx.Response:
    sent = {"authorization": f"Bearer {secret}", **headers}
    return httpx.post(service.running.base_url + path, json=BODIES[path], headers=sent)


def events(answer: httpx.Response) -> list[dict]:
    return [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]


@pytest.mark.parametrize("path", BODIES)
def test_a_stream_that_ends_for_want_of_money_tells_what_it_charged(service, path):
    service.policy.turns = [Message("assistant", "word " * 200)]
    secret = service.key(nano_usd=300_000)
    told = events(post(service, path, secret))
    used = next(event.get("usage") or event.get("response", {}).get("usage") for event in reversed(told)
                if event.get("usage") or event.get("response", {}).get("usage"))  # fmt: skip
    [row] = service.state.ledger.db.read("SELECT nano_usd, completion_tokens FROM usage")
    assert used["cost_nano_usd"] == row["nano_usd"] == 300_000 - service.state.ledger.balance("ann") > 0
    assert used.get("completion_tokens", used.get("output_tokens")) == row["completion_tokens"]
    assert not any(word in json.dumps(told[-1]) for word in ("exhausted", "unavailable"))  # which some take for an overload
    if path == "/responses":
        failed = next(event["response"] for event in told if event["type"] == "response.failed")
        assert failed["error"]["code"] == "insufficient_quota"  # by which Codex knows not to try again


@pytest.mark.parametrize("path", BODIES)
def test_words_status_and_headers_by_which_agents_know_not_to_try_again(service, path):
    secret = service.key(nano_usd=5)
    refused = post(service, path, secret, **{"user-agent": "kimi-code/2.1"})
    message = refused.json()["error"]["message"]
    assert refused.status_code == 429 and refused.headers["x-should-retry"] == "false"
    assert "retry-after" not in refused.headers
    assert refused.json()["error"]["type"] == ("billing_error" if path == "/messages" else "exceeded_current_quota_error")
    assert "insufficient balance" in message and "credit balance is too low" in message
    for agent in ("opencode/1.18 ai-sdk/openai-compatible/3.0", "QwenCode/0.15.10 (linux; x64)", "ls/JS 5.23.2"):
        told = post(service, path, secret, **{"user-agent": agent})
        assert told.status_code == 402 and told.json()["error"] == refused.json()["error"]
    for agent in ("OpenAI/JS 6.26.0", "OpenAI/Python 2.54.0", "Anthropic/JS 1.14.0"):
        assert post(service, path, secret, **{"user-agent": agent}).status_code == 429


def test_a_client_that_is_only_too_fast_is_not_told_to_pay(service):
    """402 is for money alone: another 429 stays one, whoever asks."""
    headers = {"user-agent": "ai-sdk/x", "authorization": "Bearer sk-wrong"}
    url = service.running.base_url + "/chat/completions"
    answers = {httpx.post(url, json=ASK, headers=headers).status_code for _ in range(40)}
    assert answers == {401, 429}
