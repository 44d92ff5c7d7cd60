"""Files and batches: uploaded, answered at the batch price, and finished however often the worker dies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import httpx2 as httpx
import openai
import pytest

from tidelock.service import batch_queue
from tidelock.service.db import Database
from tidelock.service.ledger import Ledger
from tidelock.service.surfaces import batches


def lines(*bodies: dict, url: str = "/v1/chat/completions") -> bytes:
    rows = [{"custom_id": f"r{n}", "method": "POST", "url": url, "body": body} for n, body in enumerate(bodies)]
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def ask(text: str, **more) -> dict:
    return {"model": "tide", "messages": [{"role": "user", "content": text}], **more}


def run(service, client: openai.OpenAI, data: bytes, **options):
    """The batch as it is when it is over."""
    file = client.files.create(file=("in.jsonl", data), purpose="batch")
    options = {"endpoint": "/v1/chat/completions", "completion_window": "24h", **options}
    batch = client.batches.create(input_file_id=file.id, **options)
    service.wait(lambda: client.batches.retrieve(batch.id).status in ("completed", "failed", "cancelled", "expired"))
    return client.batches.retrieve(batch.id)


def rows(client: openai.OpenAI, file_id: str) -> list[dict]:
    return [json.loads(line) for line in client.files.content(file_id).text.splitlines()]


def test_a_file_is_kept_as_it_was_until_deleted(service):
    client = service.client(_strict_response_validation=True)
    data = bytes(range(256)) * 10
    file = client.files.create(file=("x.bin", data), purpose="batch", timeout=5)
    assert (file.bytes, file.filename, file.purpose, file.status) == (2560, "x.bin", "batch", "processed")
    assert client.files.content(file.id).content == data
    assert client.files.retrieve(file.id) == file and client.files.list().data == [file]
    assert client.files.delete(file.id).deleted and list(service.state.files.iterdir()) == []
    for gone in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError):
            gone(file.id)


def test_lists_page_through_everything_once(service):
    client = service.client()
    ids = [client.files.create(file=(f"{n}", b"x"), purpose="batch").id for n in range(7)]
    assert [f.id for f in client.files.list(limit=3)] == ids[::-1]
    assert [f.id for f in client.files.list(limit=2, order="asc")] == ids
    assert [f.id for f in client.files.list(purpose="image")] == []


@pytest.mark.parametrize(
    ("data", "purpose", "param"), [(b"", "batch", "file"), (b"x", "poetry", "purpose"), (b"x", None, "purpose")]
)
def test_a_file_that_is_empty_or_for_nothing_is_400(service, data, purpose, param):
    headers = {"authorization": f"Bearer {service.key()}"}
    fields = {} if purpose is None else {"purpose": purpose}
    answer = httpx.post(service.running.base_url + "/files", files={"file": data}, data=fields, headers=headers)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param
    answer = httpx.post(service.running.base_url + "/files", json={"purpose": "batch"}, headers=headers)
    assert answer.status_code == 400


def test_a_batch_answers_every_line_in_order_at_half_the_price(service):
    client = service.client(service.key())
    live = client.chat.completions.create(**ask("hi")).usage
    batch = run(service, client, lines(ask("hi"), ask("hi", model="other"), ask("hi", temperature=3), ask("ho")))
    assert batch.status == "completed" and batch.request_counts.model_dump() == {"total": 4, "completed": 2, "failed": 2}
    good, bad = rows(client, batch.output_file_id), rows(client, batch.error_file_id)
    assert [r["custom_id"] for r in good] == ["r0", "r3"] and [r["custom_id"] for r in bad] == ["r1", "r2"]
    assert [r["response"]["status_code"] for r in good + bad] == [200, 200, 404, 400]
    usage = good[0]["response"]["body"]["usage"]
    assert usage["prompt_tokens"] == live.prompt_tokens and usage["cost_nano_usd"] * 2 == live.cost_nano_usd
    spent = sum(r["response"]["body"]["usage"]["cost_nano_usd"] for r in good)
    assert service.state.ledger.balance("ann") == 1_000_000_000 - live.cost_nano_usd - spent
    openai.types.chat.ChatCompletion.model_validate(good[0]["response"]["body"])


def test_a_file_that_is_no_batch_fails_with_its_lines_named(service):
    data = lines(ask("hi")) + b"{\n" + lines(ask("hi"), url="/v1/embeddings") + b'{"custom_id": "x", "url": "/v1/chat/completions"}\n'
    batch = run(service, service.client(), data)
    assert batch.status == "failed" and batch.output_file_id is None
    assert [(e.line, e.code) for e in batch.errors.data] == [
        (2, "invalid_json_line"), (3, "duplicate_custom_id"), (4, "invalid_body"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [{"completion_window": "1h"}, {"completion_window": "8d"}, {"completion_window": "soon"}, {"endpoint": "/v1/embeddings"},
     {"metadata": {"k" * 65: "v"}}, {"metadata": {"k": "v" * 513}}, {"metadata": {str(n): "" for n in range(17)}}],
)  # fmt: skip
def test_a_batch_outside_the_rules_is_400(service, change):
    client = service.client()
    file = client.files.create(file=("in.jsonl", lines(ask("hi"))), purpose="batch")
    options = {"endpoint": "/v1/chat/completions", "completion_window": "12h", "input_file_id": file.id, **change}
    with pytest.raises(openai.BadRequestError):
        client.batches.create(**options)


def test_a_cancelled_batch_keeps_what_was_answered_and_begins_nothing_more(service):
    client = service.client()
    service.policy.pause_s = 0.02
    file = client.files.create(file=("in.jsonl", lines(*(ask(f"{n}") for n in range(100)))), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    service.wait(lambda: client.batches.retrieve(batch.id).request_counts.completed > 0)
    assert client.batches.cancel(batch.id).status == "cancelling"
    service.wait(lambda: client.batches.retrieve(batch.id).status == "cancelled")
    batch = client.batches.retrieve(batch.id)
    assert 0 < batch.request_counts.completed < 100
    assert len(rows(client, batch.output_file_id)) == batch.request_counts.completed == len(service.policy.prompts)
    with pytest.raises(openai.BadRequestError):
        client.batches.cancel(batch.id)


SERVER = """
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
    policy = ScriptedPolicy(template, [Message("assistant", "word " * 4)], per_chunk=3, pause_s=0.01)
    state = open_state(sys.argv[1], policy=policy, template=template, prices=PriceBook("v1", {"tide": PRICE}),
                       model="tide", context_length=4096, weights_version=1, batch_lease_s=0.5)
    secret = sys.argv[2] if len(sys.argv) > 2 else state.keys.create("ann")[1]
    state.ledger.topup("ann", 10**12, "only-once")
    async with serving(state) as running:
        print(running.base_url, secret, flush=True)
        await running.task

