"""What a hostile client sends: each costs its sender a refusal, and nobody else a moment."""

from __future__ import annotations

import errno
import json
import socket
import threading
import time
from urllib.parse import urlsplit

import httpx2 as httpx
import pytest
from conftest import _serving

from tidelock.service import wary
from tidelock.service.accounts import SCOPES
from tidelock.service.db import Database, StorageDown, Unstorable
from tidelock.service.surfaces import files
from tidelock.service.surfaces.routes import ROUTES

CHAT = "/v1/chat/completions"
ASK = {"model": "tide", "messages": [{"role": "user", "content": "x"}]}


@pytest.fixture(params=["sqlite", "postgres"])
def either(request, tmp_path, template):
    """The server on each of the databases."""
    database = request.getfixturevalue("postgres").database() if request.param == "postgres" else None
    with _serving(tmp_path, template, database) as one:
        yield one


def root(service) -> str:
    return service.running.base_url.removesuffix("/v1")


def post(service, secret: str, path: str, **options) -> httpx.Response:
    return httpx.post(root(service) + path, headers={"authorization": f"Bearer {secret}"}, timeout=60, **options)


class Watched:
    """How long others waited meanwhile, at worst."""

    def __init__(self, service) -> None:
        self._url, self.worst, self._over = root(service) + "/health", 0.0, threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def __enter__(self) -> Watched:
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._over.set()
        self._thread.join()

    def _ask(self) -> None:
        while not self._over.wait(0.01):
            began = time.monotonic()
            httpx.get(self._url, timeout=120)
            self.worst = max(self.worst, time.monotonic() - began)


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "w"}] * 200_000,
        [{"role": "user", "content": "word " * 5_000_000}],
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [
            {"id": f"c{n}", "type": "function", "function": {"name": "abc", "arguments": "{}"}} for n in range(60_000)]},
         *({"role": "tool", "tool_call_id": f"c{n}", "content": "r"} for n in range(60_000))],
    ],
    ids=["many messages", "one long", "many calls"],
)  # fmt: skip
def test_a_prompt_that_cannot_fit_is_refused_before_it_is_made_tokens_of(service, messages):
    """Two hundred thousand messages of one word held the event loop for minutes; 25 MB of text for seconds."""
    secret = service.key()
    body = json.dumps({"model": "tide", "messages": messages}).encode()
    with Watched(service) as others:
        began = time.monotonic()
        answer = post(service, secret, CHAT, content=body)
        took = time.monotonic() - began
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"].startswith("messages")
    assert "more than 4096 tokens" in error["message"] or "at most" in error["message"]
    assert took < 20 and others.worst < 15  # a second on a quiet machine


def test_many_calls_of_one_turn_are_refused_on_the_responses_surface_too(service):
    items = [{"type": "function_call", "call_id": f"c{n}", "name": "abc", "arguments": "{}"} for n in range(200_000)]
    began = time.monotonic()
    answer = post(service, service.key(), "/v1/responses", json={"model": "tide", "input": items})
    assert answer.status_code == 400 and "at most 1000 calls" in answer.json()["error"]["message"]
    assert time.monotonic() - began < 20


def test_the_tokens_of_a_long_text_are_counted_all_the_same(service):
    answer = post(service, service.key(), "/v1/messages/count_tokens",
                  json={"model": "tide", "messages": [{"role": "user", "content": "w" * 400_000}]})  # fmt: skip
    assert answer.status_code == 200 and answer.json()["input_tokens"] > 400_000


def test_every_body_has_an_end(service):
    """Whoever does not say how long it is, too; on the disk as in memory."""
    secret, boss = service.key(), service.state.keys.create("op", role="admin", scopes=SCOPES)[1]

    def endless():
        for _ in range(40):
            yield b"a" * (1 << 20)

    for path in ("/v1/feedback", "/admin/weights", "/update_weights", "/abort_requests", "/finish_weight_update", CHAT):
        answer = post(service, boss if "chat" not in path else secret, path, content=endless())
        assert answer.status_code in (404, 413), (path, answer.text)
        assert answer.status_code == 413 or path not in ("/v1/feedback", "/admin/weights", CHAT)


def test_an_upload_without_a_length_is_cut_off_where_one_with_it_is_refused(service, monkeypatch):
    monkeypatch.setattr(files, "MAX_BYTES", 1 << 20)
    head = (f"POST /v1/files HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {service.key()}\r\ntransfer-encoding: chunked\r\n"
            "content-type: multipart/form-data; boundary=x\r\n\r\n").encode()  # fmt: skip
    begun = b'--x\r\ncontent-disposition: form-data; name="file"; filename="f"\r\n\r\n' + b"a" * (3 << 20)
    with connect(service) as line:
        line.sendall(head + b"%x\r\n%s\r\n" % (len(begun), begun))
        assert line.recv(100).startswith(b"HTTP/1.1 413 ")  # and it has not ended


