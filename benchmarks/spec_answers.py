"""Every kind of answer, whole and streamed, held against the schemas that OpenAI and Anthropic publish of their APIs.

    python -m benchmarks.spec_answers --openai openapi.json --anthropic anthropic.json

The first is openapi.json of openai/openai-openapi; the second Anthropic's own document, which the package llm-comply
carries (llm_comply/specs/anthropic.json). Each answer is judged by the schema of its operation and each event of a stream
by the one of its type, in both profiles. Exits with 1 if one is not as published.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import jsonschema

from benchmarks.sdk_suites import served
from tidelock.loop.rundir import MODEL

KEY = "sk-test"
PLACE = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"], "additionalProperties": False}
ASKED = "Use the weather tool for 'Paris'."
HI = [{"role": "user", "content": "Say hi."}]
CALL = [{"role": "user", "content": ASKED}]
CHAT_TOOL = {"type": "function", "function": {"name": "weather", "description": "The weather of a city", "parameters": PLACE}}
TOOL = {"type": "function", "name": "weather", "description": "The weather of a city", "parameters": PLACE, "strict": True}
MESSAGES_TOOL = {"name": "weather", "description": "The weather of a city", "input_schema": PLACE}
CUSTOM = {"type": "custom", "name": "note", "description": "Takes a note"}
SCHEMA = {"type": "json_schema", "name": "place", "schema": PLACE, "strict": True}
CHAT_SCHEMA = {"type": "json_schema", "json_schema": {"name": "place", "schema": PLACE, "strict": True}}
TEXT = [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Say hi."}]}]


@dataclass(frozen=True)
class Case:
    """`lenient`: only for that profile."""

    path: str
    body: dict[str, Any]
    lenient: bool = False
    status: int = 200
    name: str = ""
    stream: tuple[bool, ...] = field(default=(False, True))


CHAT = [
    Case("/v1/chat/completions", {"messages": HI, **more}, lenient=lenient)
    for more, lenient in (
        ({}, False),
        ({"stream_options": {"include_usage": True}}, False),
        ({"logprobs": True, "top_logprobs": 2}, False),
        ({"n": 2}, True),
        ({"max_completion_tokens": 3}, False),
        ({"thinking": {"type": "disabled"}}, False),
        ({"response_format": CHAT_SCHEMA}, False),
        ({"messages": CALL, "tools": [CHAT_TOOL]}, False),
        ({"messages": CALL, "tools": [CHAT_TOOL], "tool_choice": "required", "parallel_tool_calls": False}, False),
        ({"messages": CALL, "tools": [CHAT_TOOL], "tool_choice": {"type": "function", "function": {"name": "weather"}}}, True),
        ({"store": True, "metadata": {"a": "b"}}, False),
        ({"service_tier": "auto", "user": "u", "seed": 3, "prompt_cache_key": "k", "safety_identifier": "s"}, False),
    )
]
RESPONSES = [
    Case("/v1/responses", {"input": "Say hi.", **more}, lenient=lenient)
    for more, lenient in (
        ({}, False),
        ({"input": TEXT, "instructions": "Be kind."}, False),
        ({"reasoning": {"effort": "none"}}, False),
        ({"reasoning": {"effort": "low", "summary": "auto"}}, False),
        ({"include": ["reasoning.encrypted_content"], "store": False}, False),
        ({"include": ["message.output_text.logprobs"], "top_logprobs": 2}, False),
        ({"max_output_tokens": 16}, False),
        ({"text": {"format": SCHEMA, "verbosity": "low"}}, False),
        ({"text": {"format": {"type": "json_object"}}}, False),
        ({"input": ASKED, "tools": [TOOL]}, False),
        ({"input": ASKED, "tools": [TOOL], "tool_choice": {"type": "function", "name": "weather"}}, False),
        ({"input": ASKED, "tools": [TOOL], "tool_choice": {"type": "allowed_tools", "mode": "required",
                                                           "tools": [{"type": "function", "name": "weather"}]}}, False),
        ({"input": ASKED, "tools": [CUSTOM], "tool_choice": "required"}, False),
        ({"metadata": {"a": "b"}, "truncation": "auto", "service_tier": "auto", "safety_identifier": "s",
          "prompt_cache_key": "k", "max_tool_calls": 2}, False),
    )
]  # fmt: skip
MESSAGES = [
    Case("/v1/messages", {"messages": HI, "max_tokens": 2000, **more}, lenient=lenient)
    for more, lenient in (
        ({}, False),
        ({"thinking": {"type": "disabled"}}, False),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, False),
        ({"system": [{"type": "text", "text": "Be kind.", "cache_control": {"type": "ephemeral"}}]}, False),
        ({"max_tokens": 3}, False),
        ({"stop_sequences": ["said"]}, False),
        ({"messages": CALL, "tools": [MESSAGES_TOOL]}, False),
        ({"messages": CALL, "tools": [MESSAGES_TOOL], "tool_choice": {"type": "any", "disable_parallel_tool_use": True}}, False),
        ({"output_config": {"format": {"type": "json_schema", "schema": PLACE}}}, False),
    )
]
OTHERS = [
    Case("/v1/messages/count_tokens", {"messages": HI}, stream=(False,)),
    Case("/v1/responses/input_tokens", {"input": "Say hi."}, stream=(False,)),
    Case("/v1/responses/compact", {"input": TEXT}, stream=(False,)),
    Case("/v1/messages", {"messages": []}, status=400, stream=(False,)),
    Case("/v1/messages", {"messages": HI, "max_tokens": 0}, status=400, stream=(False,)),
]
# The document has no null here; the API that it describes sends one, and OpenResponses' document demands it.
AS_THEY_DO = (".response.usage: None is not of type 'object'", ".text.format.description: None is not of type 'string'")
CASES = [*CHAT, *RESPONSES, *MESSAGES, *OTHERS]


class Published:
    """The documents. A path is Anthropic's if only that document knows it."""

    def __init__(self, openai: Path, anthropic: Path) -> None:
        self._openai, self._anthropic = _read(openai), _read(anthropic)

    def faults(self, case: Case, status: int, value: Any) -> list[str]:
        if case.path in self._anthropic["paths"]:
            doc, path = self._anthropic, case.path
        else:
            doc, path = self._openai, case.path.removeprefix("/v1")
        answers = doc["paths"][path]["post"]["responses"]
        answer = answers.get(str(status)) or answers["4XX"]
        return self._judged(doc, answer["content"]["application/json"]["schema"], value)

    def event_faults(self, case: Case, event: dict[str, Any]) -> list[str]:
        kind = event.get("type", "")
        if case.path.startswith("/v1/messages"):
            return self._judged(self._anthropic, self._of_type(self._anthropic, "MessageStreamEvent", kind), event)
        if case.path == "/v1/responses":
            return self._judged(self._openai, self._of_type(self._openai, "ResponseStreamEvent", kind), event)
        return self._judged(self._openai, {"$ref": "#/components/schemas/CreateChatCompletionStreamResponse"}, event)

    @staticmethod
    def _of_type(doc: dict[str, Any], union: str, kind: str) -> dict[str, Any]:
        """The member of a union of events for a type; the union says too little of what is wrong."""
        schemas = doc["components"]["schemas"]
        members = schemas[union].get("anyOf") or schemas[union]["oneOf"]
        for member in members:
            told = schemas[member["$ref"].rpartition("/")[2]]["properties"]["type"]
            if kind in told.get("enum", [told.get("const")]):
                return member
        return {"not": {}}

    @staticmethod
    def _judged(doc: dict[str, Any], schema: dict[str, Any], value: Any) -> list[str]:
        found = jsonschema.Draft202012Validator({**schema, "components": doc["components"]}).iter_errors(value)
        return [fault for error in found for fault in _leaves(error) if not fault.endswith(AS_THEY_DO)]


