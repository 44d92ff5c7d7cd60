"""A `Policy` over any OpenAI-compatible chat endpoint.

Text goes in between, so its ids are our own rendering of what came back, each piece rendered as it came: usable to show
and to fine-tune on, never for RL (`exact` is False, log-probabilities are 0, the weights version is -1). Thought and
content stream; calls are handed on when the answer is whole, because only then their arguments are. What our prompt tells a
model of a format or a tool choice goes as the parameter and not as words: the server has words of its own, and does the
holding.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

from tidelock.tokens.directives import as_parameters
from tidelock.tokens.errors import UserError
from tidelock.tokens.message import DIRECTIVES, Message, ToolCall
from tidelock.tokens.policy import Chunk, PolicyError, Prompt, Reported, SamplingParams, Times
from tidelock.tokens.template import Template, canonical

from .rendering import Form, Rendering
from .http import Client
from .sse import Endpoint, Patience

FINISHES = {"stop": "stop", "tool_calls": "stop", "function_call": "stop", "length": "length"}
USAGE_WITHIN_S = 1.0  # of the moment at which we cut an answer
EFFORT = re.compile(r"`thinking_effort=(\w+)`")
UNREADABLE = "unreadable_arguments"  # the one argument of a call whose arguments are no JSON object, as ChatML has it


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
    """`template` turns ids into messages and back; it need not be the server's. `metadata` goes with every request.

    metered: no answer has more ids than its `max_tokens`, for those who bill by them; otherwise that is the server's
    limit alone, in its own tokens. dialect: "openai", or "kimi", whose servers can leave thinking out and go on with
    a begun answer.
    """

    exact = False

    def __init__(
        self, base_url: str, api_key: str, model: str, template: Template, metadata: dict[str, str] | None = None,
        client: Client | None = None, *, patience: Patience = Patience(), metered: bool = False, dialect: str = "openai",
    ) -> None:  # fmt: skip
        self._server, self.model = Endpoint(base_url, api_key, client, patience), model
        self.template, self.metadata = template, metadata or {}
        self.last: dict[str, Any] = {}  # id, usage and trace of the last answer
        self._form, self._metered, self._kimi = Form(template), metered, dialect == "kimi"
        self._aborted: set[str] = set()

    async def generate(
        self, prompt_ids: Sequence[int], params: SamplingParams, request_id: str | None = None
    ) -> AsyncIterator[Chunk]:
        messages, begun, state = self._read(prompt_ids)
        body = self._body(messages, begun, state, params)
        answer, turn, name = _Answer(), Rendering(self._form, state), request_id or uuid.uuid4().hex
        left = params.max_tokens if self._metered else None
        held: list[int] = []  # said with the finish reason: only the usage is yet to come, so they go with the closing
        try:
            async with aclosing(self._server.batches("/chat/completions", body, name)) as batches:
                async for events in batches:
                    ids: list[int] = []
                    said, fault = answer.take_all(events)
                    for kind, text in said:
                        ids += turn.say(kind, text)
                    if left is not None and len(ids) > left:
                        if cut := [*held, *ids[:left]]:
                            yield _chunk(cut)
                        await self._read_on(batches, answer)
                        yield _chunk((), "length", answer)
                        return
                    if ids:
                        left = None if left is None else left - len(ids)
                        if answer.finish_reason is None:
                            yield _chunk(ids)
                        else:
                            held += ids
                    if fault is not None:
                        raise self._server.broken(f"an event is no chat completion chunk ({fault!r})", "malformed")
        except PolicyError:
            if answer.finish_reason is None:  # what was missing after it is the usage
                raise
        if name in self._aborted:
            self._aborted.discard(name)
            yield _chunk(held, "abort")
            return
        if answer.finish_reason is None:
            raise self._server.broken("the stream ended without a finish reason")
        if answer.finish_reason not in FINISHES:
            if held:
                yield _chunk(held)
            raise PolicyError(f"the server ended the answer with {answer.finish_reason!r}", status=502, kind="server_error")
        self.last = {"id": answer.id, "usage": answer.usage, "trace": answer.trace}
        yield self._last(answer, turn, messages, left, held, params.max_tokens)

    async def _read_on(self, batches: AsyncIterator[list[dict[str, Any]]], answer: _Answer) -> None:
        """To the usage of an answer that we cut, if it comes soon: the server counts other tokens and may be near its end.
        Without it what was cached would be billed as if it were not."""
        with contextlib.suppress(TimeoutError, PolicyError):
            async with asyncio.timeout(USAGE_WITHIN_S):
                async for events in batches:
                    if answer.take_all(events)[1] is not None:
                        return

    def _last(
        self, answer: _Answer, turn: Rendering, messages: list[Message], left: int | None, held: list[int], most: int
    ) -> Chunk:
        """What was held, calls and closing. A closing that does not fit is left out: whoever reads the turn closes it too;
        of an answer that says nothing at all as much of it is given as fits, because no ids are no answer."""
        finish = FINISHES[answer.finish_reason or ""]
        made = answer.tool_calls()
        calls = canonical([*messages, Message("assistant", tool_calls=made)])[-1].tool_calls if made else ()
        ids = turn.end(calls) if calls or finish == "stop" else []
        if left is not None and len(ids) > left:
            ids, finish = (ids[:left], "length") if calls else (ids[:left] if left == most else [], finish)
        return _chunk([*held, *ids], finish, answer)

    def _read(self, prompt_ids: Sequence[int]) -> tuple[list[Message], Message, str]:
        """(the conversation, what the answer was begun with, where in the turn that leaves off)."""
        ids, opening = prompt_ids, self.template.generation_prompt()
        if isinstance(ids, Prompt):
            return self._begun(list(ids.messages), ids[ids.turn + len(opening) :])
        ids = list(ids)
        at = next((i for i in range(len(ids) - len(opening), -1, -1) if ids[i : i + len(opening)] == opening), None)
        if at is None:
            raise PolicyError("the prompt asks for no answer", status=400, kind="invalid_request_error")
        try:
            return self._begun(self.template.parse(ids[:at]), ids[at + len(opening) :])
        except UserError as e:
            raise PolicyError(str(e), status=400, kind="invalid_request_error") from None

    def _begun(self, messages: list[Message], begun: Sequence[int]) -> tuple[list[Message], Message, str]:
        if not begun:
            return messages, Message("assistant"), "start"
        parser = self.template.parser()
        parser.feed(begun)
        state = parser.sinks.get(parser.state, "content")
        return messages, parser.finish(), state

    def _body(self, messages: Sequence[Message], begun: Message, state: str, params: SamplingParams) -> dict[str, Any]:
        directives = [m for m in messages if m.role == "system" and m.name in DIRECTIVES]
        held_to = as_parameters(directives)
        if params.constraint is not None and not held_to:
            raise PolicyError("an endpoint that speaks text cannot be held to a grammar", status=400,
                              kind="invalid_request_error")  # fmt: skip
        efforts = [m for m in directives if m.name == "thinking-effort"]
        wire = [to_wire(m) for m in messages if m not in directives and (m.content or not m.tools)]
        body: dict[str, Any] = {
            "model": self.model,
            "messages": wire,
            "max_tokens": params.max_tokens,
            "temperature": params.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if begun.content or begun.reasoning:
            if not self._kimi:
                raise PolicyError("this model's endpoint cannot go on with a begun answer", status=400,
                                  kind="invalid_request_error")  # fmt: skip
            wire.append({**to_wire(begun), "partial": True})
        if state == "content" and self._kimi:
            body["thinking"] = {"type": "disabled"}
        if efforts and (stated := EFFORT.search(efforts[-1].content)):
            body["reasoning_effort"] = stated[1]
        if params.top_p < 1:  # a server that fixes it (Kimi's contract) refuses to be told
            body["top_p"] = params.top_p
        for name in ("presence_penalty", "frequency_penalty"):
            if penalty := getattr(params, name):
                body[name] = penalty
        if tools := [t.openai() for m in messages for t in m.tools]:
            body["tools"] = tools
        body |= held_to
        if self._kimi and isinstance(held_to.get("tool_choice"), dict):  # it takes no name: the tool is the only one then
            name = held_to["tool_choice"]["function"]["name"]
            body |= {"tool_choice": "required", "tools": [t for t in tools if t["function"]["name"] == name]}
        if params.seed is not None:
            body["seed"] = params.seed % (1 << 53)
        if self.metadata:
            body["metadata"] = self.metadata
        return body

    async def count(self, prompt_ids: Sequence[int]) -> int:
        return len(prompt_ids)

    async def abort(self, request_id: str) -> None:
        """Hangs up, which is the only abort a text endpoint knows."""
        if self._server.cut(request_id):
            self._aborted.add(request_id)

    async def swap(self, checkpoint: str, version: int) -> None:
        raise PolicyError("a text endpoint's weights are its owner's to change", status=400, kind="invalid_request_error")

    async def alive(self, path: str, within_s: float) -> None:
        """Raises RemoteError unless the server answers GET `path` with 200 in that time."""
        await self._server.alive(path, within_s)


def _chunk(ids: Sequence[int], finish: str | None = None, said: _Answer | None = None) -> Chunk:
    """`said`: what the server told beside the text, on the last chunk."""
    if said is None:
        return Chunk(tuple(ids), (0.0,) * len(ids), -1, finish)
    reported = Reported.of(said.usage or None)
    cached = (reported and reported.cached_tokens) or 0
    return Chunk(tuple(ids), (0.0,) * len(ids), -1, finish, cached, reported=reported, times=Times.of(said.metrics or None))


class _Answer:
    """The deltas of one streamed completion: text is passed on, calls are collected."""

    def __init__(self) -> None:
        self.id = ""
        self.calls: dict[int, dict[str, str]] = {}
        self.finish_reason: str | None = None
        self.usage: dict[str, Any] = {}
        self.trace: dict[str, Any] = {}
        self.metrics: dict[str, Any] = {}

    def take_all(self, events: Sequence[dict[str, Any]]) -> tuple[list[tuple[str, str]], Exception | None]:
        """(what several say as ("reasoning" | "content", text), pieces of one kind joined; what is wrong with the event after
        them)."""
        said: list[tuple[str, str]] = []
        for event in events:
            try:
                self._take(event, said)
            except (KeyError, TypeError, ValueError, AttributeError) as fault:
                return said, fault
        return said, None

    def _take(self, event: dict[str, Any], said: list[tuple[str, str]]) -> None:
        self.id = event.get("id") or self.id
        self.usage = event.get("usage") or self.usage  # Kimi puts it into the last choice, too
        self.trace = event.get("trace") or self.trace
        self.metrics = event.get("metrics") or self.metrics  # vLLM's, with --enable-per-request-metrics
        if timings := event.get("timings"):  # llama.cpp's
            prefill, decode = timings.get("prompt_ms"), timings.get("predicted_ms")
            self.metrics = {"time_to_first_token_ms": prefill, "generation_time_ms": decode}
        for choice in event.get("choices") or ():
            self.usage = self.usage or choice.get("usage") or {}
            if delta := choice.get("delta"):
                if text := delta.get("reasoning_content") or delta.get("reasoning"):
                    _say(said, "reasoning", text)
                if text := delta.get("content"):
                    _say(said, "content", text)
                for part in delta.get("tool_calls") or ():
                    self._call(part)
            self.finish_reason = choice.get("finish_reason") or self.finish_reason

    def _call(self, part: dict[str, Any]) -> None:
        call = self.calls.setdefault(part.get("index", 0), {"id": "", "name": "", "arguments": ""})
        function = part.get("function") or {}
        call["id"] = part.get("id") or call["id"]
        call["name"] = function.get("name") or call["name"]
        call["arguments"] += function.get("arguments") or ""

    def tool_calls(self) -> tuple[ToolCall, ...]:
        return tuple(ToolCall(c["id"], c["name"], _arguments(c["arguments"])) for _, c in sorted(self.calls.items()))


def _say(said: list[tuple[str, str]], kind: str, text: Any) -> None:
    if not isinstance(text, str):
        raise TypeError(f"text was expected, not {type(text).__name__}")
    if said and said[-1][0] == kind:
        said[-1] = (kind, said[-1][1] + text)
    else:
        said.append((kind, text))


def _arguments(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {UNREADABLE: text}
