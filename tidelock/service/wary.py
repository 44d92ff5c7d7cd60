"""uvicorn's HTTP protocol, wary of clients that never come to the point.

The parser keeps whatever is sent as a request's head until the head is over, and nobody looks at the clock meanwhile. Before
there is a request there is no key, so this is open to everybody.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MOST_HEAD = 64 << 10  # bytes of request line and headers, give or take what the socket hands over at once
HEAD_S = 30.0  # for a connection to say its first request, or a later one that it has begun
REFUSAL = (b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: application/json\r\nconnection: close\r\n"
           b"content-length: %d\r\n\r\n%s")  # fmt: skip
WORDS = (b'{"error":{"type":"invalid_request_error","message":"the request\'s headers are too large",'
         b'"code":"headers_too_large","param":null}}')  # fmt: skip


class WaryProtocol(HttpToolsProtocol):
    _late: asyncio.TimerHandle | None = None
    _head, _unfinished = True, 0  # whether what comes now is a head, and the bytes of one whose end has not come

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._late = self.loop.call_later(HEAD_S, transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        self._in_time()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head = True

    def on_headers_complete(self) -> None:
        self._head, self._unfinished = False, 0
        self._in_time()
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._head and not self.transport.is_closing():
            self._unfinished += len(data)
            if self._late is None:
                self._late = self.loop.call_later(HEAD_S, self.transport.close)
            if self._unfinished > MOST_HEAD:
                self.transport.write(REFUSAL % (len(WORDS), WORDS))
                self.transport.close()

    def _in_time(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None
