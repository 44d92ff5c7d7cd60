"""A proxy that hands everything on unchanged and remembers what the client was shown: every request, its end, its usage."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from aiohttp import web

HOP = {"host", "content-length", "transfer-encoding", "connection", "accept-encoding", "keep-alive"}


@dataclass
class Exchange:
    """One request as its client saw it. `key`: its secret. `shown`: the body so far."""

    method: str
    path: str
    body: bytes
    began: float
    key: str = ""
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    shown: bytearray = field(default_factory=bytearray)
    ended: float = 0.0

    @property
    def request_id(self) -> str:
        return self.headers.get("x-request-id", "")

    @property
    def events(self) -> list[dict[str, Any]]:
        """The answer's JSON documents: one, or those of the stream."""
        texts = [line[5:].strip() for line in self.shown.splitlines() if line.startswith(b"data:")] or [self.shown]
        out = []
        for text in texts:
            with suppress(ValueError):
                out.append(json.loads(text))
        return [doc for doc in out if isinstance(doc, dict)]

    @property
    def usage(self) -> dict[str, Any] | None:
        """The last word on what it cost, wherever its surface says so."""
        found = None
        for doc in self.events:
            for place in (doc, doc.get("response"), *(doc.get("choices") or ())):
                if isinstance(place, dict) and isinstance(place.get("usage"), dict):
                    found = place["usage"]
        return found

    @property
    def failure(self) -> dict[str, Any] | None:
        """The error that the client was told, as a status or in the stream."""
        return next((doc["error"] for doc in self.events if isinstance(doc.get("error"), dict)), None)


@asynccontextmanager
async def recording(upstream: str) -> AsyncIterator[tuple[str, list[Exchange]]]:
    """(root URL of the proxy, the exchanges, in the order they began). `upstream`: a root URL."""
    seen: list[Exchange] = []

    async def handle(request: web.Request) -> web.StreamResponse:
        key = request.headers.get("x-api-key") or request.headers.get("authorization", "").removeprefix("Bearer ")
        exchange = Exchange(request.method, request.path, await request.read(), time.monotonic(), key)
        seen.append(exchange)
        headers = {name: value for name, value in request.headers.items() if name.lower() not in HOP}
        url = upstream + request.path_qs
        try:
            async with http.request(request.method, url, data=exchange.body, headers=headers) as answer:
                exchange.status = answer.status
                exchange.headers = {name.lower(): value for name, value in answer.headers.items()}
                kept = {n: v for n, v in answer.headers.items() if n.lower() not in HOP | {"content-encoding"}}
                response = web.StreamResponse(status=answer.status, headers=kept)
                await response.prepare(request)
                async for part in answer.content.iter_any():
                    exchange.shown += part
                    await response.write(part)
                await response.write_eof()
                return response
        finally:
            exchange.ended = time.monotonic()

    app = web.Application(client_max_size=1 << 28)
    app.router.add_route("*", "/{path:.*}", handle)
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True)
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None), auto_decompress=False) as http:
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = site._server.sockets[0].getsockname()[1]
        try:
            yield f"http://127.0.0.1:{port}", seen
        finally:
            await runner.cleanup()
