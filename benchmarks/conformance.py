"""A server for other people's test suites: a nano model, the keys they use, the stored objects they ask for.

    python -m benchmarks.conformance --port 4010 --lenient            # untrained: `benchmarks.sdk_suites` starts one like it
    python -m benchmarks.conformance --port 4010 --able               # with `suite_mind`, which does what is plainly asked

Then, for one, in a checkout of MoonshotAI/Kimi-Vendor-Verifier:

    KIMI_BASE_URL=http://127.0.0.1:4010/v1 KIMI_API_KEY=sk-test pytest --smoke-model tide-nano --think-mode kimi \
        tests/params tests/k3_features tests/tool_call_json_schema
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial

import aiohttp
import torch
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from benchmarks.suite_mind import SuiteMind
from tidelock.engine import Engine, Limits
from tidelock.loop.rundir import MODEL, PRICES
from tidelock.models import TransformerLM, preset
from tidelock.service.accounts import SCOPES
from tidelock.service.app import create_app
from tidelock.service.server import serving
from tidelock.service.state import ServiceState, open_state
from tidelock.service.surfaces import batches, conversations, files, message_batches, responses_items, stored_chat
from tidelock.tokens.template import get_template
from tidelock.tokens.tokenizer import ByteTokenizer

KEYS = ("My API Key", "My Admin API Key", "my-anthropic-api-key", "My Auth Token", "sk-test")
CUSTOMER, CONTEXT = "suite", 16384
ABLE_CONTEXT, ABLE_ANSWER = 1 << 17, 2048  # of the mind that is no model: suites ask for 32 K of answer
RESPONSES = ("response_id", "resp_677efb5139a88190b512bc3fef8e535d", "previous_response_id", "resp_123")
CONVERSATIONS = ("conv_123", "string")
ITEM = {"id": "msg_abc", "type": "message", "role": "user", "status": "completed",
        "content": [{"type": "input_text", "text": "hi"}]}  # fmt: skip
BATCH = {
    "id": "batch_id", "object": "batch", "endpoint": "/v1/chat/completions", "input_file_id": "file_id", "status": "in_progress",
    "completion_window": "24h", "created_at": 1, "cancelling_at": None, "request_counts": {"total": 0, "completed": 0, "failed": 0},
}  # fmt: skip


def add_keys(state: ServiceState) -> None:
    """The suites' own secrets, which are no secrets: this server is on the loopback interface only."""
    for secret in KEYS:
        key, _ = state.keys.create(CUSTOMER, scopes=SCOPES)
        with state.ledger.db.transaction() as write:
            write("UPDATE keys SET hash = ? WHERE id = ?", (state.keys._hash(secret), key.id))
    state.ledger.topup(CUSTOMER, 10**15)


async def examples(url: str) -> tuple[dict, dict]:
    """A real response and a real chat completion."""
    async with aiohttp.ClientSession(headers={"authorization": f"Bearer {KEYS[0]}"}) as http:
        async with http.post(f"{url}/responses", json={"model": MODEL, "input": "hi", "max_output_tokens": 16}) as answer:
            response = await answer.json()
        body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 16}
        async with http.post(f"{url}/chat/completions", json=body) as answer:
            return response, await answer.json()


class Restoring:
    """The application, with what a request took away back in its place before its sender hears of it: the suites ask for
    the same few ids again and again."""

    def __init__(self, app: ASGIApp, restore: Callable[[], None]) -> None:
        self._app, self._restore = app, restore

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def restored(message: Message) -> None:
            if message["type"] == "http.response.start" and scope["method"] != "GET":
                self._restore()
            await send(message)

        await self._app(scope, receive, restored)