asyncio.run(main())
"""


def test_kill_9_again_and_again_loses_no_line_and_bills_each_once(tmp_path):
    def start(*secret: str) -> tuple[subprocess.Popen, str, str]:
        path = f"{Path(__file__).parent}:{Path(__file__).parents[2]}"
        command = [sys.executable, "-c", SERVER, str(tmp_path), *secret]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path})
        url, key = server.stdout.readline().split()
        return server, url, key

    server, url, secret = start()
    client = openai.OpenAI(base_url=url, api_key=secret)
    file = client.files.create(file=("in.jsonl", lines(*(ask(f"{n}") for n in range(60)))), purpose="batch")
    batch_id = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h").id
    for _ in range(2):
        time.sleep(0.15)
        server.kill()
        server.wait()
        server, url, _ = start(secret)
    client = openai.OpenAI(base_url=url, api_key=secret)
    deadline = time.monotonic() + 20
    while (batch := client.batches.retrieve(batch_id)).status != "completed":
        assert time.monotonic() < deadline, batch
        time.sleep(0.05)
    results = rows(client, batch.output_file_id)
    server.kill()
    server.wait()
    assert [r["custom_id"] for r in results] == [f"r{n}" for n in range(60)]
    ledger = Ledger(Database(tmp_path / "service.sqlite"))
    billed = {row[0]: row[1] for row in ledger.db.read("SELECT request_id, nano_usd FROM usage WHERE finish_reason <> 'lost'")}
    assert ledger.audit().sound
    told = {r["response"]["request_id"]: r["response"]["body"]["usage"]["cost_nano_usd"] for r in results}
    assert told == billed
    ledger.db.close()


@pytest.mark.parametrize("line", [
    b'{"custom_id": "\\ud800", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "tide"}}',
    b'{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "tide", "temperature": NaN}}',
    b'{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": ' + b'{"a":' * 900 + b"1" + b"}" * 901,
])  # fmt: skip
def test_a_line_that_could_not_be_written_again_is_no_line(service, line):
    """Half a character in a custom_id was answered, could not be written, and stopped everybody's batches for ever."""
    batch = run(service, service.client(), lines(ask("a")) + line)
    assert (batch.status, batch.errors.data[0].code, batch.errors.data[0].line) == ("failed", "invalid_json_line", 2)


