"""Runs the application in the engine's own process, on a socket we bound ourselves.

uvicorn, because it takes a bound socket (so port 0 gives its real port before the first request, and a taken port is
one clear error) and stops from inside a running loop; and because with httptools it costs least. Of one core, for a request
that an application answers at once (300 bytes each way, 64 connections): httptools 31 us, granian 2.8 embedded 46-50 us,
uvicorn with h11 86-99 us. uvloop makes little of that, and a tenth of the whole service.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import uvicorn
import uvloop
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from tidelock.service.app import create_app
from tidelock.service.scrape import telling
from tidelock.service.state import ServiceState
from tidelock.service.wary import WaryProtocol
from tidelock.tokens.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Running:
    host: str
    port: int
    task: asyncio.Task[None]  # ends when the server does

    @property
    def base_url(self) -> str:
        """What API clients are given."""
        return f"http://{self.host}:{self.port}/v1"


def run(main: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run` for a program that serves: on uvloop, whose sockets and timers cost a third, and with a collector of
    cycles that walks neither through what was there before nor, every few hundred requests, through what only ever grows."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    return uvloop.run(main)


def bind(host: str, port: int, shared: bool = False) -> socket.socket:
    """`shared`: several processes bind it, and connections are dealt out among those that listen. Raises UserError if the
    port is taken or not allowed."""
    # asyncio turns Nagle's algorithm off only on sockets that name TCP; with it on, every answer waits ~40 ms
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shared:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        reason = f"cannot listen on {host}:{port}: {error}; choose another --port, or 0 for a free one"
        raise UserError(reason) from error
    return listener


@contextlib.asynccontextmanager
async def serving(
    state: ServiceState, host: str = "127.0.0.1", port: int = 0, ready_file: str | Path | None = None,
    app: ASGIApp | None = None,
) -> AsyncIterator[Running]:  # fmt: skip
    """Serves while the block runs; on leaving it, running requests get 5 s to finish.

    `ready_file` appears, with the base URL in it, once requests are answered. `app`: the application, if something is
    wrapped around it. Raises UserError if the port is taken.
    """
    member = state.member
    async with contextlib.AsyncExitStack() as stack:
        listener = stack.enter_context(bind(host, port, shared=member is not None))
        await stack.enter_async_context(telling(state.metrics, member))
        config = uvicorn.Config(_forwarded(app or create_app(state)), log_level="warning", log_config=None, lifespan="on",
                                http=WaryProtocol, ws="websockets-sansio", ws_max_size=state.max_body_bytes,
                                ws_per_message_deflate=False, interface="asgi3", proxy_headers=False,
                                timeout_graceful_shutdown=5)  # fmt: skip
        server = _Server(config)
        task = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            while not server.started:
                if task.done():
                    task.result()
                    raise RuntimeError("the server ended before it was ready")
                await asyncio.sleep(0.01)
            running = Running(host, listener.getsockname()[1], task)
            if ready_file is not None:
                write_atomically(Path(ready_file), running.base_url + "\n")
            yield running
        finally:
            server.should_exit = True
            await task


def _forwarded(app: ASGIApp) -> ASGIApp:
    """A proxy on this machine says who its client is (uvicorn's rule); without its headers nothing is asked."""
    behind_proxy = ProxyHeadersMiddleware(app, os.environ.get("FORWARDED_ALLOW_IPS", "127.0.0.1,::1"))

    def serve(scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        told = scope["type"] != "lifespan" and any(name.startswith(b"x-forwarded-") for name, _ in scope["headers"])
        return (behind_proxy if told else app)(scope, receive, send)

    return serve


class _Server(uvicorn.Server):
    """Leaves the process's signals to the program that embeds it."""

    @contextlib.contextmanager
    def capture_signals(self):
        yield


def write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
