"""One request's money, from admission to bill: hold, extend while it answers, settle or release, exactly once.

The hold covers the prompt and a first stretch of answer; it grows ahead of the answer, in stretches that double. Nothing
is handed on that is not covered, so a customer is never charged beyond the balance, and the bill is what was handed on.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from time import perf_counter

from msgspec.structs import replace

from tidelock.service.books import Admission, BudgetReached, Hold, Metered
from tidelock.service.db import StorageDown
from tidelock.service.prices import Counts
from tidelock.service.record import current, step
from tidelock.service.till import Also, Then, Till

log = logging.getLogger(__name__)

FIRST_STRETCH, LONGEST_STRETCH = 128, 1024  # tokens of answer per extension


class Tab:
    """`streaming`: the client receives tokens as they are taken, so leaving, or a crash, charges them."""

    def __init__(self, till: Till, hold: Hold, asked_tokens: int, streaming: bool) -> None:
        self._till, self.hold, self._streaming = till, hold, streaming
        self._asked, self._covered, self._taken = asked_tokens, hold.max_tokens, 0
        self._ahead: asyncio.Task[int] | None = None
        self.delivered = False  # the client has been sent something of it: set by who sends
        self.exhausted = False  # the balance did not cover what was to come
        self.over_budget = False  # or rather a budget did not
        self.charge: int | None = None  # nano-USD, once settled

    async def take(self, tokens: int) -> int:
        """How many of the next `tokens` may be handed on: all of them, or fewer at the end of the money.
        Raises StorageDown if the database cannot say."""
        while self._taken + tokens > self._covered and not self.exhausted:
            await self._grow()
        allowed = min(tokens, self._covered - self._taken)
        self._taken += allowed
        if self._ahead is None and self._covered < self._asked and self._covered - self._taken < self._stretch() // 4:
            self._ahead = asyncio.create_task(self._extend())
        return allowed

    async def tools(self, calls: Mapping[str, int]) -> None:
        """Covers calls of paid tools before they are made. Raises InsufficientBalance."""
        await self._till.extend(self.hold, 0, progress=self._progress(), tools=calls)

    async def settle(self, metered: Metered, also: Also | None = None, traced: Then | None = None) -> int:
        """Charges, then writes the trace; `also` and `traced` as for `Till.settle`. Raises StorageDown if the database is down
        for long; the bill of what was streamed is then written when it is back, and an answer that nobody has seen is free.
        Once it is charged it is given, though its trace cannot be written; reconciliation tells of what is missing."""
        await self._stop_growing()
        self.charge = 0  # from here on it is the till's
        booked: float | None = None

        def then(future: asyncio.Future[int], charge: int) -> None:
            nonlocal booked
            self.charge, booked = charge, perf_counter()
            traced(future, charge)

        with step("settle") as part:
            try:
                self.charge = await self._till.settle(
                    self.hold, metered, also, then if traced else None, or_free=not self._streaming
                )
            except (OSError, StorageDown) as error:
                if booked is None:
                    raise
                why = error.strerror if isinstance(error, OSError) else "it takes too long"
                log.error("%s is answered and charged, but its trace could not be written: %s", self.hold.request_id, why)
            finally:
                if booked is not None:
                    part.become("trace", booked)
                    self._billed(metered)
        if booked is None:
            self._billed(metered)
        return self.charge

    async def close(self) -> None:
        """For the ways out without a bill: what a client was sent is charged, all else is free. Submitted before it is
        waited for, because the way out may be a cancellation."""
        if self._ahead is not None:
            self._ahead.cancel()
        if self.charge is None:
            self.charge = 0
            try:
                if self.delivered and self._taken:
                    with step("settle"):
                        self.charge = await self._till.settle(self.hold, metered := Metered(self.counts(), "abort"))
                    self._billed(metered)
                else:
                    await self._till.release(self.hold)
            except StorageDown:
                pass  # it will be written when the database is back

    def _billed(self, metered: Metered) -> None:
        if (record := current()) is not None:
            record.billed(metered.counts, self.charge or 0, metered.finish_reason)

    def counts(self, cached_tokens: int = 0, tools: Mapping[str, int] | None = None) -> Counts:
        """What was handed on so far."""
        return Counts(self.hold.prompt_tokens, cached_tokens, completion=self._taken, tools=tools or {})

    def _stretch(self) -> int:
        return min(LONGEST_STRETCH, max(FIRST_STRETCH, self._covered), max(self._asked - self._covered, 1))

    def _progress(self) -> int:
        return self._taken if self._streaming else 0

    async def _extend(self) -> int:
        try:
            return await self._till.extend(self.hold, self._stretch(), progress=self._progress())
        except BudgetReached:
            self.over_budget = True
            return 0

    async def _grow(self) -> None:
        task, self._ahead = self._ahead or asyncio.create_task(self._extend()), None
        try:
            more = await task
        except KeyError:  # swept: we must have been thought dead
            raise StorageDown(f"the hold of {self.hold.request_id} is no longer open") from None
        self._covered += more
        self.exhausted = more == 0

    async def _stop_growing(self) -> None:
        """Lets an extension under way end first, so that the bill comes after it."""
        task, self._ahead = self._ahead, None
        if task is not None:
            try:
                self._covered += await task
            except (StorageDown, KeyError):
                pass


@asynccontextmanager
async def opened(till: Till, ask: Admission, streaming: bool) -> AsyncIterator[Tab]:
    """A tab that cannot be left open. `ask.max_tokens` is what the client asked for in all.

    Raises InsufficientBalance if the balance does not cover the prompt and one token, StorageDown if it is unknown.
    """
    first = min(ask.max_tokens, max(FIRST_STRETCH, ask.least_tokens))
    if (record := current()) is not None:
        record.model = ask.model
    till.running.add(ask.request_id)
    try:
        with step("hold"):
            hold = await till.hold(replace(ask, max_tokens=first))
        tab = Tab(till, hold, ask.max_tokens, streaming)
        try:
            yield tab
        finally:
            await tab.close()
    finally:
        till.running.discard(ask.request_id)
