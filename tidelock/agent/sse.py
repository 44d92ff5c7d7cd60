"""Server-sent events of a model server, and everything that can go wrong with them as one `PolicyError`."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

import aiohttp

from tidelock.tokens.policy import PolicyError
from tidelock.tokens.propagation import outgoing


class Endpoint:
    """A base URL with its key, over one session of its own or a given one. Requests in flight can be cut off by name."""

    def __init__(self, base_url: str, api_key: str, session: aiohttp.ClientSession | None = None) -> None:
        self.base_url, self.api_key = base_url.rstrip("/"), api_key
        self._session = session
        self._open: dict[str, Callable[[], object]] = {}  # what ends each named request at once
        self._cut: set[str] = set()

    async def events(self, path: str, body: dict[str, Any], name: str | None = None) -> AsyncIterator[dict[str, Any]]:
        """The JSON objects of a streamed answer. Ends with the stream, whether or not it said [DONE], and at `cut`.

        Raises PolicyError: the server's own status and words, or 502 for what is no answer at all.
        """
        try:
            async with self._request("POST", path, body, name, streamed=True) as response:
                async for line in _lines(response):
                    if not line.startswith(b"data:") or line[5:].strip() == b"[DONE]":
                        continue
                    event = self._json(line[5:])
                    if event.get("error"):
                        raise refusal(_status(event), json.dumps(event), self.base_url)
                    yield event
        except (PolicyError, asyncio.CancelledError):
            if name not in self._cut:
                raise
        finally:
            self._open.pop(name, None)
            self._cut.discard(name)

    def cut(self, name: str) -> bool:
        """Drop the connection of the request `name`, answered yet or not: its events end here. False: there is none."""
        if (end := self._open.get(name)) is None:
            return False
        self._cut.add(name)
        end()
        return True

    async def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """One JSON answer, or {} where the server says no more than that it is done. Raises PolicyError."""
        async with self._request(method, path, body) as response:
            return self._json(text) if (text := await response.read()).strip() else {}

    @contextlib.asynccontextmanager
    async def _request(
        self, method: str, path: str, body: Any, name: str | None = None, streamed: bool = False
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        session = self._session or aiohttp.ClientSession()
        timeout = aiohttp.ClientTimeout(total=None if streamed else 600, sock_connect=30)
        headers = {"Authorization": f"Bearer {self.api_key}", **outgoing.get()}
        options = {"json": body, "headers": headers, "timeout": timeout}
        try:
            with self._one_error():
                opening = asyncio.ensure_future(session.request(method, self.base_url + path, **options))
                if name is not None:
                    self._open[name] = opening.cancel
                async with await opening as response:
                    if name is not None:
                        self._open[name] = response.close
                    if response.status != 200:
                        raise refusal(response.status, await response.text(errors="replace"), self.base_url)
                    yield response
        finally:
            if session is not self._session:
                await session.close()

    @contextlib.contextmanager
    def _one_error(self) -> Iterator[None]:
        try:
            yield
        except (aiohttp.ClientError, OSError, TimeoutError) as e:
            raise self.broken(str(e) or type(e).__name__) from None

    def _json(self, text: bytes) -> dict[str, Any]:
        try:
            value = json.loads(text)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise self.broken(f"what it sent is no JSON object: {text.strip()[:80].decode(errors='replace')!r}")
        return value

    def broken(self, what: str) -> PolicyError:
        return PolicyError(f"{self.base_url}: {' '.join(what.split())}", status=502, kind="connection")


async def _lines(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """Lines of any length (aiohttp's own reader gives up at 128 KiB, and a routing record is longer)."""
    rest = bytearray()
    async for piece in response.content.iter_any():
        rest += piece
        if b"\n" in piece:
            *lines, last = bytes(rest).split(b"\n")
            rest = bytearray(last)
            for line in lines:
                yield line
    if rest:
        yield bytes(rest)


def refusal(status: int, text: str, base_url: str) -> PolicyError:
    """The server's own words, whichever of the two usual shapes they come in."""
    try:
        error = json.loads(text)["error"]
        if isinstance(error, str):
            return PolicyError(error, status=status, kind="error")
        return PolicyError(str(error.get("message", error)), status=status, kind=str(error.get("type", "error")))
    except (ValueError, KeyError, TypeError, AttributeError):
        return PolicyError(f"{base_url} answered {status}: {' '.join(text.split())[:200]}", status=status, kind="error")


def _status(event: dict[str, Any]) -> int:
    code = event["error"].get("code") if isinstance(event["error"], dict) else None
    return code if isinstance(code, int) else 500


def numbers(values: Any) -> Sequence[Any]:
    """A JSON list, or TypeError."""
    if not isinstance(values, list):
        raise TypeError(f"a list was expected, not {type(values).__name__}")
    return values
