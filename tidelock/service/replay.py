"""The wire side of `Idempotency-Key`: remembers what a request was answered, and says it again."""

from __future__ import annotations

import logging
from typing import Any

from starlette.types import Send

from tidelock.service import errors
from tidelock.service.db import StorageDown
from tidelock.service.idempotency import LONGEST_KEY, AnswerLost, Idempotency, InFlight, KeyReused, Stored

log = logging.getLogger(__name__)


class Recorder:
    """An ASGI `send` that keeps a copy of what goes through it."""

    def __init__(self, store: Idempotency, customer: str, name: str, request_id: str, send: Send) -> None:
        self._store, self._customer, self._name, self._request_id, self._send = store, customer, name, request_id, send
        self._ours = False
        self._start: dict[str, Any] | None = None
        self._body: list[bytes] = []
        self._whole = False

    async def replay(self, request: bytes) -> bool:
        """Sends the stored answer, if there is one. Raises ApiError: 409 if the key stands for another request, for one
        that still runs, or for one whose answer is lost."""
        if len(self._name) > LONGEST_KEY:
            raise errors.invalid_request(f"an Idempotency-Key has at most {LONGEST_KEY} characters", "Idempotency-Key")
        try:
            stored = await self._store.begin(self._customer, self._name, request, self._request_id)
        except KeyReused:
            raise errors.conflict("this Idempotency-Key was used with another request", "idempotency_key_reused") from None
        except InFlight:
            message = "the first request with this Idempotency-Key still runs; try again in a moment"
            raise errors.conflict(message, "idempotency_key_in_use", retry=True) from None
        except AnswerLost as lost:
            message = f"the first request with this Idempotency-Key was charged as {lost}, but its answer was lost"
            raise errors.conflict(message, "answer_lost") from None
        if stored is None:
            self._ours = True
            return False
        headers = [(b"content-type", stored.content_type.encode()), (b"idempotent-replayed", b"true"),
                   (b"x-request-id", stored.request_id.encode()), (b"request-id", stored.request_id.encode())]  # fmt: skip
        await self._send({"type": "http.response.start", "status": stored.status, "headers": headers})
        await self._send({"type": "http.response.body", "body": stored.body})
        return True

    async def __call__(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self._start = message
        else:
            self._body.append(message.get("body", b""))
            self._whole = not message.get("more_body", False)
        await self._send(message)

    async def end(self) -> None:
        """Stores what was answered, if that is whole: half an answer, said again, would look like one."""
        if not self._ours:
            return
        try:
            if self._start is None or not self._whole:
                await self._store.abandon(self._customer, self._name, self._request_id)
                return
            content_type = dict(self._start["headers"]).get(b"content-type", b"").decode()
            answer = Stored(self._request_id, self._start["status"], content_type, b"".join(self._body))
            await self._store.finish(self._customer, self._name, answer)
        except StorageDown as error:
            log.warning("%s: its answer could not be stored for its Idempotency-Key: %s", self._request_id, error)
