"""A load of HTTP requests over kept-alive raw sockets, cheap enough to share a core with the upstream.

Each connection asks again as soon as its answer is whole. A request is bytes with one placeholder, which a counter fills,
so that no two are the same conversation. What is not a 200 is counted as an error and its first one is kept.
"""

from __future__ import annotations

import selectors
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

MARK = b"@@@@@@@@"  # replaced by the request's number


@dataclass
class Measured:
    seconds: float
    latencies_s: list[float]
    errors: int = 0
    first_error: bytes = b""

    @property
    def rate(self) -> float:
        return len(self.latencies_s) / self.seconds if self.seconds else 0.0

    def ms(self, share: float) -> float:
        """A quantile in milliseconds; nan without any answer."""
        ordered = sorted(self.latencies_s)
        return ordered[min(int(len(ordered) * share), len(ordered) - 1)] * 1e3 if ordered else float("nan")


@dataclass
class _Connection:
    sock: socket.socket
    head: bytes
    body: bytes
    data: bytearray = field(default_factory=bytearray)
    begun: float = 0.0
    closed: bool = False  # by the server, after its answer

    def ask(self, number: int) -> None:
        body = self.body.replace(MARK, b"%08d" % number)
        self.data.clear()
        self.begun = time.perf_counter()
        self.sock.sendall(self.head + body)

    def answered(self) -> bool:
        """Reads what there is; whether the response is whole. Raises ConnectionError."""
        more = self.sock.recv(262144)
        if not more:
            self.closed = True
            if b"\r\n\r\n" not in self.data:
                raise ConnectionError("the server closed the connection")
            return True
        self.data += more
        end = self.data.find(b"\r\n\r\n")
        if end < 0:
            return False
        head = bytes(self.data[:end]).lower()
        at = head.find(b"content-length:")
        if at >= 0:
            return len(self.data) >= end + 4 + int(head[at + 15 :].split(b"\r\n", 1)[0])
        return self.data.endswith(b"\r\n0\r\n\r\n")


class Load:
    """`connections` to one server; `requests` are (key, body) given out in turn, one to a connection."""

    def __init__(
        self, port: int, path: str, requests: list[tuple[str, bytes]], connections: int, headers: Mapping[str, str] = {}
    ) -> None:
        self._port, self._path, self._headers = port, path, "".join(f"{k}: {v}\r\n" for k, v in headers.items())
        self._requests, self._n = requests, connections
        self._sent = 0
        self._open = [self._connect(k) for k in range(connections)]

    def _connect(self, k: int) -> _Connection:
        key, body = self._requests[k % len(self._requests)]
        head = (
            f"POST {self._path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\n"
            f"content-type: application/json\r\n{self._headers}content-length: {len(body)}\r\n\r\n"
        ).encode()
        return _Connection(self._dial(), head, body)

    def _dial(self) -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", self._port))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    def _ask(self, connection: _Connection) -> None:
        self._sent += 1
        connection.ask(self._sent + Load.numbered)

    numbered = 0  # requests of earlier loads: numbers are not used twice

    def run(self, seconds: float = 1e9, requests: int = 1 << 60) -> Measured:
        """Until either is reached; answers that are then under way are waited for and not counted."""
        measured = Measured(0.0, [])
        began = time.perf_counter()
        ends, left = began + seconds, requests
        with selectors.DefaultSelector() as selector:
            for connection in self._open[: min(self._n, requests)]:
                selector.register(connection.sock, selectors.EVENT_READ, connection)
                self._ask(connection)
                left -= 1
            running = len(selector.get_map())  # how many wait for an answer
            while running:
                for key, _ in selector.select(30):
                    connection = key.data
                    if not connection.answered():
                        continue
                    now = time.perf_counter()
                    if connection.data[9:12] != b"200":
                        measured.errors += 1
                        measured.first_error = measured.first_error or bytes(connection.data[:600])
                    elif now < ends:
                        measured.latencies_s.append(now - connection.begun)
                        measured.seconds = now - began
                    if now < ends and left > 0 and measured.errors < 100:
                        left -= 1
                        if connection.closed or b"connection: close" in connection.data[:2000].lower():
                            selector.unregister(connection.sock)
                            connection.sock.close()
                            connection.sock, connection.closed = self._dial(), False
                            selector.register(connection.sock, selectors.EVENT_READ, connection)
                        self._ask(connection)
                    else:
                        running -= 1
                        selector.unregister(connection.sock)
        Load.numbered += self._sent
        self._sent = 0
        return measured

    def close(self) -> None:
        for connection in self._open:
            connection.sock.close()
