"""Between the tasks that sample a request's answers and the one that writes them to its client."""

from __future__ import annotations

import asyncio

from tidelock.service.answer import Piece


class Inbox:
    """Hands over everything that arrived since the last look, at most once in `merge_s`: tokens that come fast share a
    write, and a reader that is slow gets few large ones."""

    def __init__(self, patience_s: float, merge_s: float) -> None:
        self._items: list[Piece | Exception | None] = []
        self._loop = asyncio.get_running_loop()
        self._news, self._urgent = asyncio.Event(), False
        self._merge_s, self._next_look = merge_s, 0.0
        self._pause: asyncio.Future[None] | None = None
        self._patience_s = patience_s
        self._timer = self._loop.call_later(patience_s, self._tick)
        self._quiet = True

    def put(self, items: list) -> None:
        """An end or a failure is handed over at once."""
        if items:
            self._items += items
            self._news.set()
            if not isinstance(items[-1], Piece):
                self._urgent = True
                _release(self._pause)

    async def take(self) -> list:
        """At least one item, or [] after `patience_s` without any."""
        await self._news.wait()
        wait_s = self._next_look - self._loop.time()
        if wait_s > 0 and not self._urgent:
            self._pause = self._loop.create_future()
            timer = self._loop.call_later(wait_s, _release, self._pause)
            await self._pause
            timer.cancel()
        self._next_look = self._loop.time() + self._merge_s
        self._news.clear()
        items, self._items = self._items, []
        self._quiet = not items
        return items

    def close(self) -> None:
        self._timer.cancel()

    def _tick(self) -> None:
        if self._quiet:
            self._news.set()
        self._quiet = True
        self._timer = self._loop.call_later(self._patience_s, self._tick)


def _release(pause: asyncio.Future[None] | None) -> None:
    if pause is not None and not pause.done():
        pause.set_result(None)
