"""The Responses API over a WebSocket: the events of the HTTP stream, one response at a time, charged like any other."""

from __future__ import annotations

import base64
import json
import os
import socket as sockets
import threading
from contextlib import contextmanager
from urllib.parse import urlsplit

import httpx2 as httpx
import pytest
from test_responses import TURN, raw
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from tidelock.service.surfaces import responses_socket
from tidelock.tokens.message import Message

ENDS = ("response.completed", "response.incomplete", "response.failed", "error")


@contextmanager
def socket(service, secret: str):
    url = service.running.base_url.replace("http", "ws", 1) + "/responses"
    with connect(url, additional_headers={"authorization": f"Bearer {secret}"}) as connection:
        yield connection


def ask(connection: ClientConnection, **body) -> list[dict]:
    """The messages of one turn, the last of which ends it."""
    connection.send(json.dumps({"type": "response.create", "model": "tide", "input": "hi", **body}))
    out = [json.loads(connection.recv(10))]
    while out[-1]["type"] not in ENDS:
        out.append(json.loads(connection.recv(10)))
    return out


def test_the_messages_are_the_events_of_the_http_stream(service):
    service.policy.turns = [TURN]
    secret = service.key()
    lines = raw(service, {"stream": True}, secret).text.splitlines()
    streamed = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    with socket(service, secret) as connection:
        first, second = ask(connection), ask(connection, stream=True)  # the word for HTTP is passed over
    for events in (first, second):
        assert [e["type"] for e in events] == [e["type"] for e in streamed]
        assert [e["sequence_number"] for e in events] == list(range(len(events)))
        answer, other = (all_[-1]["response"] for all_ in (events, streamed))
        assert answer["usage"] == other["usage"] and len(answer["output"]) == len(other["output"])
    (row,) = service.state.ledger.db.read("SELECT count(*), count(DISTINCT nano_usd) FROM usage")
    assert tuple(row) == (3, 1)  # three answers, each charged the same


def test_what_is_not_stored_is_continued_on_its_own_connection_alone(service):
    secret = service.key()
    with socket(service, secret) as connection:
        name = ask(connection, input="the word is cobalt", store=False)[-1]["response"]["id"]
        answer = ask(connection, input="which word?", store=False, previous_response_id=name)[-1]
        assert answer["type"] == "response.completed"
    told = service.state.template.tokenizer.decode(service.policy.prompts[-1])
    assert told.index("the word is cobalt") < told.index("hello") < told.index("which word?")
    assert not service.state.ledger.db.read("SELECT id FROM objects")
    with socket(service, secret) as connection:
        (error,) = ask(connection, previous_response_id=name, store=False)
        assert (error["status"], error["error"]["code"]) == (400, "previous_response_not_found")
        assert ask(connection, store=False)[-1]["type"] == "response.completed"  # the connection goes on


def test_a_stored_response_is_continued_on_any(service):
    secret = service.key()
    name = raw(service, {"input": "the word is slate"}, secret).json()["id"]
    with socket(service, secret) as connection:
        assert ask(connection, previous_response_id=name)[-1]["type"] == "response.completed"
    assert "the word is slate" in service.state.template.tokenizer.decode(service.policy.prompts[-1])


def test_a_failed_continuation_forgets_what_it_continued(service):
    with socket(service, service.key()) as connection:
        name = ask(connection, store=False)[-1]["response"]["id"]
        bad = [{"type": "function_call_output", "call_id": "nothing", "output": "?"}]
        (error,) = ask(connection, input=bad, store=False, previous_response_id=name)
        assert error["status"] == 400
        (error,) = ask(connection, store=False, previous_response_id=name)
        assert error["error"]["code"] == "previous_response_not_found"


def test_only_the_last_responses_are_remembered(service, monkeypatch):
    monkeypatch.setattr("tidelock.service.surfaces.responses.RECALLED", 2)
    with socket(service, service.key()) as connection:
        names = [ask(connection, store=False)[-1]["response"]["id"] for _ in range(3)]
        ends = [ask(connection, store=False, previous_response_id=name)[-1]["type"] for name in (names[0], names[2])]
    assert ends == ["error", "response.completed"]


