"""A `Policy` over any OpenAI-compatible chat endpoint.

Text goes in between, so its ids are our own rendering of what came back: usable to show and to fine-tune on, never for
RL (`exact` is False, log-probabilities are 0, the weights version is -1).
"""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

import aiohttp

from tidelock.tokens.message import Message, ToolCall
from tidelock.tokens.policy import Chunk, PolicyError, Reported, SamplingParams
from tidelock.tokens.template import Template, canonical

from .sse import Endpoint


def to_wire(message: Message) -> dict[str, Any]:
    """A message as the chat-completions wire spells it. Tools travel outside the messages."""
    out: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning:
        out["reasoning_content"] = message.reasoning
    if message.tool_calls:
        out["tool_calls"] = [
            {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": json.dumps(c.arguments)}}
            for c in message.tool_calls
        ]
    if message.role == "tool":
        out["tool_call_id"] = message.tool_call_id
    return out


class TextPolicy:
    """`template` turns ids into messages and back; it need not be the server's. `metadata` goes with every request."""

    exact = False

    def __init__(
        self, base_url: str, api_key: str, model: str, template: Template, metadata: dict[str, str] | None = None,
        session: aiohttp.ClientSession | None = None,
    ) -> None:  # fmt: skip
        self._server, self.model = Endpoint(base_url, api_key, session), model
        self.template, self.metadata = template, metadata or {}
        self.last: dict[str, Any] = {}  # id, usage and trace of the last answer
        self._aborted: set[str] = set()

    async def generate(
        self, prompt_ids: Sequence[int], params: SamplingParams, request_id: str | None = None
    ) -> AsyncIterator[Chunk]:
        messages = self.template.parse(prompt_ids[: len(prompt_ids) - len(self.template.generation_prompt())])
        answer, name = _Answer(), request_id or uuid.uuid4().hex
        try:
            async for event in self._server.events("/chat/completions", self._body(messages, params), name):
                answer.take(event)
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise self._server.broken(f"an event is no chat completion chunk ({e!r})") from None
        if name in self._aborted:
            self._aborted.discard(name)
            yield Chunk((), (), -1, "abort")
            return
        if answer.finish_reason is None:
            raise self._server.broken("the stream ended without a finish reason")
        self.last = {"id": answer.id, "usage": answer.usage, "trace": answer.trace}
        ids = self.template.sampled(canonical([*messages, answer.message()])[-1])
        finish = "length" if answer.finish_reason == "length" else "stop"
        reported = Reported.of(answer.usage or None)
        cached = (reported and reported.cached_tokens) or 0
        yield Chunk(tuple(ids), (0.0,) * len(ids), -1, finish, cached, reported=reported)

    def _body(self, messages: Sequence[Message], params: SamplingParams) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [to_wire(m) for m in messages],
            "max_tokens": params.max_tokens,
            "temperature": params.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if params.top_p < 1:  # a server that fixes it (Kimi's contract) refuses to be told
            body["top_p"] = params.top_p
        if tools := [t.openai() for m in messages for t in m.tools]:
            body["tools"] = tools
        if params.seed is not None:
            body["seed"] = params.seed % (1 << 53)
        if self.metadata:
            body["metadata"] = self.metadata
        return body

    async def count(self, prompt_ids: Sequence[int]) -> int:
        return len(prompt_ids)

    async def abort(self, request_id: str) -> None:
        """Hangs up, which is the only abort a text endpoint knows. What it has said so far is no message and is lost."""
        if self._server.cut(request_id):
            self._aborted.add(request_id)

    async def swap(self, checkpoint: str, version: int) -> None:
        raise PolicyError("a text endpoint's weights are its owner's to change", status=400, kind="invalid_request_error")


class _Answer:
    """Collects the deltas of one streamed completion."""

    def __init__(self) -> None:
        self.id = ""
        self.reasoning = self.content = ""
        self.calls: dict[int, dict[str, str]] = {}
        self.finish_reason: str | None = None
        self.usage: dict[str, Any] = {}
        self.trace: dict[str, Any] = {}

    def take(self, event: dict[str, Any]) -> None:
        self.id = event.get("id") or self.id
        self.usage = event.get("usage") or self.usage
        self.trace = event.get("trace") or self.trace
        for choice in event.get("choices") or []:
            delta = choice.get("delta") or {}
            self.reasoning += delta.get("reasoning_content") or ""
            self.content += delta.get("content") or ""
            for part in delta.get("tool_calls") or []:
                call = self.calls.setdefault(part.get("index", 0), {"id": "", "name": "", "arguments": ""})
                function = part.get("function") or {}
                call["id"] = part.get("id") or call["id"]
                call["name"] = function.get("name") or call["name"]
                call["arguments"] += function.get("arguments") or ""
            self.finish_reason = choice.get("finish_reason") or self.finish_reason

    def message(self) -> Message:
        calls = tuple(ToolCall(c["id"], c["name"], _arguments(c["arguments"])) for _, c in sorted(self.calls.items()))
        return Message("assistant", self.content, self.reasoning, calls)


def _arguments(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
