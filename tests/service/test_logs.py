"""The log: one access line per request, every line under the request's id, and never a secret or a client's word."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import sys
from contextlib import suppress

import httpx2 as httpx
import pytest

from tidelock.service import logs
from tidelock.service.db import StorageDown
from tidelock.service.record import Record, recording
from tidelock.tokens.message import Message

WORD = "xyzzyplugh"  # of every prompt, tool, path and name below
ASK = {"model": "tide", "messages": [{"role": "user", "content": f"say {WORD}"}]}


@pytest.fixture
def log(service):
    """What the server writes, as JSON lines at level info."""
    root, ours = logging.getLogger(), logging.getLogger("tidelock")
    before = root.handlers[:], root.level, ours.level
    stream = io.StringIO()
    service.state.access_log = logs.configure("json", "info", stream)
    yield lambda: [line for line in map(json.loads, stream.getvalue().splitlines()) if not line["logger"].startswith("httpx")]
    service.state.access_log = None
    root.handlers[:], _, _ = before
    root.setLevel(before[1])
    ours.setLevel(before[2])


def access(log, **fields):
    return [line for line in log() if line["logger"] == logs.ACCESS and all(line.get(k) == v for k, v in fields.items())]


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_has_one_line_with_what_it_used_and_cost(service, log, stream):
    secret = service.key()
    service.policy.cached_tokens = 3
    with httpx.Client(base_url=service.running.base_url, headers={"authorization": f"Bearer {secret}"}) as http:
        answer = http.post("/chat/completions", json={**ASK, "stream": stream})
    service.wait(lambda: access(log))
    (line,) = access(log)
    (row,) = service.state.ledger.db.read("SELECT * FROM usage")
    assert line["request_id"] == answer.headers["x-request-id"] == row["request_id"]
    assert (line["customer"], line["model"], line["status"], line["route"]) == ("ann", "tide", 200, "/v1/chat/completions")
    assert line["key"] == row["key_id"] and line["finish_reason"] == row["finish_reason"] == "stop"
    told = ("prompt_tokens", "cached_tokens", "completion_tokens", "nano_usd")
    assert [line[name] for name in told] == [row[name] for name in told] and line["cached_tokens"] == 3
    parts = [line[f"{part}_ms"] for part in ("hold", "generate", "settle", "trace")]
    assert all(part > 0 for part in parts) and line["hold_ms"] < line["first_token_ms"] <= line["total_ms"]


def test_no_line_of_many_failing_requests_holds_a_secret_or_a_clients_word(service, log, monkeypatch, tmp_path):
    secrets = [service.key(), service.key("bob", 0), "sk-" + WORD, "sk-tl-guess-" + WORD]
    root = service.running.base_url.removesuffix("/v1")
    bodies = [ASK, {**ASK, "stream": True}, {**ASK, "model": WORD}, {**ASK, "stop": [WORD] * 9}, {**ASK, "max_tokens": 10**6},
              {**ASK, "tool_choice": WORD}, {**ASK, "tools": [{"type": "function", "function": {"name": f"!{WORD}"}}]},
              {**ASK, "metadata": {"training_consent": WORD}}, {"model": WORD}, {**ASK, "logit_bias": {WORD: 1}},
              {**ASK, "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": WORD}}}}]  # fmt: skip
    paths = ["/v1/chat/completions", "/v1/responses", "/v1/messages", f"/v1/{WORD}", f"/v1/files/{WORD}", f"/v1/models/{WORD}",
             f"/v1/responses/{WORD}", "/v1/feedback", "/webhooks/payments", "/admin/weights", "/inference/v1/generate"]  # fmt: skip
    asked = 0
    with httpx.Client(timeout=20) as http:

        def send(path, secret, content):
            nonlocal asked
            asked += 1
            headers = {"authorization": f"Bearer {secret}", "x-api-key": secret, "idempotency-key": f"{WORD}{asked % 50}"}
            with suppress(httpx.HTTPError):
                http.post(root + path, content=content, headers=headers, params={"after": WORD})

        for path in paths:
            for secret in secrets:
                send(path, secret, f'{{"model": "{WORD}", "messages": [{{'.encode())
                send(path, secret, json.dumps(ASK).encode())
        for body in bodies:
            send("/v1/chat/completions", secrets[0], json.dumps(body).encode())

        def quoting(*args, **options):
            raise ValueError(f"what is {WORD} {secrets[0]}?") from RuntimeError(secrets[0])

        for where, name in ((service.policy, "generate"), (service.policy, "count"), (service.state.keys, "authenticate"),
                            (service.state.traces, "add_many"), (service.state.till, "settle")):  # fmt: skip
            with monkeypatch.context() as patch:
                patch.setattr(where, name, quoting)
                for body in bodies[:2]:
                    send("/v1/chat/completions", secrets[0], json.dumps(body).encode())
        with monkeypatch.context() as patch:
            patch.setattr(service.state.keys, "authenticate", lambda _: (_ for _ in ()).throw(StorageDown("away")))
            send("/v1/chat/completions", secrets[0], json.dumps(ASK).encode())
        service.policy.fail_after = 1
        for body in bodies[:2]:
            send("/v1/chat/completions", secrets[0], json.dumps({**body, "max_tokens": 40}).encode())
    service.wait(lambda: len(access(log)) >= asked)
    lines = log()
    text = json.dumps(lines)
    assert WORD not in text and "sk-" not in text
    assert len(access(log)) == asked == len({line["request_id"] for line in access(log)})
    statuses = {line["status"] for line in access(log)}
    assert {200, 400, 401, 403, 404, 429, 500, 503} <= statuses
    assert all("error" in line for line in access(log) if line["status"] >= 400)
    told = [line for line in lines if "exception" in line]
    assert any("ValueError at test_logs.py" in line["exception"] and "from RuntimeError" in line["exception"] for line in told)
    failed = {line["request_id"] for line in access(log) if line["status"] == 500}
    assert failed and failed <= {line["request_id"] for line in told if "request_id" in line}


def test_a_client_that_left_is_in_the_line(service, log):
    service.policy.turns = [Message("assistant", WORD * 60)]
    service.policy.pause_s = 0.02
    headers = {"authorization": f"Bearer {service.key()}"}
    body = {**ASK, "stream": True, "max_tokens": 2000}
    with httpx.Client() as http, http.stream("POST", service.running.base_url + "/chat/completions", json=body, headers=headers) as answer:
        next(answer.iter_bytes())
    service.wait(lambda: access(log))
    (line,) = access(log)
    assert line["status"] == 200 and line["finish_reason"] == "abort" and 0 < line["completion_tokens"] < 600
    assert WORD not in json.dumps(log())


def test_every_line_of_a_request_has_its_id_in_tasks_it_starts_too(log):
    async def child(name):
        await asyncio.sleep(0)
        logging.getLogger("tidelock.somewhere").warning("seen by %s", name)

    async def request(name):
        with recording(Record(name)):
            await asyncio.gather(asyncio.create_task(child(name)), asyncio.to_thread(logging.getLogger("other").warning, "seen by %s", name))

    async def both():
        await asyncio.gather(request("req_a"), request("req_b"))

    asyncio.run(both())
    assert sorted((line["event"], line["request_id"]) for line in log()) == [
        ("seen by req_a", "req_a"), ("seen by req_a", "req_a"), ("seen by req_b", "req_b"), ("seen by req_b", "req_b"),
    ]  # fmt: skip


def test_exceptions_say_what_they_mean_at_level_debug_only():
    try:
        raise KeyError(WORD)
    except KeyError:
        made = logging.LogRecord("x", logging.ERROR, "", 0, "it failed", (), sys.exc_info())
    assert WORD not in logs.Lines(True).format(made) and "KeyError at test_logs.py" in logs.Lines(True).format(made)
    assert WORD in logs.Lines(True, messages=True).format(made)


@pytest.mark.parametrize("as_json", [True, False])
def test_half_a_character_and_odd_values_still_make_a_line(as_json):
    line = logs.Lines(as_json).line(1.25, "info", "x", "half \udcff", {"value": {1, 2}})
    assert "half" in line and "1970-01-01T00:00:01.250Z" in line


def test_levels():
    stream = io.StringIO()
    log = logs.AccessLog(logs.Lines(False), stream, logging.WARNING)
    log.say({"status": 200})
    assert stream.getvalue() == ""
    log.say({"status": 200}, "error")
    assert stream.getvalue().endswith("request status=200\n") and " error " in stream.getvalue()


def test_without_a_log_there_are_warnings_that_quote_nobody(service, log):
    """The default: it left exceptions to Python, which prints what they say, and they may say what a client sent."""
    stream = io.StringIO()
    assert logs.configure("off", stream=stream) is None
    service.policy.template.sampled = None  # an unexpected failure, with the prompt in its hands
    try:
        asked = {**ASK, "thinking": {"type": "disabled"}}
        headers = {"authorization": f"Bearer {service.key()}"}
        assert httpx.post(service.running.base_url + "/chat/completions", headers=headers, json=asked).status_code == 500
        try:
            raise KeyError(WORD)
        except KeyError:
            logging.getLogger("tidelock.x").exception("it failed")
    finally:
        del service.policy.template.sampled
    logging.getLogger("tidelock.x").info("not told")
    said = stream.getvalue()
    assert "it failed" in said and "KeyError at test_logs.py" in said and "not told" not in said
    assert WORD not in said and "Traceback" not in said