def keep(state: ServiceState, response: dict, completion: dict) -> None:
    """Puts back whatever of the suites' objects is gone."""
    node = response["trace"]["node"]
    answers = [{**response, "id": name, "background": True} for name in RESPONSES]
    docs = [(responses_items.KIND, {"id": doc["id"], "node": node, "input": [], "response": doc}) for doc in answers]
    docs.append((batches.KIND, BATCH))
    ended = {**batches.fresh("message_batch_id", message_batches.ENDPOINT, "message_batch_input", "24h", 24, None),
             "status": "completed", "completed_at": 1}  # fmt: skip
    docs.append((message_batches.KIND, ended))
    talks = [{"id": name, "created_at": 1, "metadata": {}, "items": [ITEM]} for name in CONVERSATIONS]
    docs += [(conversations.KIND, doc) for doc in talks]
    stored = {**completion, "id": "completion_id", "metadata": {}}
    docs.append((stored_chat.KIND, {"id": "completion_id", "completion": stored, "messages": []}))
    with state.ledger.db.transaction() as write:
        for name in RESPONSES:  # which some of the suites ask for as a stream
            write("INSERT INTO background (id, customer, request_id, worker, streamed, cancelled, ended) "
                  "VALUES (?, ?, '', '', 1, 0, ?) ON CONFLICT (id) DO NOTHING", (name, CUSTOMER, time.time()))  # fmt: skip
    there = {row[0] for row in state.ledger.db.read("SELECT id FROM objects WHERE customer = ?", (CUSTOMER,))}
    for kind, doc in docs:
        if doc["id"] not in there:
            state.objects.put(kind, CUSTOMER, doc)
    uploads = [("file_id", files.KIND), ("input_file_id", files.KIND), ("message_batch_input", message_batches.INPUT)]
    for name, kind in uploads:
        if name not in there or not files.path_of(state, name).exists():
            data = b"Example data" if kind == files.KIND else b""
            files.store(state, CUSTOMER, "example.jsonl", "batch", data, name, kind)
    with state.ledger.db.transaction() as write:
        for doc in talks:  # without what a request has said in it
            write("UPDATE objects SET body = ? WHERE id = ?", (json.dumps(doc), doc["id"]))
        keep_account(write)


def keep_account(write) -> None:
    """A project, a key in it and a member, under the names the suites know them by."""
    ours = "organization = ? AND "
    if not write("SELECT 1 FROM projects WHERE id = 'project_id'").fetchone():
        write("INSERT INTO projects (id, organization, name, standard, created) VALUES ('project_id', ?, 'p', 0, 1)",
              (CUSTOMER,))  # fmt: skip
    write(f"UPDATE projects SET archived = NULL WHERE {ours}id = 'project_id'", (CUSTOMER,))
    if not write("SELECT 1 FROM members WHERE id = 'user_id'").fetchone():
        write("INSERT INTO members (id, organization, email, role, created) VALUES ('user_id', ?, 'a@b.cd', 'viewer', 1)",
              (CUSTOMER,))  # fmt: skip
    write(f"UPDATE members SET removed = NULL WHERE {ours}id = 'user_id'", (CUSTOMER,))
    for name in ("key_id", "api_key_id"):
        if not write("SELECT 1 FROM keys WHERE id = ?", (name,)).fetchone():
            write("INSERT INTO keys (id, hash, hint, customer, name, role, training_consent, may_grant, created, project) "
                  "VALUES (?, ?, 'sk-', ?, 'k', 'user', 0, 0, 1, 'project_id')", (name, name, CUSTOMER))  # fmt: skip
        write("UPDATE keys SET revoked = NULL WHERE id = ?", (name,))


async def serve(port: int, lenient: bool, able: bool) -> None:
    template = get_template("xtml", ByteTokenizer())
    model = TransformerLM(preset("nano-k3", template.tokenizer.vocab_size), seed=0)
    limits = Limits(context=CONTEXT)
    engine = Engine(model, 1, limits=limits, boundary_id=template.stop_ids[0], template=template)
    policy = SuiteMind(template, engine) if able else engine
    with tempfile.TemporaryDirectory() as directory:
        state = open_state(
            directory, policy=policy, template=template, prices=PRICES, model=MODEL, weights_version=1, lenient=lenient,
            context_length=ABLE_CONTEXT if able else CONTEXT, default_max_tokens=ABLE_ANSWER if able else 64,
        )  # fmt: skip
        add_keys(state)
        restore: list[Callable[[], None]] = []
        app = Restoring(create_app(state), lambda: [again() for again in restore])
        async with serving(state, port=port, app=app) as running:
            response, completion = await examples(running.base_url)
            restore.append(partial(keep, state, response, completion))
            restore[0]()
            print(f"serving {MODEL} at {running.base_url}", flush=True)
            await running.task


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=4010)
    parser.add_argument("--lenient", action="store_true")
    parser.add_argument("--able", action="store_true", help="answer what is asked, instead of noise")
    args = parser.parse_args()
    torch.set_num_threads(1)
    asyncio.run(serve(args.port, args.lenient, args.able))


if __name__ == "__main__":
    main()