def _read(path: Path) -> dict[str, Any]:
    """The document; OpenAI's says null in the words of OpenAPI 3.0 still, which its version, 3.1, does not know."""

    def read(node: dict[str, Any]) -> dict[str, Any]:
        return {"anyOf": [node, {"type": "null"}]} if node.pop("nullable", False) is True else node

    return json.loads(path.read_text(), object_hook=read)


def _leaves(error: jsonschema.ValidationError) -> Iterator[str]:
    """Of a union the faults of the member that comes closest."""
    if not error.context:
        yield f"{error.json_path}: {error.message[:120]}"
        return
    members: dict[Any, list[jsonschema.ValidationError]] = {}
    for inner in error.context:
        members.setdefault(inner.schema_path[0], []).append(inner)
    for inner in min(members.values(), key=lambda found: (any(e.json_path.endswith(".type") for e in found), len(found))):
        yield from _leaves(inner)


async def ask(http: aiohttp.ClientSession, url: str, case: Case, stream: bool) -> tuple[int, list[dict[str, Any]]]:
    body = {"model": MODEL, **case.body, **({"stream": True} if stream else {})}
    headers = {"authorization": f"Bearer {KEY}", "anthropic-version": "2023-06-01"}
    async with http.post(url + case.path, json=body, headers=headers) as answer:
        text = await answer.text()
    if not text.startswith(("data:", "event:")):
        return answer.status, [json.loads(text)]
    lines = [line[5:].strip() for line in text.splitlines() if line.startswith("data:")]
    return answer.status, [json.loads(line) for line in lines if line != "[DONE]"]


async def measure(url: str, published: Published, lenient: bool) -> int:
    wrong = 0
    async with aiohttp.ClientSession() as http:
        for case in (case for case in CASES if lenient or not case.lenient):
            for stream in case.stream:
                status, docs = await ask(http, url, case, stream)
                if status != case.status:
                    faults = [f"status {status}: {docs[0]}"]
                elif stream:
                    faults = [f"{doc.get('type', 'chunk')} {fault}" for doc in docs for fault in published.event_faults(case, doc)]
                else:
                    faults = published.faults(case, status, docs[0])
                wrong += bool(faults)
                words = json.dumps({k: v for k, v in case.body.items() if k not in ("messages", "input")})
                print(f"{case.path:<26} {'stream' if stream else 'whole':<7} {'FAIL' if faults else 'ok':<5} {words[:110]}")
                for fault in dict.fromkeys(faults):
                    print(f"    {fault}")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--openai", type=Path, required=True)
    parser.add_argument("--anthropic", type=Path, required=True)
    args = parser.parse_args()
    published, wrong = Published(args.openai, args.anthropic), 0
    for lenient in (False, True):
        print("lenient" if lenient else "strict")
        with served("--able", *(["--lenient"] if lenient else [])) as url:
            wrong += asyncio.run(measure(url, published, lenient))
    print(f"{wrong} answers are not as published")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
