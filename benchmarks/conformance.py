"""A server for other people's test suites: an untrained nano model, the keys they use, the stored objects they ask for.

    python -m benchmarks.conformance --port 4010 --lenient            # then, in a checkout of openai/openai-python:
    TEST_API_BASE_URL=http://127.0.0.1:4010/v1 pytest tests/api_resources/chat tests/api_resources/test_responses.py
    TEST_API_BASE_URL=http://127.0.0.1:4010 pytest tests/api_resources/test_messages.py     # anthropic-sdk-python

    python -m benchmarks.conformance --port 4010                      # then, in MoonshotAI/Kimi-Vendor-Verifier:
    KIMI_BASE_URL=http://127.0.0.1:4010/v1 KIMI_API_KEY=sk-test pytest tests/params tests/k3_features -k "params or rejected" \
        --smoke-model tide-nano --think-mode kimi
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile

import aiohttp
import torch

from tidelock.engine import Engine, Limits
from tidelock.loop.rundir import MODEL, PRICES
from tidelock.models import TransformerLM, preset
from tidelock.service.errors import ApiError
from tidelock.service.server import serving
from tidelock.service.state import ServiceState, open_state
from tidelock.service.surfaces import batches, files, responses_request, stored_chat
from tidelock.tokens.template import get_template
from tidelock.tokens.tokenizer import ByteTokenizer

KEYS = ("My API Key", "My Admin API Key", "my-anthropic-api-key", "My Auth Token", "sk-test")
CUSTOMER, CONTEXT = "suite", 16384
RESPONSES = ("response_id", "resp_677efb5139a88190b512bc3fef8e535d", "previous_response_id")
BATCH = {
    "id": "batch_id", "object": "batch", "endpoint": "/v1/chat/completions", "input_file_id": "file_id", "status": "in_progress",
    "completion_window": "24h", "created_at": 1, "cancelling_at": None, "request_counts": {"total": 0, "completed": 0, "failed": 0},
}  # fmt: skip


def add_keys(state: ServiceState) -> None:
    """The suites' own secrets, which are no secrets: this server is on the loopback interface only."""
    for secret in KEYS:
        key, _ = state.keys.create(CUSTOMER)
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


async def keep_stored(state: ServiceState, response: dict, completion: dict) -> None:
    """What a suite deletes is there again for its next test."""
    docs = [(responses_request.KIND, {"id": name, "node": response["trace"]["node"], "input": [],
                              "response": {**response, "id": name, "background": True}}) for name in RESPONSES]  # fmt: skip
    docs.append((batches.KIND, BATCH))
    stored = {**completion, "id": "completion_id", "metadata": {}}
    docs.append((stored_chat.KIND, {"id": "completion_id", "completion": stored, "messages": []}))
    while True:
        for kind, doc in docs:
            try:
                state.objects.get(kind, CUSTOMER, doc["id"])
            except ApiError:
                state.objects.put(kind, CUSTOMER, doc)
        for name in ("file_id", "input_file_id"):
            try:
                state.objects.get(files.KIND, CUSTOMER, name)
            except ApiError:
                files.store(state, CUSTOMER, "example.jsonl", "batch", b"Example data", name)
        await asyncio.sleep(0.005)


async def serve(port: int, lenient: bool) -> None:
    template = get_template("xtml", ByteTokenizer())
    model = TransformerLM(preset("nano-k3", template.tokenizer.vocab_size), seed=0)
    limits = Limits(context=CONTEXT)
    engine = Engine(model, 1, limits=limits, boundary_id=template.stop_ids[0], template=template)
    with tempfile.TemporaryDirectory() as directory:
        state = open_state(
            directory, policy=engine, template=template, prices=PRICES, model=MODEL, context_length=CONTEXT, weights_version=1,
            lenient=lenient, default_max_tokens=64,
        )  # fmt: skip
        add_keys(state)
        async with serving(state, port=port) as running:
            response, completion = await examples(running.base_url)
            keeper = asyncio.create_task(keep_stored(state, response, completion))
            print(f"serving {MODEL} at {running.base_url}", flush=True)
            await running.task
            keeper.cancel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=4010)
    parser.add_argument("--lenient", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    asyncio.run(serve(args.port, args.lenient))


if __name__ == "__main__":
    main()
