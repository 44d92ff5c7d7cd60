"""Message Batches through Anthropic's own client: answered by the worker of all batches, at the batch price."""

from __future__ import annotations

import json

import anthropic
import httpx2 as httpx
import pytest

from tidelock.service import batch_worker
from tidelock.tokens.message import Message

MESSAGES = [{"role": "user", "content": "hi"}]


def ask(name: str, **changes) -> dict:
    return {"custom_id": name, "params": {"model": "tide", "max_tokens": 500, "messages": MESSAGES, **changes}}


@pytest.fixture(params=["", "/anthropic"])
def client(request, service):
    root = service.running.base_url.removesuffix("/v1") + request.param
    return anthropic.Anthropic(base_url=root, api_key=service.key())


def ended(service, client, batch_id: str):
    service.wait(lambda: client.messages.batches.retrieve(batch_id).processing_status == "ended")
    return client.messages.batches.retrieve(batch_id)


def test_every_request_gets_its_result_and_is_charged_half(service, client):
    live = client.messages.create(model="tide", max_tokens=500, messages=MESSAGES)
    before = service.state.ledger.balance("ann")
    asked = [ask("a"), ask("b", model="other"), ask("c", max_tokens=0), ask("d", stream=True), ask("e")]
    made = client.messages.batches.create(requests=asked)
    assert made.processing_status == "in_progress" and made.results_url is None and made.request_counts.processing == 5
    batch = ended(service, client, made.id)
    assert batch.request_counts.model_dump() == {"processing": 0, "succeeded": 2, "errored": 3, "canceled": 0, "expired": 0}
    results = {line.custom_id: line.result for line in client.messages.batches.results(batch.id)}
    assert list(results) == ["a", "b", "c", "d", "e"]
    assert [results[name].message.content for name in "ae"] == [live.content] * 2
    assert [results[name].error.error.type for name in "bcd"] == ["not_found_error", *["invalid_request_error"] * 2]
    charged = sum(results[name].message.usage.cost_nano_usd for name in "ae")
    assert charged == before - service.state.ledger.balance("ann") == live.usage.cost_nano_usd


def test_lines_end_where_lines_end_and_not_within_a_string(service, client):
    odd = "a\u2028b\x85c\x0bd"
    service.policy.turns = [Message("assistant", odd)]
    made = client.messages.batches.create(requests=[ask(odd, messages=[{"role": "user", "content": odd}]), ask("b")])
    batch = ended(service, client, made.id)
    raw = httpx.get(batch.results_url, headers={"x-api-key": client.api_key}).content
    parsed = [json.loads(line) for line in raw.splitlines()]
    assert [line["custom_id"] for line in parsed] == [odd, "b"]
    assert all(line["result"]["message"]["content"][0]["text"] == odd for line in parsed)
    kimi, body = service.client(client.api_key), {"model": "tide", "messages": [{"role": "user", "content": odd}]}
    line = json.dumps({"custom_id": odd, "method": "POST", "url": "/v1/chat/completions", "body": body}, ensure_ascii=False)
    file = kimi.files.create(file=("in.jsonl", line.encode() + b"\r\n"), purpose="batch")
    batch = kimi.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    service.wait(lambda: kimi.batches.retrieve(batch.id).status in ("completed", "failed"))
    assert kimi.batches.retrieve(batch.id).request_counts.completed == 1


def test_batches_are_listed_both_ways_and_files_and_other_batches_do_not_show(service, client):
    made = [client.messages.batches.create(requests=[ask("a")]).id for _ in range(4)]
    for batch_id in made:
        ended(service, client, batch_id)
    newest_first = made[::-1]
    assert [b.id for b in client.messages.batches.list(limit=3)] == newest_first  # pages follow one another
    assert [b.id for b in client.messages.batches.list(before_id=made[1], limit=1).data] == [made[2]]
    assert [b.id for b in client.messages.batches.list(after_id=made[2]).data] == newest_first[2:]
    with pytest.raises(anthropic.BadRequestError, match="limit"):
        client.messages.batches.list(limit=0)
    kimi = service.client()
    assert not kimi.batches.list().data and not kimi.files.list().data


def test_a_cancelled_batch_tells_what_was_not_begun_and_deletes_with_its_files(service, client):
    service.policy.pause_s = 1.0  # so that on the slowest machine most have not begun when it is cancelled
    made = client.messages.batches.create(requests=[ask(str(n)) for n in range(200)])
    with pytest.raises(anthropic.BadRequestError, match="has not ended"):
        client.messages.batches.delete(made.id)
    assert client.messages.batches.cancel(made.id).processing_status in ("canceling", "ended")
    service.policy.pause_s = 0.0
    batch = ended(service, client, made.id)
    assert batch.cancel_initiated_at is not None and batch.request_counts.canceled > 0
    kinds = [line.result.type for line in client.messages.batches.results(batch.id)]
    assert len(kinds) == 200 and kinds.count("canceled") == batch.request_counts.canceled
    assert client.messages.batches.cancel(batch.id).processing_status == "ended"
    assert client.messages.batches.delete(batch.id).type == "message_batch_deleted"
    assert not list(service.state.files.iterdir())
    with pytest.raises(anthropic.NotFoundError):
        client.messages.batches.retrieve(batch.id)


def test_a_batch_that_is_cancelled_while_its_lines_are_read_answers_none_of_them(service, client, monkeypatch):
    read = batch_worker._Batch._lines

    def and_cancel(batch, doc):
        lines = read(batch, doc)
        client.messages.batches.cancel(batch.id)
        return lines

    monkeypatch.setattr(batch_worker._Batch, "_lines", and_cancel)
    made = client.messages.batches.create(requests=[ask("a"), ask("b")])
    assert ended(service, client, made.id).request_counts.canceled == 2 and not service.policy.prompts


@pytest.mark.parametrize("requests", [[], [ask("a"), ask("a")], [{"custom_id": "", "params": {}}], [{"custom_id": "a"}]])
def test_a_batch_outside_the_rules_is_400(client, requests):
    with pytest.raises(anthropic.BadRequestError):
        client.messages.batches.create(requests=requests)
