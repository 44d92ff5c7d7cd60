"""The Responses API's answers: items, whole or streamed as typed events; stored unless `store` is false.

A thought goes out as a reasoning item whose summary is the thought itself, the one form that all clients know.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import msgspec
from starlette.requests import Request

from tidelock.service import wire
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
        custom, seal = custom_names(self.request.tools or ()), "reasoning.encrypted_content" in (self.request.include or ())
        self._writer = Writer(self._unique, self.response("in_progress"), custom, seal)

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

    def _finished(self, end: Ended, bill: Bill) -> dict[str, Any]:
        cut = end.finish_reason == "length"
        response = self.response(
            "incomplete" if cut else "completed",
            output=self._writer.items,
            usage=usage(bill.usage),
            incomplete_details={"reason": "max_output_tokens"} if cut else None,
            completed_at=None if cut else int(time.time()),
            trace={"node": bill.nodes[0]},
        )
        if (here := HERE.get()) is not None:
            here[self._id] = {"node": bill.nodes[0], "response": {"instructions": self.request.instructions}}
            for old in list(here)[:-RECALLED]:
                del here[old]
        if self.request.store is not False:
            given = docs_of(self.request.input, self._unique)
            doc = {"id": self._id, "node": bill.nodes[0], "response": response, "input": given}
            self._state.objects.put(KIND, self._key.customer, doc)
        if (name := self.request.conversation_id) is not None:
            given = docs_of(self.request.input, self._unique)
            conversations.add(self._state, self._key, name, [*given, *response["output"]])
        return response

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


def _pieces(end: Ended) -> list[Event]:
    message = end.message
    pieces = [Piece(0, "reasoning", message.reasoning)] if message.reasoning else []
    if message.content:
        pieces.append(Piece(0, "content", message.content, tokens=end.tokens))
    for n, call in enumerate(message.tool_calls):
        pieces += [Piece(0, "call", call.name, n, call.id), Piece(0, "arguments", wire.to_json(call.arguments), n)]
    return pieces
