"""HTTP/1.1 to model servers: kept connections, requests of bytes, answers read as they come. What they mean is in `sse`.

Only what a model server needs, over httptools' parser, because every request of a gateway goes through here: no redirects,
cookies, proxies or compression. A small streamed answer costs it 10 to 33 us of one core where aiohttp 3.14 takes 46 to 87
(`python -m benchmarks.http_client`), and more where the processor is cold, as a gateway's is.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from urllib.parse import quote, urlsplit

import httptools

from tidelock.tokens.errors import UserError

MOST_HEAD = 64 << 10  # bytes of an answer's header fields
MOST_UNREAD = 256 << 10  # bytes of a body that wait to be read before the server is made to wait


class NotConnected(ConnectionError):
    """The server could not be reached."""


@dataclass(frozen=True)
class Server:
    """Where requests go, and what stands before every path there."""

    host: str
    port: int
    tls: bool
    path: str = ""

    @staticmethod
    def at(url: str) -> Server:
        """Raises UserError."""
        parts = port = None
        with contextlib.suppress(ValueError):
            parts = urlsplit(url)
            port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
        if port is None or parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
            raise UserError(f"{url!r} is no address of a server; it looks like http://HOST:PORT/v1, without a user's name")
        tls = parts.scheme == "https"
        path = quote(parts.path, safe="/%:@!$&'()*+,;=~").rstrip("/")
        return Server(parts.hostname, port, tls, path)

    def head(self, method: str, path: str) -> bytes:
        """The beginning of a request, up to the headers of its own."""
        host = f"[{self.host}]" if ":" in self.host else self.host.encode("idna").decode()
        named = host if self.port == (443 if self.tls else 80) else f"{host}:{self.port}"
        return f"{method} {self.path}{path} HTTP/1.1\r\nHost: {named}\r\n".encode()


def header_lines(headers: Mapping[str, str]) -> bytes:
    """Raises UserError for one that would be more than one."""
    lines = [f"{name}: {value}" for name, value in headers.items()]
    if any(char in line for line in lines for char in "\r\n\0"):
        raise UserError("a header, or the API key in it, has a line break in it")
    return "".join(f"{line}\r\n" for line in lines).encode("latin-1", "replace")


class Client:
    """Connections are kept for `keep_s` seconds after an answer; there may be any number. Of one event loop at a time."""

    def __init__(self, keep_s: float = 15.0, tls: ssl.SSLContext | None = None) -> None:
        self._keep_s, self._tls = keep_s, tls
        self._loop: asyncio.AbstractEventLoop | None = None
        self._kept: dict[Server, list[tuple[float, _Connection]]] = {}  # oldest first, with when it was last used
        self._timer: asyncio.TimerHandle | None = None

    async def send(self, server: Server, head: bytes, body: bytes = b"", connect_s: float = 30.0) -> Answer:
        """`head`: the request up to its last header but the body's length. Returns when the answer's header fields have come.
        Raises ConnectionError; NotConnected if nothing was sent."""
        connection = self._idle(server) or await self._connected(server, connect_s)
        return await connection.ask(b"%bContent-Length: %d\r\n\r\n%b" % (head, len(body), body))

    def close(self) -> None:
        """Ends the connections that nobody uses."""
        for _, connection in self._all():
            connection.transport.close()
        self._kept.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def keep(self, connection: _Connection) -> None:
        if self._keep_s <= 0 or connection.loop is not self._loop:
            connection.transport.close()
            return
        self._kept.setdefault(connection.server, []).append((self._loop.time(), connection))
        if self._timer is None:
            self._timer = self._loop.call_later(self._keep_s, self._sweep)

    def _idle(self, server: Server) -> _Connection | None:
        loop = asyncio.get_running_loop()
        if loop is not self._loop:  # what was kept in another one went with it
            self._loop, self._kept, self._timer = loop, {}, None
        kept = self._kept.get(server)
        while kept:
            since, connection = kept.pop()
            if not connection.transport.is_closing():
                if loop.time() - since < self._keep_s:
                    return connection
                connection.transport.close()
        return None

    async def _connected(self, server: Server, connect_s: float) -> _Connection:
        tls = (self._tls or _system_tls()) if server.tls else None
        make = lambda: _Connection(self, server, self._loop)  # noqa: E731
        try:
            async with asyncio.timeout(connect_s):
                _, connection = await self._loop.create_connection(make, server.host, server.port, ssl=tls)
        except TimeoutError:
            raise NotConnected(f"no connection within {connect_s:g} s") from None
        except (OSError, UnicodeError) as error:
            raise NotConnected(str(error) or type(error).__name__) from error
        return connection

    def _sweep(self) -> None:
        self._timer, oldest = None, self._loop.time() - self._keep_s
        for since, connection in self._all():
            if since <= oldest:
                connection.transport.close()
        for server, kept in list(self._kept.items()):
            self._kept[server] = [one for one in kept if not one[1].transport.is_closing()]
            if not self._kept[server]:
                del self._kept[server]
        if self._kept:
            self._timer = self._loop.call_later(self._keep_s, self._sweep)

    def _all(self) -> Iterator[tuple[float, _Connection]]:
        for kept in self._kept.values():
            yield from kept


class Answer:
    """`headers`: names in lower case; of several of one name the last counts."""

    def __init__(self, connection: _Connection) -> None:
        self.status, self.headers = 0, {}
        self._connection: _Connection | None = connection  # None: the answer has ended
        self._begun, self._error = False, None
        self._pieces: list[bytes] = []
        self._unread, self._paused = 0, False
        self._reader: asyncio.Future[None] | None = None

    @property
    def content_type(self) -> str:
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()

    async def some(self) -> bytes:
        """What has come since the last look, at least a byte; b"" at the end. Raises ConnectionError if there is no end."""
        while not self._pieces:
            if self._error is not None:
                raise self._error
            if self._connection is None:
                return b""
            await self._news()
        data = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces.clear()
        self._unread = 0
        if self._paused and self._connection is not None:
            self._paused = False
            self._connection.transport.resume_reading()
        return data

    async def read(self, most: int | None = None) -> bytes:
        """The rest of it, or so many bytes of that and then the connection is given up."""
        data = bytearray()
        while (most is None or len(data) < most) and (piece := await self.some()):
            data += piece
        self.close()
        return bytes(data[:most])

    def close(self) -> None:
        """Gives up the connection of an answer that has not ended: whoever reads it finds a ConnectionError."""
        if self._connection is not None:
            transport = self._connection.transport
            self.failed(ConnectionAbortedError("the answer was given up"))
            transport.abort()

    async def begun(self) -> Answer:
        try:
            while not self._begun:
                if self._error is not None:
                    raise self._error
                await self._news()
        except BaseException:
            self.close()
            raise
        return self

    # ---- told by the connection --------------------------------------------------------------------------------------

    def began(self, status: int, headers: dict[str, str]) -> None:
        self.status, self.headers, self._begun = status, headers, True

    def came(self, data: bytes) -> None:
        self._pieces.append(data)
        self._unread += len(data)
        if self._unread > MOST_UNREAD and not self._paused:
            self._paused = True
            self._connection.transport.pause_reading()

    def ended(self) -> None:
        if self._paused:
            self._paused = False
            self._connection.transport.resume_reading()
        self._connection.answer = self._connection = None
        self.wake()

    def failed(self, error: ConnectionError) -> None:
        self._error = error
        self._connection.answer = self._connection = None
        self.wake()

    def wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    async def _news(self) -> None:
        self._reader = self._connection.loop.create_future()
        await self._reader


class _Connection(asyncio.Protocol):
    """One answer at a time: what comes without having been asked for ends it."""

    def __init__(self, client: Client, server: Server, loop: asyncio.AbstractEventLoop) -> None:
        self.server, self.loop = server, loop
        self.answer: Answer | None = None
        self._client, self._parser = client, httptools.HttpResponseParser(self)
        self._headers: dict[str, str] = {}
        self._head_size, self._to_the_end = 0, False

    async def ask(self, request: bytes) -> Answer:
        if self.transport.is_closing():
            raise NotConnected("the server closed the connection at once")
        self.answer = answer = Answer(self)
        self._headers, self._head_size, self._to_the_end = {}, 0, False
        self.transport.write(request)
        return await answer.begun()

    # ---- of the transport --------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:
        self.transport = transport
        if (sock := transport.get_extra_info("socket")) is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def data_received(self, data: bytes) -> None:
        if (answer := self.answer) is None:
            self.transport.abort()
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            if self.answer is not None:
                self.answer.failed(ConnectionError(f"what it sent is no HTTP answer: {error}"))
            self.transport.abort()
        answer.wake()

    def connection_lost(self, error: Exception | None) -> None:
        if self.answer is None:
            return
        if error is None and self._to_the_end:
            self.answer.ended()
        else:
            self.answer.failed(ConnectionResetError(str(error or "the server closed the connection within its answer")))

    # ---- of the parser -----------------------------------------------------------------------------------------------

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head_size += len(name) + len(value)
        if self._head_size > MOST_HEAD:
            raise ValueError("the header fields are too long")
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        status, headers = self._parser.get_status_code(), self._headers
        if status >= 200:  # what comes before is for others, or only says that there will be an answer
            self._to_the_end = "content-length" not in headers and "transfer-encoding" not in headers
            self.answer.began(status, headers)

    def on_body(self, data: bytes) -> None:
        if self.answer is not None:  # one that was given up meanwhile may have more in the same read
            self.answer.came(data)

    def on_message_complete(self) -> None:
        if self._parser.get_status_code() < 200:
            self._headers = {}
            return
        keep = self._parser.should_keep_alive()
        self.answer.ended()
        if keep:
            self._client.keep(self)
        else:
            self.transport.close()


@cache
def _system_tls() -> ssl.SSLContext:
    return ssl.create_default_context()
