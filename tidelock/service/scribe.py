"""The trace, written off the event loop: answers that end at the same time share one write to the disk."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from tidelock.service.record import step
from tidelock.tokens.trace import Node, Served, TraceStore


@dataclass(eq=False)
class _Answer:
    nodes: Sequence[Node]
    served: Served | None
    loop: asyncio.AbstractEventLoop
    written: asyncio.Future[None]


class Scribe:
    def __init__(self, traces: TraceStore) -> None:
        self._traces = traces
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="scribe")
        self._lock = threading.Lock()
        self._waiting: list[_Answer] = []
        self._writing = False

    async def add(self, nodes: Sequence[Node], served: Served | None = None) -> None:
        """Returns when the nodes, and the request they answer, are on disk; a caller that is cancelled meanwhile stops waiting, not
        the writing. Raises what `TraceStore.add_many` raises."""
        loop = asyncio.get_running_loop()
        answer = _Answer(nodes, served, loop, loop.create_future())
        with self._lock:
            self._waiting.append(answer)
            begin, self._writing = not self._writing, True
        if begin:
            self._thread.submit(self._drain)
        with step("trace"):
            await answer.written

    def _drain(self) -> None:
        """In the thread: everything that waits, until nothing does."""
        while True:
            with self._lock:
                batch, self._waiting = self._waiting, []
                if not batch:
                    self._writing = False
                    return
            told = list(zip(batch, self._write(batch), strict=True))
            for loop in {answer.loop for answer in batch}:
                try:
                    loop.call_soon_threadsafe(_tell, [(a.written, error) for a, error in told if a.loop is loop])
                except RuntimeError:  # the loop is closed: nobody waits
                    pass

    def _write(self, batch: list[_Answer]) -> list[Exception | None]:
        try:
            served = [answer.served for answer in batch if answer.served is not None]
            self._traces.add_many([node for answer in batch for node in answer.nodes], served)
            return [None] * len(batch)
        except Exception as error:
            if len(batch) == 1:
                return [error]
            return [self._write([answer])[0] for answer in batch]  # one of them spoils it for all: find out which


def _tell(results: list[tuple[asyncio.Future[None], Exception | None]]) -> None:
    for written, error in results:
        if written.done():  # cancelled
            continue
        if error is None:
            written.set_result(None)
        else:
            written.set_exception(error)