def test_text_that_a_database_cannot_hold_is_refused_and_not_a_failure(either):
    """PostgreSQL holds no U+0000: ids with one were 500 there."""
    secret = either.key(scopes=SCOPES)
    headers = {"authorization": f"Bearer {secret}"}
    for route in ROUTES:
        if route.method in ("GET", "DELETE") and "{" in route.path:
            path = route.path.replace("{id}", "a%00b").replace("{model}", "a%00b").replace("{key}", "a%00b")
            assert httpx.request(route.method, root(either) + path, headers=headers).status_code in (400, 404), path
        if route.method == "GET" and "{" not in route.path and "stream" not in route.path:
            query = "&".join(f"{name}=a%00b" for name in route.query if name not in ("limit", "start_time", "end_time"))
            answer = httpx.get(f"{root(either)}{route.path}?start_time=0&{query}", headers=headers)
            assert answer.status_code in (200, 400, 404), (route.path, answer.text)
    project = httpx.get(root(either) + "/v1/organization/projects", headers=headers).json()["data"][0]["id"]
    for path, body in (
        ("/v1/organization/projects", {"name": "a\0b"}),
        ("/v1/organization/users", {"email": "a\0@b.c", "role": "viewer"}),
        (f"/v1/organization/projects/{project}/api_keys", {"models": ["a\0"]}),
        ("/v1/responses", {"model": "tide", "input": "x", "previous_response_id": "a\0"}),
        ("/v1/batches", {"input_file_id": "\0", "endpoint": CHAT, "completion_window": "24h"}),
    ):
        assert post(either, secret, path, json=body).status_code in (200, 400, 404), (path, body)
    assert post(either, secret, CHAT, json=ASK).status_code == 200


def test_the_database_says_what_it_cannot_hold(postgres):
    db = Database(postgres.database())
    with pytest.raises(Unstorable, match="U\\+0000"), db.transaction() as tx:
        tx("SELECT 1 FROM customers WHERE customer = ?", ("a\0",)).fetchone()
    assert db.read("SELECT 1")[0][0] == 1
    db.close()


def connect(service) -> socket.socket:
    url = urlsplit(service.running.base_url)
    return socket.create_connection((url.hostname, url.port), timeout=10)


def test_headers_without_end_are_refused_before_they_fill_the_memory(service):
    with connect(service) as line:
        line.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\nx-a: ")
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            for _ in range(200):
                line.sendall(b"a" * (1 << 18))
                time.sleep(0.001)
    with connect(service) as line:
        line.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n" + b"x-a: b\r\n" * 20_000)
        assert line.recv(100).startswith(b"HTTP/1.1 431 ")
    with connect(service) as line:
        line.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\nx-a: " + b"a" * 30_000 + b"\r\n\r\n")
        assert line.recv(100).startswith(b"HTTP/1.1 200 ")


def test_who_does_not_come_to_the_point_is_hung_up_on(service, monkeypatch):
    monkeypatch.setattr(wary, "HEAD_S", 0.3)
    with connect(service) as silent, connect(service) as slow, connect(service) as second:
        second.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        answer = b""
        while not answer.endswith(b"}"):
            answer += second.recv(65536)
        for line in (slow, second):
            line.sendall(b"GET /health HTTP/1.1\r\n")
        began = time.monotonic()
        for line in (silent, slow, second):
            assert line.recv(1) == b""
        assert time.monotonic() - began < 3
    with connect(service) as patient:  # an answer may take as long as it likes
        service.policy.pause_s = 0.5
        body = json.dumps(ASK).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {service.key()}\r\ncontent-length: {len(body)}\r\n\r\n"
        patient.sendall(head.encode() + body)
        assert patient.recv(100).startswith(b"HTTP/1.1 200 ")


def test_a_full_disk_is_an_outage_of_the_books_or_a_missing_trace_but_no_lost_answer(service, monkeypatch, caplog):
    """Its trace could not be written, so an answer that was charged was a 500, and so was each of its retries."""
    real, secret = service.state.traces.add_many, service.key()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(service.state.traces, "add_many", full)
    for stream in (False, True):
        answer = post(service, secret, CHAT, json={**ASK, "stream": stream})
        assert answer.status_code == 200 and "hello" in answer.text and "error" not in answer.text
    assert caplog.text.count("its trace could not be written: No space left on device") == 2
    assert service.state.ledger.db.read("SELECT COUNT(*) FROM usage WHERE nano_usd > 0")[0][0] == 2
    monkeypatch.setattr(service.state.traces, "add_many", real)
    assert post(service, secret, CHAT, json=ASK).status_code == 200 and len(service.state.traces.nodes) == 2
    monkeypatch.setattr(files.os, "fsync", full)
    answer = post(service, secret, "/v1/files", files={"file": b"x"}, data={"purpose": "batch"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "storage_down")
    assert not list(service.state.files.iterdir())


def test_an_answer_that_is_charged_is_given_though_it_cannot_be_stored(service, monkeypatch, caplog):
    secret = service.key()

    def down(*_):
        raise StorageDown("pulled the plug")

    monkeypatch.setattr(service.state.objects, "put", down)
    for path, body in ((CHAT, {**ASK, "store": True}), ("/v1/responses", {"model": "tide", "input": "x"})):
        for stream in (False, True):
            answer = post(service, secret, path, json={**body, "stream": stream})
            assert answer.status_code == 200 and "hello" in answer.text and "storage_down" not in answer.text
    assert caplog.text.count("could not be stored: pulled the plug") == 3  # a streamed completion is not stored
    assert service.state.ledger.db.read("SELECT COUNT(*) FROM usage WHERE nano_usd > 0")[0][0] == 4