def test_a_batch_that_makes_the_server_fail_holds_up_nobody_and_ends_with_its_time(service):
    state = service.state
    state.accounts.ensure("mallory")
    broken = batches.fresh("batch_broken", "/v1/chat/completions", "x", "24h", 24, None)
    del broken["input_file_id"]  # no batch is like this
    late = {**broken, "id": "batch_late", "expires_at": int(time.time()) - 1}
    for doc in (broken, late):
        state.objects.put(batches.KIND, "mallory", doc)
        with state.ledger.db.transaction() as tx:
            batch_queue.add(tx, doc["id"], "mallory", "key_x")
    batch = run(service, service.client(), lines(ask("a"), ask("b")))
    assert batch.status == "completed" and batch.request_counts.completed == 2
    service.wait(lambda: state.objects.get(batches.KIND, "mallory", "batch_late")["status"] == "failed")
    # a batch leaves the queue right after it is over; the broken one waits there for its turn to come again
    def queued():
        rows = state.ledger.db.read("SELECT id, lease_us FROM batch_queue")
        return [(name, lease_us > time.time_ns() // 1000) for name, lease_us in rows]

    service.wait(lambda: queued() == [("batch_broken", True)])


def test_a_file_whose_bytes_are_gone_is_404_and_can_be_deleted(service):
    """After a restore: backups hold the books, and of files only what they are called. It was a failure without an id."""
    client = service.client()
    file = client.files.create(file=("a.jsonl", b"{}"), purpose="batch")
    (service.state.files / file.id).unlink()
    with pytest.raises(openai.NotFoundError, match="not here"):
        client.files.content(file.id)
    assert client.files.retrieve(file.id).id == file.id and client.files.delete(file.id).deleted


def test_a_batch_that_was_over_when_its_worker_died_is_not_answered_again(service):
    """It had left its lines and not yet the queue: all of them were asked, and charged, a second time."""
    batch = run(service, service.client(), lines(ask("a"), ask("b")))
    state, asked = service.state, len(service.policy.prompts)
    service.wait(lambda: not state.ledger.db.read("SELECT 1 FROM batch_queue"))
    assert batch.status == "completed" and asked == 2
    with state.ledger.db.transaction() as tx:
        batch_queue.add(tx, batch.id, "ann", state.keys.list("ann")[0].id)
    news = {"input_file_id": batch.input_file_id, "endpoint": batch.endpoint, "completion_window": "24h"}
    service.client().batches.create(**news)
    service.wait(lambda: not state.ledger.db.read("SELECT 1 FROM batch_queue"))
    assert len(service.policy.prompts) == asked + 2  # the new one's
    assert state.ledger.db.read("SELECT COUNT(*) FROM objects WHERE kind = 'batch_line'")[0][0] == 0
