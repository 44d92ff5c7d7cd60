"""Laws of `Idempotency-Key`: one key is one request, answered alike, and never charged twice."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from urllib.parse import urlsplit

import httpx2 as httpx
import openai
import pytest

from tidelock.service.books import Admission, Metered
from tidelock.service.idempotency import AnswerLost, Idempotency, InFlight, KeyReused, Stored
from tidelock.service.ledger import Ledger
from tidelock.service.prices import Counts, Price, PriceBook
from tidelock.service.workers import Worker
from tidelock.tokens.message import Message

ASK = {"model": "tide", "messages": [{"role": "user", "content": "hi"}]}
PRICE = Price(300, 30, 1500)


def post(service, secret: str, name: str, **changes) -> httpx.Response:
    headers = {"authorization": f"Bearer {secret}", "idempotency-key": name}
    return httpx.post(service.running.base_url + "/chat/completions", json={**ASK, **changes}, headers=headers)


@pytest.mark.parametrize("stream", [False, True])
def test_the_same_request_again_gets_the_same_bytes_and_is_charged_once(service, stream):
    secret = service.key()
    first, again = (post(service, secret, "a", stream=stream) for _ in range(2))
    assert first.content == again.content and first.status_code == again.status_code == 200
    assert again.headers["x-request-id"] == first.headers["x-request-id"] and again.headers["idempotent-replayed"] == "true"
    assert again.headers["content-type"] == first.headers["content-type"]
    assert len(service.policy.prompts) == 1 and service.state.ledger.db.read("SELECT COUNT(*) FROM usage")[0][0] == 1
    other = post(service, secret, "a", stream=stream, max_tokens=7)
    assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_key_reused")
    assert post(service, service.key("bob"), "a", stream=stream).headers.get("idempotent-replayed") is None


def test_at_the_same_time_one_runs_and_the_others_are_told_so(service):
    secret = service.key()
    service.policy.pause_s = 0.2
    answers: list[httpx.Response] = []
    threads = [threading.Thread(target=lambda: answers.append(post(service, secret, "a"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answer.status_code for answer in answers) == [200, 409, 409, 409]
    assert {a.json()["error"]["code"] for a in answers if a.status_code == 409} == {"idempotency_key_in_use"}
    assert all(a.headers["x-should-retry"] == "true" for a in answers if a.status_code == 409)
    assert len(service.policy.prompts) == 1


def test_a_request_that_failed_for_free_may_be_tried_again_under_its_key(service):
    secret = service.key()
    service.policy.fail_after = 0
    assert post(service, secret, "a").status_code == 503
    service.policy.fail_after = None
    assert post(service, secret, "a").status_code == 200


def test_the_key_of_a_dead_server_runs_again_only_if_nothing_was_charged(db):
    now = [100.0]
    dead, alive = Worker(db), Worker(db)
    PriceBook("v1", {"m": PRICE}).register(db)
    ledger = Ledger(db, worker=dead.id)
    ledger.open_account("ann")
    ledger.topup("ann", 10**9)
    first = Idempotency(db, dead.id, clock=lambda: now[0])
    second = Idempotency(db, alive.id, clock=lambda: now[0])

    async def begin(store, name, body=b"x", request_id="r9"):
        return await store.begin("ann", name, body, request_id)

    async def main() -> None:
        for name in ("charged", "free", "answered"):
            assert await begin(first, name, request_id=f"r_{name}") is None
            with ledger.books(["ann"]) as books:
                books.hold(Admission(f"r_{name}", "ann", "k", "m", PRICE, "v1", 5, 5, 60))
        await first.finish("ann", "answered", Stored("r_answered", 200, "text/plain", b"\x00\xff"))
        with ledger.books(["ann"], ["r_charged", "r_answered"]) as books:
            for name in ("r_charged", "r_answered"):
                books.settle(name, PRICE, Metered(Counts(5, completion=2), "stop"))
        with pytest.raises(InFlight):
            await begin(second, "free")
        ledger.recover([dead.id])
        alive.forget([dead.id])
        with pytest.raises(AnswerLost, match="r_charged"):
            await begin(second, "charged")
        assert await begin(second, "free") is None
        assert (await begin(second, "answered")).body == b"\x00\xff"
        with pytest.raises(KeyReused):
            await begin(second, "answered", b"y")
        now[0] += 90_000
        second.sweep()
        assert await begin(second, "answered", b"y") is None

    asyncio.run(main())
    assert ledger.audit().sound


@pytest.mark.parametrize("stream", [False, True])
def test_who_left_in_the_middle_and_asks_again_is_told_that_it_was_charged(service, stream):
    """Not that the first request still runs, for a day; nor the half of a stream that was recorded, as if it were all."""
    service.policy.pause_s, service.policy.turns = 0.05, [Message("assistant", "a long answer " * 20)]
    secret = service.key()
    body = json.dumps({**ASK, "stream": stream}).encode()
    head = (f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {secret}\r\nidempotency-key: a\r\n"
            f"content-length: {len(body)}\r\n\r\n")  # fmt: skip
    url = urlsplit(service.running.base_url)
    with socket.create_connection((url.hostname, url.port), timeout=10) as line:
        line.sendall(head.encode() + body)
        service.wait(lambda: service.policy.sampled and len(service.policy.sampled[0]) > 20)
        if stream:
            assert line.recv(100).startswith(b"HTTP/1.1 200 ")
    service.wait(lambda: service.state.ledger.db.read("SELECT COUNT(*) FROM usage WHERE nano_usd > 0")[0][0] == 1)
    again = {"authorization": f"Bearer {secret}", "idempotency-key": "a"}
    ask = lambda: httpx.post(service.running.base_url + "/chat/completions", content=body, headers=again)  # noqa: E731
    service.wait(lambda: ask().status_code == 200 or ask().json()["error"]["code"] != "idempotency_key_in_use")
    answer = ask()
    if stream:  # all that was recorded, and how it ended
        assert '"error"' in answer.text and "[DONE]" not in answer.text
    else:
        assert answer.json()["error"]["code"] == "answer_lost" and answer.headers["x-should-retry"] == "false"
    assert len(service.policy.prompts) == 1


def test_a_batch_that_is_sent_twice_under_one_key_is_one_batch(service):
    """Each line of it costs money: a retry after a lost answer made, and charged, a second one."""
    client = service.client()
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": ASK}
    file = client.files.create(file=("in.jsonl", json.dumps(line).encode()), purpose="batch")
    ask = {"input_file_id": file.id, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    named = {"idempotency-key": "once"}
    first, again = (client.batches.create(**ask, extra_headers=named) for _ in range(2))
    assert first.id == again.id != client.batches.create(**ask).id
    with pytest.raises(openai.ConflictError):
        client.batches.create(**{**ask, "completion_window": "48h"}, extra_headers=named)
    with pytest.raises(openai.NotFoundError):  # a refusal is not remembered
        client.batches.create(**{**ask, "input_file_id": "none"}, extra_headers={"idempotency-key": "other"})
    assert client.batches.create(**ask, extra_headers={"idempotency-key": "other"}).id
    assert service.client(service.key("bob")).batches.list().data == []
    with pytest.raises(openai.AuthenticationError):
        service.client("sk-none").batches.create(**ask, extra_headers=named)
    message = {"requests": [{"custom_id": "a", "params": {"model": "tide", "max_tokens": 9, "messages": ASK["messages"]}}]}
    headers = {"authorization": f"Bearer {client.api_key}", "idempotency-key": "once more"}
    made = [httpx.post(f"{service.running.base_url}/messages/batches", json=message, headers=headers).json()["id"] for _ in range(2)]
    assert made[0] == made[1]
