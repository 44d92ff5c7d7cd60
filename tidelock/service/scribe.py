"""The trace, written off the event loop: answers that end at the same time share one write to the disk."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from tidelock.service.record import step
from tidelock.tokens.trace import Node, Served, TraceStore

Waiting = tuple[Sequence[Node], Served | None, asyncio.Future[None]]


class Scribe:
    """Used from one event loop."""

    def __init__(self, traces: TraceStore) -> None:
        self._traces = traces
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="scribe")
        self._waiting: list[Waiting] = []
        self._writing: asyncio.Task[None] | None = None

    async def add(self, nodes: Sequence[Node], served: Served | None = None) -> None:
        """Returns when the nodes, and the request they answer, are on disk; a caller that is cancelled meanwhile stops waiting, not the writing.
        Raises what `TraceStore.add_many` raises."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        self._waiting.append((nodes, served, future))
        if self._writing is None:
            self._writing = loop.create_task(self._drain())
        with step("trace"):
            await future

    async def _drain(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._waiting:
                batch, self._waiting = self._waiting, []
                errors = await loop.run_in_executor(self._thread, self._write, batch)
                for (_, _, future), error in zip(batch, errors, strict=True):
                    if future.done():
                        continue
                    if error is None:
                        future.set_result(None)
                    else:
                        future.set_exception(error)
        finally:
            self._writing = None

    def _write(self, batch: list[Waiting]) -> list[Exception | None]:
        try:
            served = [one for _, one, _ in batch if one is not None]
            self._traces.add_many([node for nodes, _, _ in batch for node in nodes], served)
            return [None] * len(batch)
        except Exception as error:
            if len(batch) == 1:
                return [error]
            return [self._write([one])[0] for one in batch]  # one of them spoils it for all: find out which
