"""`POST /v1/responses/compact`: a conversation becomes one opaque item that stands for it in later requests.

The item holds what the users said last, word for word, and the model's own summary of everything; it is the client's
to keep, and nothing of it is stored here. The pass is an ordinary request, and charged as one.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec.structs import replace
from starlette.requests import Request

from tidelock.service import wire
from tidelock.service.answer import Bill, Ended, Event
from tidelock.service.errors import ApiError, invalid_request
from tidelock.service.http import is_lenient
from tidelock.service.keys import Key
from tidelock.service.run import Turn
from tidelock.service.state import ServiceState
from tidelock.service.surfaces.responses import usage
from tidelock.service.surfaces.responses_items import Compacted
from tidelock.service.surfaces.responses_request import CompactRequest, to_ask
from tidelock.tokens.message import DIRECTIVES, Message
from tidelock.tokens.policy import SamplingParams

KEPT_CHARACTERS = 20_000  # of the users' words
REQUEST = (
    "Write a note to yourself from which you can go on with this conversation without having it before you: what was "
    "asked, what was done and found out, what is still open and what you would do next. Say what you only assume."
)

_decoder = msgspec.json.Decoder(CompactRequest)


class Compact:
    """See `endpoint.Translation`."""

    anthropic = False
    keep_alive = wire.COMMENT

    def __init__(self, state: ServiceState, key: Key, request: Request | None, body: bytes) -> None:
        asked: CompactRequest = wire.decode(body, _decoder)
        if asked.model is None:
            raise invalid_request("a request needs a model", "model")
        ask = to_ask(state, key, asked, SamplingParams(), is_lenient(state, request))
        self._users = _latest([m.content for m in ask.messages if m.role == "user" and m.name not in DIRECTIVES])
        words = {"tool_choice": "none" if ask.tools else "auto", "schema": None}  # a note, whatever the rest is held to
        self.ask = replace(ask, messages=(*ask.messages, Message("user", REQUEST)), to_fit=True, **words)

    def begin(self, turn: Turn) -> None:
        self._unique, self._created = turn.request_id.removeprefix("req_"), int(time.time())

    def whole(self, ended: Sequence[Ended], bill: Bill) -> dict[str, Any]:
        held = base64.b64encode(wire.encode(Compacted(self._users, ended[0].message.content))).decode()
        item = {"type": "compaction", "id": f"cmp_{self._unique}", "encrypted_content": held}
        return {
            "id": f"resp_{self._unique}", "object": "response.compaction", "created_at": self._created, "output": [item],
            "usage": usage(bill.usage), "trace": {"node": bill.nodes[0]},
        }  # fmt: skip

    def say(self, events: Sequence[Event]) -> bytes:
        raise AssertionError("a compaction is not streamed")

    def fail(self, error: ApiError) -> bytes:
        return wire.event(error.body())


def _latest(texts: Sequence[str]) -> list[str]:
    """As many of the last texts as there is room for."""
    kept: list[str] = []
    room = KEPT_CHARACTERS
    for text in reversed(texts):
        if len(text) > room:
            break
        kept.insert(0, text)
        room -= len(text)
    return kept
