"""Responses in the background: they run without their client, on whichever worker, end once, and cost what they came to."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import httpx2 as httpx
import pytest

from tidelock.service.db import Database
from tidelock.service.keys import KeyStore
from tidelock.service.ledger import Ledger
from tidelock.tokens.message import Message

LONG = Message("assistant", "a long answer " * 14, reasoning="let me think")
RUNS = ("queued", "in_progress")


class Api:
    """One customer at one server, in bare HTTP."""

    def __init__(self, service, secret=None, customer="ann"):
        self.service, self.customer = service, customer
        self.secret = secret or service.key(customer)
        headers = {"authorization": f"Bearer {self.secret}"}
        self.http = httpx.Client(base_url=service.running.base_url, headers=headers, timeout=30)

    def post(self, path="", **body):
        return self.http.post(f"/responses{path}", json=body or None)

    def start(self, **body):
        made = self.post(model="tide", input="hi", background=True, **body)
        assert made.status_code == 200, made.text
        return made.json()

    def streaming(self):
        """A response whose events are read as they come."""
        body = {"model": "tide", "input": "hi", "background": True, "stream": True}
        return self.http.stream("POST", "/responses", json=body)

    def get(self, name, **query):
        return self.http.get(f"/responses/{name}", params=query)

    def end(self, name, within_s=10.0):
        until = time.monotonic() + within_s
        while (now := self.get(name).json())["status"] in RUNS:
            assert time.monotonic() < until, "it never ended"
            time.sleep(0.02)
        return now

    def events(self, name, **query):
        return parsed(self.get(name, stream="true", **query).text)

    @property
    def spent(self):
        rows = self.service.state.ledger.db.read("SELECT sum(nano_usd) FROM usage WHERE customer = ?", (self.customer,))
        return rows[0][0] or 0

    @property
    def held(self):
        sql = "SELECT 1 FROM holds WHERE customer = ? AND state = 'open'"
        return len(self.service.state.ledger.db.read(sql, (self.customer,)))


def parsed(text):
    assert text.endswith("data: [DONE]\n\n"), text[-200:]
    return [json.loads(f.partition("\ndata: ")[2]) for f in text.split("\n\n") if f.startswith("event: ")]


def test_it_is_there_at_once_and_its_end_and_its_charge_are_one(service):
    service.policy.turns, service.policy.pause_s = [LONG], 0.02
    client = service.client(secret := service.key(), _strict_response_validation=True)
    made = client.responses.create(model="tide", input="hi", background=True)
    assert made.status == "queued" and made.background and made.output == []
    assert client.responses.retrieve(made.id).status == "in_progress"
    api = Api(service, secret)
    done = api.end(made.id)
    assert done["status"] == "completed" and done["output"][-1]["content"][0]["text"] == LONG.content
    assert done["usage"]["cost_nano_usd"] == api.spent > 0
    assert done["usage"]["output_tokens"] == len(service.policy.sampled[0])
    whole = client.responses.create(model="tide", input="hi")
    assert whole.output_text == client.responses.retrieve(made.id).output_text
    # it can be continued, listed, deleted like any other
    service.policy.turns = [Message("assistant", "and on", reasoning="hm")]
    assert client.responses.create(model="tide", input="go on", previous_response_id=made.id).output_text == "and on"
    assert next(iter(client.responses.input_items.list(made.id))).content[0].text == "hi"
    client.responses.delete(made.id)
    assert api.get(made.id).status_code == 404


def test_what_is_refused_is_refused_at_once_and_leaves_nothing(service):
    broke = Api(service, service.key("bob", nano_usd=0), "bob")
    refused = broke.post(model="tide", input="hi", background=True)
    assert refused.status_code == 429 and refused.json()["error"]["type"] == "exceeded_current_quota_error"
    api = Api(service)
    for body, param in (({"store": False}, "store"), ({"input": 7}, "input")):
        error = api.post(**{"model": "tide", "input": "hi", "background": True, **body})
        assert (error.status_code, error.json()["error"]["param"]) == (400, param)
    made = api.post(model="tide", input="hi").json()
    assert api.get(made["id"], stream="true").json()["error"]["param"] == "stream"
    assert api.post(f"/{made['id']}/cancel").status_code == 400
    assert service.state.ledger.db.read("SELECT count(*) FROM background")[0][0] == 0 and not service.state.detached


def test_a_stream_can_be_left_and_taken_up_again_anywhere(service):
    service.policy.turns, service.policy.pause_s = [LONG], 0.02
    api = Api(service)
    client = service.client(api.secret, _strict_response_validation=True)
    with client.responses.create(model="tide", input="hi", background=True, stream=True) as stream:
        first = [event for event, _ in zip(stream, range(6))]
    assert [e.type for e in first[:3]] == ["response.created", "response.queued", "response.in_progress"]
    assert [first[0].response.status, first[2].response.status] == ["queued", "in_progress"]
    name = first[0].response.id
    rest = list(client.responses.retrieve(name, stream=True, starting_after=first[-1].sequence_number))
    assert [e.sequence_number for e in [*first, *rest]] == list(range(len(first) + len(rest)))
    assert "".join(e.delta for e in [*first, *rest] if e.type == "response.output_text.delta") == LONG.content
    assert rest[-1].type == "response.completed" and rest[-1].response == client.responses.retrieve(name)
    whole = api.events(name)
    for at in (0, 3, len(whole) // 2, len(whole) - 2, len(whole) - 1):
        assert api.events(name, starting_after=at) == whole[at + 1 :]
    assert len(service.policy.prompts) == 1 and rest[-1].response.usage.output_tokens == len(service.policy.sampled[0])
    assert api.spent == api.get(name).json()["usage"]["cost_nano_usd"]


@pytest.mark.parametrize("streamed", [False, True])
def test_what_is_cancelled_stops_and_costs_what_was_made(service, streamed):
    service.policy.turns, service.policy.pause_s = [LONG], 0.05
    api = Api(service)
    if streamed:
        with api.streaming() as made:
            lines = made.iter_lines()
            name = next(json.loads(line[6:]) for line in lines if line.startswith("data: "))["response"]["id"]
            next(line for line in lines if "output_text.delta" in line)
    else:
        name = api.start()["id"]
        service.wait(lambda: len(service.policy.sampled[-1]) > 45)
    cancelled = api.post(f"/{name}/cancel").json()
    assert cancelled["status"] == "cancelled" and cancelled["error"] is None
    made = len(service.policy.sampled[-1])
    assert cancelled["usage"]["output_tokens"] == made < 100 and cancelled["usage"]["cost_nano_usd"] == api.spent > 0
    message = cancelled["output"][-1]
    assert message["status"] == "incomplete" and LONG.content.startswith(message["content"][0]["text"])
    time.sleep(0.2)
    assert len(service.policy.sampled[-1]) == made and not api.held
    assert api.post(f"/{name}/cancel").json() == api.get(name).json() == cancelled  # again and again
    if streamed:
        assert api.events(name)[-1]["type"] == "response.output_item.done"  # there is no event for it
    assert api.post(model="tide", input="x", previous_response_id=name).status_code == 200


def test_what_is_cancelled_before_its_first_token_is_free(service):
    service.policy.pause_s = 0.6
    api = Api(service)
    name = api.start()["id"]
    assert api.post(f"/{name}/cancel").json()["status"] == "cancelled"
    assert (api.spent, api.held) == (0, 0)
    error = api.post(model="tide", input="x", previous_response_id=name)
    assert (error.status_code, error.json()["error"]["param"]) == (400, "previous_response_id")


@pytest.mark.parametrize("streamed", [False, True])
def test_a_policy_that_fails_is_told_as_a_failure(service, streamed):
    """As of an answer that is waited for: whole it is free, streamed it costs what was handed on."""
    service.policy.turns, service.policy.fail_after, service.policy.pause_s = [LONG], 4, 0.15
    api = Api(service)
    if streamed:
        events = parsed(api.post(model="tide", input="hi", background=True, stream=True).text)
        failed, last = api.get(events[0]["response"]["id"]).json(), events[-1]
        assert last["type"] == "response.failed" and last["response"] == failed
        assert failed["usage"]["output_tokens"] == 20 and failed["usage"]["cost_nano_usd"] == api.spent
    else:
        failed = api.end(api.start()["id"])
        assert failed["usage"] is None and api.spent == 0
    assert failed["status"] == "failed" and failed["error"]["code"] == "server_error" and not api.held


def test_money_that_ends_midway_ends_it_as_it_ends_an_answer_that_is_waited_for(service):
    service.policy.turns = [Message("assistant", "x" * 900)]
    for streamed in (False, True):
        customer = f"poor-{streamed}"
        api = Api(service, service.key(customer, nano_usd=600_000), customer)
        if streamed:
            told = api.post(model="tide", input="hi", background=True, stream=True, max_output_tokens=900).text
            ended = parsed(told)[-1]["response"]
            assert (ended["status"], ended["error"]["code"]) == ("failed", "insufficient_quota")
        else:
            ended = api.end(api.start(max_output_tokens=900)["id"])
            assert (ended["status"], ended["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
        assert 0 < api.spent == ended["usage"]["cost_nano_usd"] <= 600_000


def test_any_worker_tells_follows_and_cancels_what_another_runs(pair):
    first, second = pair
    for service in pair:
        service.policy.turns, service.policy.pause_s = [LONG], 0.05
    here = Api(first)
    there = Api(second, here.secret)
    name = here.start()["id"]
    assert there.get(name).json()["status"] == "in_progress"
    cancelled = there.post(f"/{name}/cancel").json()
    assert cancelled["status"] == "cancelled" == here.get(name).json()["status"]
    with here.streaming() as made:
        name = next(json.loads(line[6:]) for line in made.iter_lines() if line.startswith("data: "))["response"]["id"]
    events = there.events(name)
    assert events == here.events(name) and events[-1]["response"] == there.get(name).json()
    assert [e["sequence_number"] for e in events] == list(range(len(events)))
    there.http.delete(f"/responses/{name}")
    assert here.get(name).status_code == 404 and here.get(name, stream="true").status_code == 404


@pytest.mark.parametrize("streamed", [False, True])
def test_who_is_told_of_its_end_can_go_on_from_it_at_once(service, streamed):
    """The end is written with the charge, the trace after it: on a slow disk much after."""
    write = service.state.scribe._write

    def slowly(batch):
        time.sleep(0.2)
        return write(batch)

    service.state.scribe._write = slowly
    api = Api(service)
    for _ in range(3):
        if streamed:
            name = parsed(api.post(model="tide", input="hi", background=True, stream=True).text)[-1]["response"]["id"]
        else:
            name = api.end(api.start()["id"])["id"]
        assert api.post(model="tide", input="go on", previous_response_id=name).status_code == 200


def test_one_deleted_while_it_runs_is_stopped_charged_and_gone(service):
    service.policy.turns, service.policy.pause_s = [LONG], 0.05
    api = Api(service)
    name = api.start()["id"]
    service.wait(lambda: bool(service.policy.sampled and service.policy.sampled[-1]))
    assert api.http.delete(f"/responses/{name}").json()["deleted"]
    assert api.get(name).status_code == 404 and api.spent > 0 and not api.held
    assert service.state.ledger.db.read("SELECT count(*) FROM background_events")[0][0] == 0


def test_the_same_idempotency_key_starts_one(service):
    service.policy.pause_s = 0.05
    api = Api(service)
    body = {"model": "tide", "input": "hi", "background": True}
    one, two = (api.http.post("/responses", json=body, headers={"idempotency-key": "k"}).json() for _ in range(2))
    assert one == two and api.end(one["id"])["status"] == "completed" and len(service.policy.prompts) == 1


def test_a_batch_cannot_hold_one(service):
    client = service.client(service.key(), default_headers={"x-tidelock-profile": "lenient"})
    body = {"model": "tide", "input": "hi", "background": True}
    data = json.dumps({"custom_id": "r", "method": "POST", "url": "/v1/responses", "body": body}).encode() + b"\n"
    file = client.files.create(file=("in.jsonl", data), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/responses", completion_window="24h")
    service.wait(lambda: client.batches.retrieve(batch.id).status == "completed")
    row = json.loads(client.files.content(client.batches.retrieve(batch.id).error_file_id).text)
    assert (row["response"]["status_code"], row["response"]["body"]["error"]["param"]) == (400, "background")


def test_a_server_that_stops_ends_what_it_runs(tmp_path, template, serving_in):
    with serving_in(tmp_path, template) as service:
        service.policy.turns, service.policy.pause_s = [LONG], 0.5
        api = Api(service)
        names = [api.start()["id"], api.start()["id"]]
        with api.streaming() as made:
            lines = made.iter_lines()
            names.append(next(json.loads(line[6:]) for line in lines if line.startswith("data: "))["response"]["id"])
            next(line for line in lines if "output_text.delta" in line)
    db = Database(tmp_path / "service.sqlite")
    docs = [json.loads(db.read("SELECT body FROM objects WHERE id = ?", (name,))[0][0])["response"] for name in names]
    assert [(d["status"], d["error"]["code"]) for d in docs] == [("failed", "server_error")] * 3
    billed = db.read("SELECT nano_usd FROM usage WHERE nano_usd > 0")
    assert [d["usage"] and d["usage"]["cost_nano_usd"] for d in docs] == [None, None, billed[0][0]] and len(billed) == 1
    assert db.read("SELECT count(*) FROM holds WHERE state = 'open'")[0][0] == 0
    db.close()


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
    policy = ScriptedPolicy(template, [Message("assistant", "word " * 40, reasoning="hm")], per_chunk=3, pause_s=0.015)
    state = open_state(sys.argv[1], policy=policy, template=template, prices=PriceBook("v1", {"tide": PRICE}), model="tide",
                       database=sys.argv[2], context_length=4096, weights_version=1, sweep_interval_s=0.3)
    async with serving(state) as running:
        print(running.base_url, flush=True)
        await running.task

asyncio.run(main())
"""