def test_what_is_made_ready_ahead_is_gone_on_with_and_costs_nothing(service):
    with socket(service, secret := service.key()) as connection:
        tools = [{"type": "function", "name": "lookup", "parameters": {"type": "object"}}]
        whole = {"instructions": "be brief", "tools": tools, "input": [{"role": "user", "content": "first"}, *SECOND]}
        ask(connection, **whole)
        for ahead, rest in ((whole["input"][:1], SECOND), ([], whole["input"]), (None, whole["input"])):
            told = ask(connection, **{**whole, "input": ahead}, generate=False, store=False)
            assert [event["type"] for event in told] == ["response.created", "response.in_progress", "response.completed"]
            made = told[-1]["response"]
            assert (made["output"], made["usage"]["total_tokens"]) == ([], 0)
            on = {**whole, "input": rest, "previous_response_id": made["id"]}
            assert ask(connection, **on)[-1]["response"]["status"] == "completed"
            assert ask(connection, **on)[-1]["response"]["status"] == "completed"  # a fork of it
        assert len(service.policy.prompts) == 7 and len(set(service.policy.prompts)) == 1
    assert service.state.ledger.db.read("SELECT count(*) FROM usage")[0][0] == 7
    headers = {"authorization": f"Bearer {secret}"}
    body = {"model": "tide", "input": "hi", "generate": False}  # of connections only
    assert httpx.post(service.running.base_url + "/responses", json=body, headers=headers).json()["output"]


SECOND = [{"role": "user", "content": "second"}]


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ("no JSON", None),
        ("[]", None),
        ('{"type": "response.cancel"}', "type"),
        ('{"type": "response.create", "model": "tide", "input": 7, "generate": false}', "input"),
        ('{"type": "response.create", "model": "tide", "input": 7}', "input"),
        ('{"type": "response.create", "model": "tide", "input": "hi", "background": true}', "background"),
    ],
)
def test_a_message_that_asks_nothing_is_refused_and_the_connection_stays(service, message, param):
    with socket(service, service.key()) as connection:
        connection.send(message)
        error = json.loads(connection.recv(10))
        assert (error["type"], error["status"], error["error"].get("param")) == ("error", 400, param)
        assert error["error"]["code"] and error["error"]["message"]
        assert ask(connection)[-1]["type"] == "response.completed"
    assert len(service.policy.prompts) == 1


def test_a_wrong_key_is_told_so_before_the_connection_is_taken(service):
    with pytest.raises(InvalidStatus) as refused, socket(service, "sk-wrong"):
        pass
    response = refused.value.response
    assert response.status_code == 401 and json.loads(response.body)["error"]["code"] == "invalid_api_key"
    with pytest.raises(InvalidStatus), connect(service.running.base_url.replace("http", "ws", 1) + "/chat/completions"):
        pass  # there is no other socket


def test_a_key_revoked_meanwhile_asks_for_nothing_more(service):
    secret = service.key()
    with socket(service, secret) as connection:
        assert ask(connection)[-1]["type"] == "response.completed"
        service.state.keys.revoke(service.state.keys.authenticate(secret).id)
        (error,) = ask(connection)
    assert (error["status"], error["error"]["code"]) == (401, "invalid_api_key")


def test_an_empty_account_is_told_so_and_not_to_ask_again(service):
    with socket(service, service.key(nano_usd=1)) as connection:
        (error,) = ask(connection)
    assert (error["status"], error["error"]["code"]) == (429, "insufficient_quota")
    assert error["headers"]["x-should-retry"] == "false"


def test_a_failure_midway_ends_the_turn_once(service):
    service.policy.turns, service.policy.fail_after = [Message("assistant", "long " * 40)], 8
    service.policy.pause_s = 0.02  # so that it has begun
    with socket(service, service.key()) as connection:
        assert ask(connection)[-1]["type"] == "response.failed"
        service.policy.fail_after = None
        events = ask(connection)  # nothing of the failed turn is left over
    assert (events[0]["type"], events[-1]["type"]) == ("response.created", "response.completed")


def test_messages_sent_ahead_are_answered_in_turn(service):
    service.policy.turns = [Message("assistant", f"answer {n}") for n in range(30)]
    with socket(service, service.key()) as connection:
        for _ in range(30):  # more than are read ahead
            connection.send(json.dumps({"type": "response.create", "model": "tide", "input": "hi", "store": False}))
        said = []
        while len(said) < 30:
            event = json.loads(connection.recv(10))
            if event["type"] == "response.output_text.done":
                said.append(event["text"])
    assert said == [f"answer {n}" for n in range(30)]


