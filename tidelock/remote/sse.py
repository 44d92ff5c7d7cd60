"""Server-sent events of a model server, and everything that can go wrong with them as one `RemoteError`."""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import json
import time
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from tidelock.tokens.policy import PolicyError
from tidelock.tokens.propagation import outgoing

from .http import Answer, Client, Server, header_lines

NO_STREAM = ("text/html", "text/plain", "application/json")  # what an event stream is not; some servers name it nothing
CALL_S = 600.0  # for an answer that is no stream
MOST_REFUSAL = 1_000_000  # bytes of a refusal that are read
T = TypeVar("T")


class RemoteError(PolicyError):
    """`cause`: what went wrong, in one word.

    "connect" | "first_token" (too long until it) | "stall" | "cut" | "malformed" | "status" (refused with it) |
    "error_event". retry_after_s: how long the server asks to be left alone. quoted: the message is the server's own.
    """

    def __init__(
        self, message: str, *, status: int = 502, kind: str = "connection", cause: str = "cut",
        retry_after_s: float | None = None, quoted: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(message, status=status, kind=kind)
        self.cause, self.retry_after_s, self.quoted = cause, retry_after_s, quoted


@dataclass(frozen=True)
class Patience:
    """With a server that says nothing, in seconds; None = for ever. Keep-alives are nothing, only events count."""

    connect_s: float = 30.0
    first_s: float | None = None  # from the request to its first event
    idle_s: float | None = None  # from one event to the next


class Endpoint:
    """A base URL with its key. Requests in flight can be cut off by name."""

    def __init__(self, base_url: str, api_key: str, client: Client | None = None, patience: Patience = Patience()) -> None:
        """`client`: whose connections are used; without one every request has a connection of its own. Raises UserError."""
        self.base_url, self.api_key, self.patience = base_url.rstrip("/"), api_key, patience
        self._client, self._server = client or Client(keep_s=0), Server.at(base_url)
        self._open: dict[str, _Watch] = {}  # by the name of the request
        self._fields = header_lines({"Authorization": f"Bearer {api_key}", "Content-Type": "application/json",
                                     "Accept": "*/*", "User-Agent": "tidelock"})  # fmt: skip
        self._heads: dict[tuple[str, str], bytes] = {}  # of requests, by method and path

    async def events(self, path: str, body: dict[str, Any], name: str | None = None) -> AsyncIterator[dict[str, Any]]:
        """The JSON objects of a streamed answer. Ends with the stream, whether or not it said [DONE], and at `cut`.

        Raises RemoteError: the server's own status and words, 502 for what is no answer at all, 504 for none in time.
        """
        async with contextlib.aclosing(self.batches(path, body, name)) as batches:
            async for batch in batches:
                for event in batch:
                    yield event

    async def batches(self, path: str, body: dict[str, Any], name: str | None = None) -> AsyncIterator[list[dict[str, Any]]]:
        """`events`, those that came together at once: the later a reader looks, the fewer times it has to."""
        watch = _Watch(self.patience)
        if name is not None:
            self._open[name] = watch
        try:
            answer = await self._opened(path, body, watch)
            rest = b""
            while piece := await watch.over(answer.some()):
                if b"\n" not in piece:
                    rest += piece  # of any length: a routing record is long
                    continue
                *lines, rest = (rest + piece).split(b"\n")
                events, failure = self._parsed(lines)
                if events:
                    yield events
                    watch.heard()  # only now: a reader that is slow is not the server's fault
                if failure is not None:
                    raise failure
            events, failure = self._parsed([rest])
            if events:
                yield events
            if failure is not None:
                raise failure
        except asyncio.CancelledError:
            if not watch.cancelled or watch.task.uncancel():  # by somebody else, too
                raise
            if watch.late:
                raise self._late(watch) from None
        except PolicyError:
            if not watch.cut:
                raise
        except OSError as error:
            if not watch.cut:
                raise self._late(watch) if watch.late else self._failed(error, watch.answer) from None
        finally:
            watch.close()
            if watch.answer is not None:
                watch.answer.close()
            if name is not None:
                self._open.pop(name, None)

    async def _opened(self, path: str, body: dict[str, Any], watch: _Watch) -> Answer:
        """A stream's answer so far: its status is 200 and it has begun."""
        watch.answer = answer = await watch.over(self._send("POST", path, body))
        if answer.status != 200:
            text = await watch.over(answer.read(MOST_REFUSAL))
            raise refusal(answer.status, text, self.base_url, retry_after_s(answer.headers))
        if answer.content_type in NO_STREAM:
            raise self.broken(f"an event stream was asked for, and {answer.content_type} came", "malformed")
        return answer

    def _parsed(self, lines: list[bytes]) -> tuple[list[dict[str, Any]], RemoteError | None]:
        """(the events, and what came after them instead of another)."""
        events: list[dict[str, Any]] = []
        for line in lines:
            if not line.startswith(b"data:") or line[5:].strip() == b"[DONE]":
                continue
            try:
                event = self._json(line[5:])
            except RemoteError as error:
                return events, error
            if event.get("error"):
                return events, refusal(_status(event), line[5:], self.base_url, cause="error_event")
            events.append(event)
        return events, None

    def cut(self, name: str) -> bool:
        """Drop the connection of the request `name`, answered yet or not: its events end here. False: there is none."""
        if (watch := self._open.get(name)) is None:
            return False
        watch.cut = True
        watch.stop()
        return True

    async def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """One JSON answer, or {} where the server says no more than that it is done. Raises RemoteError."""
        return self._json(text) if (text := await self._asked(method, path, body)).strip() else {}

    async def alive(self, path: str, within_s: float) -> None:
        """Asks for `path`, whatever it says. Raises RemoteError unless the answer is 200 within that time."""
        try:
            async with asyncio.timeout(within_s):
                await self._asked("GET", path, None)
        except TimeoutError:
            raise self.broken(f"no answer within {within_s:g} s", "first_token") from None

    async def _asked(self, method: str, path: str, body: dict[str, Any] | None) -> bytes:
        answer: Answer | None = None
        try:
            async with asyncio.timeout(CALL_S):
                answer = await self._send(method, path, body)
                text = await answer.read(MOST_REFUSAL if answer.status != 200 else None)
        except TimeoutError:
            raise self._late(None) from None
        except OSError as error:
            raise self._failed(error, answer) from None
        finally:
            if answer is not None:
                answer.close()
        if answer.status != 200:
            raise refusal(answer.status, text, self.base_url, retry_after_s(answer.headers))
        return text

    async def _send(self, method: str, path: str, body: dict[str, Any] | None) -> Answer:
        if (head := self._heads.get((method, path))) is None:
            head = self._heads[method, path] = self._server.head(method, path) + self._fields
        if more := outgoing.get():
            head += header_lines(more)
        return await self._client.send(self._server, head, b"" if body is None else _encoded(body), self.patience.connect_s)

    def _failed(self, error: OSError, answer: Answer | None) -> RemoteError:
        return self.broken(str(error) or type(error).__name__, "cut" if answer is not None else "connect")

    def _late(self, watch: _Watch | None) -> RemoteError:
        if watch is not None and watch.events:
            what, cause = f"nothing came for {self.patience.idle_s:g} s", "stall"
        else:
            what, cause = f"nothing came within {self.patience.first_s or 600:g} s", "first_token"
        return RemoteError(f"{self.base_url}: {what}", status=504, kind="timeout_error", cause=cause)

    def _json(self, text: bytes) -> dict[str, Any]:
        try:
            value = msgspec.json.decode(text)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise self.broken(f"what it sent is no JSON object: {text.strip()[:80].decode(errors='replace')!r}", "malformed")
        return value

    def broken(self, what: str, cause: str = "cut") -> RemoteError:
        return RemoteError(f"{self.base_url}: {' '.join(what.split())}", cause=cause)


def _encoded(body: dict[str, Any]) -> bytes:
    try:
        return msgspec.json.encode(body)
    except (UnicodeEncodeError, OverflowError, TypeError):  # lone surrogates, integers beyond 64 bits, NumPy's numbers
        return json.dumps(body).encode()


class _Watch:
    """One stream: how long it may be waited for now, and how it is ended from outside.

    One timer for all of it, put off when it goes off too early: a timeout around every read costs more than the read.
    """

    def __init__(self, patience: Patience) -> None:
        self._loop, self._idle_s = asyncio.get_running_loop(), patience.idle_s
        self.task = asyncio.current_task()
        self.answer: Answer | None = None
        self.events = 0
        self.late = self.cut = self.cancelled = self._waiting = False
        self._until = None if patience.first_s is None else self._loop.time() + patience.first_s
        self._timer = None if self._until is None else self._loop.call_at(self._until, self._look)

    async def over(self, work: Awaitable[T]) -> T:
        """What is waited for, on the server's time."""
        self._waiting = True
        try:
            return await work
        finally:
            self._waiting = False

    def heard(self) -> None:
        self.events += 1
        if self._idle_s is not None:
            self._until = self._loop.time() + self._idle_s
            if self._timer is None:
                self._timer = self._loop.call_at(self._until, self._look)
        else:
            self.close()

    def stop(self) -> None:
        """What waits for the server now finds the connection closed, or is cancelled where there is no answer to close yet."""
        if self.answer is not None:
            self.answer.close()
        elif self.task is not None:
            self.cancelled = True
            self.task.cancel()

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._timer = None
        if not self._waiting:  # for the reader, not for the server: `heard` goes on
            return
        if self._loop.time() < self._until:
            self._timer = self._loop.call_at(self._until, self._look)
        else:
            self.late = True
            self.stop()


def refusal(
    status: int, text: bytes, base_url: str, retry_after: float | None = None, cause: str = "status"
) -> RemoteError:
    """The server's own words, in whichever of the usual shapes: OpenAI's, a bare text, SGLang's without a frame."""
    quoted = True
    try:
        data = msgspec.json.decode(text)
        error = data if data.get("object") == "error" else data["error"]
        if isinstance(error, str):
            message, kind = error, "error"
        else:
            message, kind = str(error.get("message", error)), str(error.get("type", "error"))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        message = f"{base_url} answered {status}: {' '.join(text.decode(errors='replace').split())[:200]}"
        kind, quoted = "error", False
    return RemoteError(message, status=status, kind=kind, cause=cause, retry_after_s=retry_after, quoted=quoted)


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """`retry-after-ms`, or Retry-After as seconds or as a date."""
    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        try:
            seconds = float(headers[name]) / unit
            if 0 <= seconds < float("inf"):
                return seconds
        except (KeyError, ValueError):
            pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(headers["retry-after"]).timestamp() - time.time())
    except (KeyError, ValueError, TypeError):
        return None


def _status(event: dict[str, Any]) -> int:
    code = event["error"].get("code") if isinstance(event["error"], dict) else None
    return code if isinstance(code, int) and 400 <= code < 600 else 500


def numbers(values: Any) -> Sequence[Any]:
    """A JSON list, or TypeError."""
    if not isinstance(values, list):
        raise TypeError(f"a list was expected, not {type(values).__name__}")
    return values
