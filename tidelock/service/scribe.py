"""The trace, written off the event loop: answers that end at the same time share one write to the disk."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tidelock.tokens.trace import Node, Served, TraceStore


@dataclass(eq=False)
class _Answer:
    nodes: Sequence[Node]
    served: Served | None
    written: asyncio.Future[Any]
    result: Any


class Scribe:
    """Its thread starts with the first answer and ends with `close`, after all that was given until then."""

    def __init__(self, traces: TraceStore) -> None:
        self._traces = traces
        self._queue: queue.SimpleQueue[_Answer | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()

    def put(self, nodes: Sequence[Node], served: Served | None, written: asyncio.Future[Any], result: Any = None) -> None:
        """From any thread. When the nodes, and the request they answer, are on disk, `written` gets `result`; otherwise what
        `TraceStore.add_many` raised. Whoever cancels it stops waiting, not the writing."""
        if self._thread is None:
            self._start()
        self._queue.put(_Answer(nodes, served, written, result))

    def _start(self) -> None:
        with self._starting:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="scribe", daemon=True)
                self._thread.start()

    def close(self) -> None:
        with self._starting:
            if self._thread is not None:
                self._queue.put(None)
                self._thread.join()
                self._thread = None

    def _run(self) -> None:
        """In the thread: everything that waits, as one batch, again and again."""
        answer = self._queue.get()
        while answer is not None:
            batch = []
            try:
                while answer is not None:
                    batch.append(answer)
                    answer = self._queue.get_nowait()
            except queue.Empty:
                pass
            self._tell(batch, self._write(batch))
            if answer is not None:
                answer = self._queue.get()

    def _tell(self, batch: Sequence[_Answer], errors: Sequence[Exception | None]) -> None:
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Answer, Exception | None]]] = {}
        for answer, error in zip(batch, errors, strict=True):
            by_loop.setdefault(answer.written.get_loop(), []).append((answer, error))
        for loop, told in by_loop.items():
            try:
                loop.call_soon_threadsafe(_tell, told)
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


def _tell(results: list[tuple[_Answer, Exception | None]]) -> None:
    for answer, error in results:
        if answer.written.done():  # cancelled
            continue
        if error is None:
            answer.written.set_result(answer.result)
        else:
            answer.written.set_exception(error)
