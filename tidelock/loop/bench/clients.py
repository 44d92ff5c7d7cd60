"""Three ways to talk to a server, one interface: token ids (Tidelock, vLLM), llama.cpp's own, chat completions.

A client turns a conversation's history into the next request and times what streams back. The history is the client's
own affair: ids for the first two, messages for the third.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol

from tidelock.remote.sse import Endpoint
from tidelock.remote.tokens import TokenPolicy
from tidelock.tokens.errors import UserError
from tidelock.tokens.policy import SamplingParams

from .load import Ids, Step, as_text

KINDS = ("tokens", "llama", "chat")


@dataclass
class Measured:
    """One request. `moments` are (seconds, tokens) of what arrived, on the run's clock."""

    begun: float
    moments: list[tuple[float, float]] = field(default_factory=list)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    error: str = ""

    @property
    def ttft(self) -> float:
        return self.moments[0][0] - self.begun

    @property
    def gaps(self) -> list[float]:
        """Seconds between tokens; tokens that arrive together share their gap."""
        out: list[float] = []
        for (a, _), (b, n) in zip(self.moments, self.moments[1:]):
            out += [(b - a) / n] * round(n)
        return out


class Client(Protocol):
    name: str
    kind: str

    def begin(self, opening: Ids) -> Any:
        """A history that starts with `opening`."""
        ...

    async def ask(self, history: Any, step: Step, into: Measured) -> Any:
        """One step; returns the longer history. Raises PolicyError; `into` then holds what came until then."""
        ...


def client(target: str, key: str, model: str | None, end_id: int) -> Client:
    """Every request has a connection of its own. `target` is KIND:URL, or a URL of a chat server. Raises UserError for another kind."""
    kind, _, url = target.partition(":") if target.partition(":")[0] in KINDS else ("chat", "", target)
    if not url.startswith(("http://", "https://")):
        raise UserError(f"{target!r} is no server; give {', '.join(f'{k}:http://...' for k in KINDS)} or a plain URL")
    if kind == "tokens":
        return TokenClient(url, TokenPolicy(url, key, model), end_id)
    if kind == "llama":
        return LlamaClient(url, Endpoint(url, key), end_id)
    return ChatClient(url, Endpoint(url, key), model or "tide-nano")


@dataclass
class TokenClient:
    """Every message ends with `end_id`, at which engines like to keep their states."""

    name: str
    policy: TokenPolicy
    end_id: int
    kind = "tokens"

    def begin(self, opening: Ids) -> list[int]:
        return [*opening, self.end_id]

    async def ask(self, history: list[int], step: Step, into: Measured) -> list[int]:
        prompt, said = [*history, *step.new, self.end_id], []
        params = SamplingParams(max_tokens=step.answer, temperature=1.0, seed=len(prompt))
        async with aclosing(self.policy.generate(prompt, params)) as chunks:
            async for chunk in chunks:
                if chunk.ids:
                    into.moments.append((time.perf_counter(), len(chunk.ids)))
                said += chunk.ids
                into.cached_tokens += chunk.cached_tokens
        into.prompt_tokens, into.completion_tokens = len(prompt), len(said)
        return [*prompt, *said, self.end_id]


@dataclass
class LlamaClient:
    name: str
    server: Endpoint
    end_id: int
    kind = "llama"

    def begin(self, opening: Ids) -> list[int]:
        return [*opening, self.end_id]

    async def ask(self, history: list[int], step: Step, into: Measured) -> list[int]:
        prompt, said = [*history, *step.new, self.end_id], []
        body = {"prompt": prompt, "n_predict": step.answer, "temperature": 1.0, "seed": len(prompt), "stream": True,
                "return_tokens": True, "cache_prompt": True, "ignore_eos": True}  # fmt: skip
        async with aclosing(self.server.events("/completion", body)) as events:
            async for event in events:
                if tokens := event.get("tokens"):
                    into.moments.append((time.perf_counter(), len(tokens)))
                    said += tokens
                if timings := event.get("timings"):
                    into.cached_tokens = max(0, timings.get("cache_n", 0))
        into.prompt_tokens, into.completion_tokens = len(prompt), len(said)
        return [*prompt, *said, self.end_id]


@dataclass
class ChatClient:
    name: str
    server: Endpoint
    model: str
    kind = "chat"

    def begin(self, opening: Ids) -> list[dict[str, str]]:
        return [{"role": "system", "content": as_text(opening)}]

    async def ask(self, history: list[dict[str, str]], step: Step, into: Measured) -> list[dict[str, str]]:
        messages = [*history, {"role": "user", "content": as_text(step.new)}]
        body = {"model": self.model, "messages": messages, "max_tokens": step.answer, "temperature": 1.0, "seed": len(messages),
                "stream": True, "stream_options": {"include_usage": True}}  # fmt: skip
        text, times = "", []
        async for delta, usage in self._deltas(body):
            if delta:
                times.append(time.perf_counter())
                text += delta
            if usage:
                into.prompt_tokens, into.completion_tokens = usage["prompt_tokens"], usage["completion_tokens"]
                into.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        if times:  # a delta does not say how many tokens it holds
            into.moments = [(t, into.completion_tokens / len(times)) for t in times]
        return [*messages, {"role": "assistant", "content": text or " "}]

    async def _deltas(self, body: dict[str, Any]) -> AsyncIterator[tuple[str, dict[str, Any] | None]]:
        async with aclosing(self.server.events("/chat/completions", body)) as events:
            async for event in events:
                choice = (event.get("choices") or [{}])[0]
                delta = choice.get("delta") or {}
                text = (delta.get("reasoning_content") or "") + (delta.get("content") or "")
                yield text + "".join(c["function"].get("arguments", "") for c in delta.get("tool_calls") or []), event.get("usage")