def process(directory: Path, target: str) -> tuple[subprocess.Popen, str]:
    directory.mkdir(exist_ok=True)
    (directory / "pepper").write_bytes(b"p" * 64)
    path = f"{Path(__file__).parent}:{Path(__file__).parents[2]}"
    command = [sys.executable, "-c", SERVER, str(directory), target]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path})
    return server, server.stdout.readline().strip()


def test_kill_9_again_and_again_leaves_none_running_and_every_bill_told(tmp_path, target):
    """Two workers on one database; one is killed wherever it stands, four times over. Of each response either its answer
    and its bill are there, or that it failed and what its client had been sent of it; the other worker says so."""
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "pepper").write_bytes(b"p" * 64)
    db = Database(target)
    _, secret = KeyStore.open(db, tmp_path / "b" / "pepper").create("ann")
    ledger = Ledger(db)
    ledger.topup("ann", 10**12)
    headers, rng = {"authorization": f"Bearer {secret}"}, random.Random(5)
    survivor, there = process(tmp_path / "b", target)
    begun: list[tuple[str, bool]] = []
    try:
        for _ in range(4):
            server, here = process(tmp_path / "a", target)
            with httpx.Client(base_url=here, headers=headers, timeout=30) as http:
                for n in range(8):
                    streamed = n % 2 == 1
                    body = {"model": "tide", "input": f"{n}", "background": True, "stream": streamed}
                    with http.stream("POST", "/responses", json=body) as made:
                        line = next(line for line in made.iter_lines() if line.startswith(("data: ", "{")))
                    doc = json.loads(line.removeprefix("data: "))
                    begun.append((doc.get("response", doc)["id"], streamed))
                    time.sleep(rng.random() * 0.2)
            time.sleep(rng.random())
            server.kill()
            server.wait()
        http = httpx.Client(base_url=there, headers=headers, timeout=30)
        until = time.monotonic() + 15
        while any(http.get(f"/responses/{name}").json()["status"] == "in_progress" for name, _ in begun):
            assert time.monotonic() < until, "some still say they run"
            time.sleep(0.1)
        told = {}
        for name, streamed in begun:
            response = http.get(f"/responses/{name}").json()
            told["req_" + name.removeprefix("resp_")] = response["usage"]["cost_nano_usd"] if response["usage"] else 0
            assert response["status"] == ("completed" if response["error"] is None else "failed")
            if streamed:
                events = parsed(http.get(f"/responses/{name}", params={"stream": "true"}).text)
                assert [e["sequence_number"] for e in events] == list(range(len(events)))
                assert events[-1]["response"] == response and events[-1]["type"] == f"response.{response['status']}"
    finally:
        survivor.kill()
        survivor.wait()
    assert any(told.values()) and not all(told.values()), "no kill came in between"
    assert told == {r: n for r, n in db.read("SELECT request_id, nano_usd FROM usage")}
    assert db.read("SELECT count(*) FROM holds WHERE state = 'open'")[0][0] == 0 and ledger.audit().sound
    db.close()
