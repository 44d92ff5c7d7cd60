"""The Responses API's answers: items, whole or streamed as typed events; stored unless `store` is false.

A thought goes out as a reasoning item whose summary is the thought itself, the one form that all clients know.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec
from starlette.requests import Request
from starlette.types import Receive

from tidelock.service import detached, wire
from tidelock.service.answer import Bill, Ended, Event, Piece, Usage
from tidelock.service.errors import ApiError
from tidelock.service.http import is_lenient
from tidelock.service.keys import Key
from tidelock.service.run import Turn
from tidelock.service.state import ServiceState
from tidelock.service.surfaces import conversations
from tidelock.service.surfaces.responses_items import KIND, docs_of
from tidelock.service.surfaces.responses_request import (
    HERE, RECALLED, Format, Reasoning, ResponsesRequest, TextConfig, read,
)  # fmt: skip
from tidelock.service.surfaces.responses_stream import Writer
from tidelock.service.surfaces.responses_tools import custom_names, docs

if TYPE_CHECKING:
    from tidelock.service.endpoint import Output

_decoder = msgspec.json.Decoder(ResponsesRequest)


def usage(used: Usage) -> dict[str, Any]:
    return {
        "input_tokens": used.prompt_tokens,
        "input_tokens_details": {"cached_tokens": used.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": used.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": used.reasoning_tokens},
        "total_tokens": used.prompt_tokens + used.completion_tokens,
        "cost_nano_usd": used.nano_usd,
    }


class Responses:
    """See `endpoint.Translation`."""

    anthropic = False
    keep_alive = wire.COMMENT

    def __init__(self, state: ServiceState, key: Key, request: Request | None, body: bytes) -> None:
        self._state, self._key = state, key
        self.request: ResponsesRequest = wire.decode(body, _decoder)
        self.ask = read(state, key, self.request, is_lenient(state, request))

    def begin(self, turn: Turn) -> None:
        self._unique = turn.request_id.removeprefix("req_")
        self._id = "resp_" + self._unique
        self._created = int(time.time())
        queued = self.response("queued") if self.request.background else None
        custom, seal = custom_names(self.request.tools or ()), "reasoning.encrypted_content" in (self.request.include or ())
        self._writer = Writer(self._unique, self.response("in_progress"), queued, custom, seal)

    def whole(self, ended: Sequence[Ended], bill: Bill) -> dict[str, Any]:
        self._writer.say([*_pieces(ended[0]), ended[0]])
        return self._finished(ended[0], bill)

    def say(self, events: Sequence[Event]) -> bytes:
        out = self._writer.say(events)
        if isinstance(events[-1], Bill):
            end = next(event for event in events if isinstance(event, Ended))
            out += self._writer.finish(self._finished(end, events[-1])) + wire.DONE
        return out

    def fail(self, error: ApiError) -> bytes:
        """The typed failure, and last the event whose `error` the official clients raise."""
        charged = usage(error.bill.usage) if error.bill else None
        failed = self.response("failed", error={"code": _failure_code(error), "message": error.message}, usage=charged)
        return self._writer.finish(failed, "response.failed") + wire.event(error.body())

    def _answered(self, end: Ended, bill: Bill, items: list[dict[str, Any]]) -> dict[str, Any]:
        cut = end.finish_reason == "length"
        return self.response(
            "incomplete" if cut else "completed",
            output=items,
            usage=usage(bill.usage),
            incomplete_details={"reason": "max_output_tokens"} if cut else None,
            completed_at=None if cut else int(time.time()),
            trace={"node": bill.nodes[0]},
        )

    def _finished(self, end: Ended, bill: Bill) -> dict[str, Any]:
        response = self._answered(end, bill, self._writer.items)
        self._recall(node=bill.nodes[0])
        if self.request.store is not False:
            given = docs_of(self.request.input, self._unique)
            doc = {"id": self._id, "node": bill.nodes[0], "response": response, "input": given}
            self._state.objects.keep(KIND, self._key.customer, doc)
        if (name := self.request.conversation_id) is not None:
            given = docs_of(self.request.input, self._unique)
            conversations.keep(self._state, self._key, name, [*given, *response["output"]])
        return response

    def _recall(self, **what: Any) -> None:
        """On this connection, if it is one."""
        if (here := HERE.get()) is not None:
            here[self._id] = {"response": {"instructions": self.request.instructions}, **what}
            for old in list(here)[:-RECALLED]:
                del here[old]

    # ---- in the background: `detached.Answer` --------------------------------------------------------------------

    kind = KIND

    async def detach(self, turn: Turn, receive: Receive, out: Output) -> None:
        if not self.request.background:  # it is to generate nothing yet; whatever renders its prompt is warm now
            self._recall(node=None, messages=self.ask.messages)
            done = self.response("completed", usage=usage(Usage(0, 0)), completed_at=int(time.time()))
            await out.write(self._writer.finish(done) + wire.DONE, more=False)
            return
        running = detached.start(self._state, self._id, self, turn)
        await asyncio.shield(running.admitted)
        if not self.ask.stream:
            await out.json(self.response("queued"))
            return
        gone = asyncio.create_task(_disconnect(receive))
        try:
            async for events in detached.follow(self._state, self._id):
                if gone.done():
                    return
                await out.write(events, more=events != wire.DONE)
        finally:
            gone.cancel()

    def begun(self) -> tuple[dict[str, Any], bytes]:
        events = self._writer.begin()
        doc = {"id": self._id, "node": None, "response": self.response("in_progress"), "input": docs_of(self.request.input, self._unique)}
        return doc, events

    def more(self, events: Sequence[Event]) -> tuple[int, bytes]:
        return self._writer.number, self._writer.say(events)

    def ended(
        self, events: Sequence[Event], failed: ApiError | None, cancelled: bool
    ) -> tuple[dict[str, Any], str, int, bytes]:
        end = next(event for event in events if isinstance(event, Ended))
        writer, bill = self._writer.copy(), events[-1]
        first = writer.number
        out = writer.say([event for event in events if isinstance(event, Piece)] if self.ask.stream else _pieces(end))
        if failed is None:
            out += writer.say([end])
            response = self._answered(end, bill, writer.items)
        else:
            out += writer.close("incomplete")
            so_far = {"output": writer.items, "usage": usage(bill.usage), "trace": {"node": bill.nodes[0]}}
            response = self._cut(failed, cancelled, **so_far)
        return response, bill.nodes[0], first, out + self._last(writer, response)

    def failed(self, failed: ApiError, cancelled: bool) -> tuple[dict[str, Any], int, bytes]:
        writer, response = self._writer.copy(), self._cut(failed, cancelled)
        return response, writer.number, self._last(writer, response)

    def _cut(self, failed: ApiError, cancelled: bool, **changes: Any) -> dict[str, Any]:
        if cancelled:
            return self.response("cancelled", **changes)
        return self.response("failed", error={"code": _failure_code(failed), "message": failed.message}, **changes)

    def _last(self, writer: Writer, response: dict[str, Any]) -> bytes:
        """The stream of a response that was cancelled just ends: there is no event for it."""
        return b"" if response["status"] == "cancelled" else writer.finish(response)

    def response(self, status: str, **changes: Any) -> dict[str, Any]:
        request = self.request
        text = request.text or TextConfig()
        form = text.format or Format()
        shown = {"type": form.type}
        if form.type == "json_schema":
            shown |= {"name": form.name, "schema": form.schema, "strict": form.strict is not False}
            shown["description"] = form.description
        reasoning = request.reasoning or Reasoning()
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "completed_at": None,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "instructions": request.instructions,
            "model": self.ask.model,
            "output": [],
            "previous_response_id": request.previous_response_id,
            "tools": docs(request.tools or ()),
            "tool_choice": request.tool_choice or "auto",
            "parallel_tool_calls": self.ask.parallel_tools,
            "max_output_tokens": request.max_output_tokens,
            "max_tool_calls": request.max_tool_calls,
            "temperature": self.ask.params.temperature,
            "top_p": self.ask.params.top_p,
            "presence_penalty": 0,
            "frequency_penalty": 0,
            "top_logprobs": request.top_logprobs or 0,
            "text": {"format": shown, "verbosity": text.verbosity or "medium"},
            "reasoning": {"effort": reasoning.effort, "summary": reasoning.summary},
            "truncation": request.truncation or "disabled",
            "store": request.store is not False,
            "background": bool(request.background),
            "service_tier": "default",
            "metadata": request.metadata or {},
            "safety_identifier": request.safety_identifier,
            "prompt_cache_key": request.prompt_cache_key,
            "usage": None,
            **({"user": request.user} if request.user is not None else {}),
            **({"conversation": {"id": name}} if (name := request.conversation_id) is not None else {}),
            **changes,
        }


def _failure_code(error: ApiError) -> str:
    """The words by which clients decide whether to try again."""
    if error.kind == "exceeded_current_quota_error":
        return "insufficient_quota"
    return "rate_limit_exceeded" if error.status == 429 else "server_error"


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _pieces(end: Ended) -> list[Event]:
    message = end.message
    pieces = [Piece(0, "reasoning", message.reasoning)] if message.reasoning else []
    if message.content:
        pieces.append(Piece(0, "content", message.content, tokens=end.tokens))
    for n, call in enumerate(message.tool_calls):
        pieces += [Piece(0, "call", call.name, n, call.id), Piece(0, "arguments", wire.to_json(call.arguments), n)]
    return pieces