def test_a_client_that_leaves_stops_its_answer_and_pays_for_what_was_sampled(service):
    service.policy.turns, service.policy.pause_s = [Message("assistant", "long " * 500)], 0.01
    secret = service.key()
    with socket(service, secret) as connection:
        connection.send(json.dumps({"type": "response.create", "model": "tide", "input": "hi"}))
        while json.loads(connection.recv(10))["type"] != "response.output_text.delta":
            pass
    service.wait(lambda: bool(service.policy.aborted))
    service.wait(lambda: not service.state.ledger.db.read("SELECT 1 FROM holds WHERE state = 'open'"))
    sampled = len(service.policy.sampled[0])
    assert sampled < 2500
    (row,) = service.state.ledger.db.read("SELECT completion_tokens FROM usage")
    assert row[0] == sampled


def test_a_client_that_does_not_read_is_taken_for_gone(service):
    service.state.stall_timeout_s, service.state.context_length = 0.2, 10**7
    service.policy.turns, service.policy.per_chunk = [Message("assistant", "word " * 1_000_000)], 20_000
    service.policy.pause_s = 0.003
    url = urlsplit(service.running.base_url)
    body = json.dumps({"type": "response.create", "model": "tide", "input": "hi", "max_output_tokens": 9_000_000,
                       "metadata": {"why": "a" * 99}}).encode()
    with sockets.socket() as client:
        client.setsockopt(sockets.SOL_SOCKET, sockets.SO_RCVBUF, 4096)
        client.connect((url.hostname, url.port))
        client.sendall(
            b"GET /v1/responses HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: " + base64.b64encode(os.urandom(16)) + b"\r\nAuthorization: Bearer "
            + service.key(nano_usd=10**12).encode() + b"\r\n\r\n"
        )  # fmt: skip
        assert client.recv(4096).startswith(b"HTTP/1.1 101")
        # a masked text frame; its body has to be 126 bytes or more for a length of two
        client.sendall(b"\x81\xfe" + len(body).to_bytes(2, "big") + bytes(4) + body)
        service.wait(lambda: service.state.ledger.db.read("SELECT 1 FROM usage"))
        client.settimeout(5)
        while client.recv(1 << 20):  # what was on its way, and then the end
            pass
    (row,) = service.state.ledger.db.read("SELECT completion_tokens FROM usage")
    sampled = len(service.policy.sampled[0])
    assert sampled < 5_000_000 and 0 <= sampled - row[0] <= service.policy.per_chunk  # at most what was on its way


def test_a_connection_ends_after_its_time_but_not_within_a_turn(service, monkeypatch):
    monkeypatch.setattr(responses_socket, "LONGEST_S", 0.5)
    service.policy.turns, service.policy.pause_s = [Message("assistant", "long " * 60)], 0.02
    with socket(service, service.key()) as connection:
        assert ask(connection, max_output_tokens=1000)[-1]["type"] == "response.completed"  # takes over a second
        error = json.loads(connection.recv(10))
        assert error["error"]["code"] == "websocket_connection_limit_reached"
        with pytest.raises(ConnectionClosed):
            connection.recv(10)


def test_connections_do_not_hear_of_each_other(service):
    """Two customers, each at work on several turns at once."""
    secrets = {name: service.key(name) for name in ("ann", "bob")}
    faults: list[str] = []

    def work(name: str) -> None:
        with socket(service, secrets[name]) as connection:
            before = None
            for n in range(5):
                end = ask(connection, input=f"{name} {n}", store=False, previous_response_id=before)[-1]
                before = end["response"]["id"]

    threads = [threading.Thread(target=work, args=(name,)) for name in ("ann", "bob") for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    decode = service.state.template.tokenizer.decode
    for prompt in map(decode, service.policy.prompts):
        faults += [prompt] if "ann" in prompt and "bob" in prompt else []
    assert not faults and len(service.policy.prompts) == 20
    charged = dict(service.state.ledger.db.read("SELECT customer, count(*) FROM usage GROUP BY customer"))
    assert charged == {"ann": 10, "bob": 10}
