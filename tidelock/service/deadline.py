"""`with within(seconds):` ends what is awaited in it with a TimeoutError, as `asyncio.timeout` does at four times the price."""

from __future__ import annotations

import asyncio
from typing import Any


class within:  # noqa: N801  (used as a statement)
    __slots__ = ("_cancelling", "_late", "_seconds", "_task", "_timer")

    def __init__(self, seconds: float) -> None:
        self._seconds, self._late = seconds, False

    def __enter__(self) -> None:
        self._task = asyncio.current_task()
        self._cancelling = self._task.cancelling()
        self._timer = asyncio.get_running_loop().call_later(self._seconds, self._end)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        self._timer.cancel()
        # cancelled by somebody else as well, it is theirs
        if self._late and self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise TimeoutError from error

    def _end(self) -> None:
        self._late = True
        self._task.cancel()
