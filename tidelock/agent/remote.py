"""A `Policy` over any OpenAI-compatible chat endpoint.

Text goes in between, so its ids are our own rendering of what came back: usable to show and to fine-tune on, never for
RL (`exact` is False, log-probabilities are 0, the weights version is -1).
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

import aiohttp

from tidelock.tokens.message import Message, ToolCall
from tidelock.tokens.policy import Chunk, PolicyError, SamplingParams
from tidelock.tokens.template import Template, canonical


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
        self.base_url, self.api_key, self.model = base_url.rstrip("/"), api_key, model
        self.template, self.metadata = template, metadata or {}
        self.last: dict[str, Any] = {}  # id, usage and trace of the last answer
        self._session = session

    async def generate(
        self, prompt_ids: Sequence[int], params: SamplingParams, request_id: str | None = None
    ) -> AsyncIterator[Chunk]:
        messages = self.template.parse(prompt_ids[: len(prompt_ids) - len(self.template.generation_prompt())])
        tools = [t.openai() for m in messages for t in m.tools]
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
        if tools:
            body["tools"] = tools
        if params.seed is not None:
            body["seed"] = params.seed % (1 << 53)
        if self.metadata:
            body["metadata"] = self.metadata
        answer = _Answer()
        try:
            async for event in self._events(body):
                answer.take(event)
        except (aiohttp.ClientError, TimeoutError) as e:
            raise PolicyError(f"{self.base_url}: {str(e) or type(e).__name__}", status=502, kind="connection") from None
        if answer.finish_reason is None:
            raise PolicyError(f"{self.base_url}: the stream ended without a finish reason", status=502, kind="connection")
        self.last = {"id": answer.id, "usage": answer.usage, "trace": answer.trace}
        ids = self.template.sampled(canonical([*messages, answer.message()])[-1])
        finish = "length" if answer.finish_reason == "length" else "stop"
        cached = (answer.usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
        yield Chunk(tuple(ids), (0.0,) * len(ids), -1, finish, cached)

    async def _events(self, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Server-sent events of one completion. Raises PolicyError for an error answer or event."""
        session = self._session or aiohttp.ClientSession()
        headers = {"Authorization": f"Bearer {self.api_key}"}
        try:
            async with session.post(f"{self.base_url}/chat/completions", json=body, headers=headers) as response:
                if response.status != 200:
                    raise _refusal(response.status, await response.text(), self.base_url)
                async for line in response.content:
                    if not line.startswith(b"data:") or line[5:].strip() == b"[DONE]":
                        continue
                    event = json.loads(line[5:])
                    if event.get("error"):
                        raise _refusal(500, json.dumps(event), self.base_url)
                    yield event
        finally:
            if session is not self._session:
                await session.close()

    async def count(self, prompt_ids: Sequence[int]) -> int:
        return len(prompt_ids)

    async def abort(self, request_id: str) -> None:
        """Closing the stream is the only abort a text endpoint knows."""

    async def swap(self, checkpoint: str, version: int) -> None:
        raise PolicyError("a text endpoint's weights are its owner's to change", status=400, kind="invalid_request_error")


def _refusal(status: int, text: str, base_url: str) -> PolicyError:
    try:
        error = json.loads(text)["error"]
        return PolicyError(str(error.get("message", error)), status=status, kind=str(error.get("type", "error")))
    except (ValueError, KeyError, TypeError, AttributeError):
        return PolicyError(f"{base_url} answered {status}: {text[:200]}", status=status, kind="error")


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
