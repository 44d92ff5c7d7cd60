"""The seven cases of the OpenResponses compliance suite, against a server of ours, judged by the suite's own schemas.

    python -m benchmarks.open_responses --spec openapi.json            # public/openapi/openapi.json of openresponses/openresponses
    python -m benchmarks.open_responses --spec openapi.json --url http://127.0.0.1:8000/v1 --key sk-… --model tide-nano

The suite itself runs under bun from a checkout; these are its requests and its demands, for a machine that has only the
specification. Without --url a server is started whose model follows a script: it calls the first tool there is, or says
hello. The profile is lenient, because the suite's image case demands an answer of every model; a strict server refuses
the picture by name (`tests/service/test_media.py`).
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import struct
import sys
import tempfile
import zlib
from collections.abc import Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import jsonschema

from benchmarks.agent_script import AgentScript
from tidelock.loop.rundir import MODEL, PRICES
from tidelock.service.server import serving
from tidelock.service.state import open_state
from tidelock.tokens.message import Message, ToolCall
from tidelock.tokens.template import declared_tools, get_template
from tidelock.tokens.tokenizer import ByteTokenizer
from tidelock.tokens.turn import call_id

WEATHER = {
    "type": "function", "name": "get_weather", "description": "Get the current weather for a location",
    "parameters": {"type": "object", "properties": {"location": {"type": "string"}}, "required": ["location"]},
}  # fmt: skip
ENDS = ("response.completed", "response.failed", "response.incomplete")
CALL_EVENTS = ("response.function_call_arguments.delta", "response.function_call_arguments.done")


def _png() -> str:
    """One red point."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header, point = struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0), zlib.compress(b"\0\xff\0\0")
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", point) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(data).decode()


def _said(role: str, content: Any) -> dict[str, Any]:
    return {"type": "message", "role": role, "content": content}


PICTURE = [{"type": "input_text", "text": "What do you see?"}, {"type": "input_image", "image_url": _png()}]
WHETHER = [_said("user", "What's the weather like in San Francisco?")]
TALK = [_said("user", "My name is Alice."), _said("assistant", "Hello Alice!"), _said("user", "What is my name?")]
CASES: dict[str, dict[str, Any]] = {
    "basic-response": {"input": [_said("user", "Say hello in exactly 3 words.")]},
    "streaming-response": {"input": [_said("user", "Count from 1 to 5.")], "stream": True},
    "system-prompt": {"input": [_said("system", "You are a pirate."), _said("user", "Say hello.")]},
    "tool-calling": {"input": WHETHER, "tools": [WEATHER]},
    "tool-calling-streaming": {"input": WHETHER, "tools": [WEATHER], "stream": True},
    "image-input": {"input": [_said("user", PICTURE)]},
    "multi-turn": {"input": TALK},
}


def answer(messages: Sequence[Message]) -> Message:
    tools = declared_tools(messages)
    if not tools:
        return Message("assistant", "Hello, dear you.", "A greeting will do.")
    arguments = {name: "San Francisco" for name in tools[0].parameters.get("required", ())}
    return Message("assistant", "", "The tool knows.", (ToolCall(call_id(tools[0].name, 0), tools[0].name, arguments),))


@asynccontextmanager
async def own_server():
    template = get_template("xtml", ByteTokenizer())
    with tempfile.TemporaryDirectory() as directory:
        state = open_state(
            directory, policy=AgentScript(template, answer), template=template, prices=PRICES, model=MODEL,
            context_length=1 << 16, weights_version=1, lenient=True,
        )  # fmt: skip
        _, key = state.keys.create("ann")
        state.ledger.topup("ann", 10**12)
        async with serving(state) as running:
            yield running.base_url, key


class Spec:
    def __init__(self, path: Path) -> None:
        self._doc = json.loads(path.read_text())

    def faults(self, name: str, value: Any) -> list[str]:
        schema = {"$ref": f"#/components/schemas/{name}", "components": self._doc["components"]}
        found = jsonschema.Draft202012Validator(schema).iter_errors(value)
        return [f"{name}{e.json_path[1:]}: {e.message[:150]}" for e in found]

    def event_faults(self, event: dict[str, Any]) -> list[str]:
        for name, schema in self._doc["components"]["schemas"].items():
            if name.endswith("StreamingEvent") and schema["properties"]["type"]["enum"] == [event.get("type")]:
                return self.faults(name, event)
        return [f"no event is of type {event.get('type')!r}"]


async def judge(http: aiohttp.ClientSession, url: str, model: str, name: str, spec: Spec) -> list[str]:
    """What is wrong with the answer to a case."""
    body = CASES[name]
    async with http.post(f"{url}/responses", json={"model": model, **body}) as response:
        text = await response.text()
        if response.status != 200:
            return [f"HTTP {response.status}: {text[:300]}"]
    faults: list[str] = []
    events: list[dict[str, Any]] = []
    if body.get("stream"):
        texts = [line[5:].strip() for line in text.splitlines() if line.startswith("data:")]
        events = [json.loads(data) for data in texts if data != "[DONE]"]
        faults += [fault for event in events for fault in spec.event_faults(event)]
        final = next((event["response"] for event in reversed(events) if event["type"] in ENDS), None)
    else:
        final = json.loads(text)
    faults += spec.faults("ResponseResource", final)
    if not final or not final["output"]:
        return [*faults, "no output"]
    if "tools" in body:
        if all(item["type"] != "function_call" for item in final["output"]):
            faults.append("no function_call in the output")
        if body.get("stream"):
            seen = {(event["type"], event.get("item", {}).get("type")) for event in events}
            wanted = {(f"response.output_item.{end}", "function_call") for end in ("added", "done")}
            faults += [f"no event {kind}" for kind in sorted(wanted | {(kind, None) for kind in CALL_EVENTS}) if kind not in seen]
    elif final["status"] != "completed":
        faults.append(f"status {final['status']}")
    return faults


async def run(url: str, key: str, model: str, spec: Spec) -> int:
    failed = 0
    async with aiohttp.ClientSession(headers={"authorization": f"Bearer {key}"}) as http:
        for name in CASES:
            faults = await judge(http, url, model, name, spec)
            failed += bool(faults)
            print(f"{name:<24} {'FAIL' if faults else 'ok'}")
            for fault in faults:
                print(f"    {fault}")
    print(f"{len(CASES) - failed} of {len(CASES)}")
    return failed


async def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spec", type=Path, required=True)
    parser.add_argument("--url")
    parser.add_argument("--key", default="")
    parser.add_argument("--model", default=MODEL)
    args = parser.parse_args()
    spec = Spec(args.spec)
    if args.url:
        return await run(args.url, args.key, args.model, spec)
    async with own_server() as (url, key):
        return await run(url, key, args.model, spec)


if __name__ == "__main__":
    sys.exit(bool(asyncio.run(main())))
