"""Server-sent events of a model server, and everything that can go wrong with them as one `RemoteError`."""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import aiohttp
import msgspec

from tidelock.tokens.policy import PolicyError
from tidelock.tokens.propagation import outgoing

NO_STREAM = ("text/html", "text/plain", "application/json")  # what an event stream is not; some servers name it nothing
T = TypeVar("T")
Session = aiohttp.ClientSession | Callable[[], aiohttp.ClientSession] | None


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
    """A base URL with its key, over one session of its own or a given one. Requests in flight can be cut off by name."""

    def __init__(self, base_url: str, api_key: str, session: Session = None, patience: Patience = Patience()) -> None:
        """`session` may be what returns one, for an endpoint that is made before the event loop runs."""
        self.base_url, self.api_key, self.patience = base_url.rstrip("/"), api_key, patience
        self._session = session
        self._open: dict[str, _Watch] = {}  # by the name of the request
        self._headers = {"Authorization": f"Bearer {api_key}", "Content-Type": "application/json"}
        self._no_limit = aiohttp.ClientTimeout(total=None, sock_connect=patience.connect_s)

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
        response: aiohttp.ClientResponse | None = None
        try:
            response = await self._opened(path, body, watch)
            rest = b""
            while piece := await watch.over(response.content.readany()):
                if b"\n" not in piece:
                    rest += piece  # of any length: aiohttp's own reader of lines gives up at 128 KiB, a routing record is longer
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
        except (aiohttp.ClientError, OSError) as error:
            if not watch.cut:
                raise self._late(watch) if watch.late else self._failed(error, watch) from None
        finally:
            watch.close()
            if response is not None:
                response.release()
            if name is not None:
                self._open.pop(name, None)
            if self._session is None and watch.session is not None:
                await watch.session.close()

    async def _opened(self, path: str, body: dict[str, Any], watch: _Watch) -> aiohttp.ClientResponse:
        """A stream's answer so far: its status is 200 and it has begun."""
        watch.session = self._opened_session()
        headers = {**self._headers, **outgoing.get()}
        request = watch.session.post(self.base_url + path, data=_encoded(body), headers=headers, timeout=self._no_limit)
        response = await watch.over(request)
        watch.end = response.close
        if response.status != 200:
            text = (await watch.over(response.read()))[:1_000_000]
            raise refusal(response.status, text, self.base_url, retry_after_s(response.headers))
        if response.content_type in NO_STREAM:
            response.close()
            raise self.broken(f"an event stream was asked for, and {response.content_type} came", "malformed")
        return response

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
        async with self._request(method, path, body) as response:
            return self._json(text) if (text := await response.read()).strip() else {}

    async def alive(self, path: str, within_s: float) -> None:
        """Asks for `path`, whatever it says. Raises RemoteError unless the answer is 200 within that time."""
        try:
            async with asyncio.timeout(within_s), self._request("GET", path, None) as response:
                await response.read()
        except TimeoutError:
            raise self.broken(f"no answer within {within_s:g} s", "first_token") from None

    @contextlib.asynccontextmanager
    async def _request(self, method: str, path: str, body: Any) -> AsyncIterator[aiohttp.ClientResponse]:
        session = self._opened_session()
        timeout = aiohttp.ClientTimeout(total=600, sock_connect=self.patience.connect_s)
        data = None if body is None else _encoded(body)
        headers = {**self._headers, **outgoing.get()}
        try:
            async with session.request(method, self.base_url + path, data=data, headers=headers, timeout=timeout) as response:
                if response.status != 200:
                    text = (await response.read())[:1_000_000]
                    raise refusal(response.status, text, self.base_url, retry_after_s(response.headers))
                yield response
        except (aiohttp.ClientError, OSError) as error:
            raise self._failed(error, None) from None
        finally:
            if self._session is None:
                await session.close()

    def _opened_session(self) -> aiohttp.ClientSession:
        return self._session() if callable(self._session) else self._session or aiohttp.ClientSession()

    def _failed(self, error: Exception, watch: _Watch | None) -> RemoteError:
        """A connect that took too long is a ClientError and an OSError."""
        if isinstance(error, TimeoutError) and not isinstance(error, aiohttp.ClientError):
            return self._late(watch)
        answered = watch is not None and watch.end is not None
        return self.broken(str(error) or type(error).__name__, "cut" if answered else "connect")

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
        self.session: aiohttp.ClientSession | None = None
        self.end: Callable[[], object] | None = None  # ends the answer; None: there is none yet
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
        if self.end is not None:
            self.end()
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
    """The server's own words, whichever of the two usual shapes they come in."""
    quoted = True
    try:
        error = msgspec.json.decode(text)["error"]
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
