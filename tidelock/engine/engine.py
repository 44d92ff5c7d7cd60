"""The in-process engine: a `Policy` whose model runs on a thread of its own.

New weights are taken between steps. Requests finish on the version they started with, new ones start on the new
version; while both are busy, two schedulers take turns.
"""

from __future__ import annotations

import asyncio
import itertools
import queue
import random
import threading
from collections.abc import AsyncIterator, Callable
from collections.abc import Sequence as Seq

from tidelock.models import TransformerLM, load_checkpoint, ops
from tidelock.tokens.policy import Chunk, PolicyError, SamplingParams

from .scheduler import Limits, Scheduler, Stats
from .sequence import Sequence


class Engine:
    """Policy over a model in this process. `boundary_id` is the template's end-of-message id (for prefix reuse)."""

    def __init__(
        self, model: TransformerLM, version: int = 0, *, limits: Limits = Limits(), boundary_id: int | None = None
    ) -> None:
        self.exact = True
        self.bitwise = ops.exact()  # served log-probabilities equal the training forward bit for bit
        self.version = version
        self.limits = limits
        self.stats = Stats()
        self.context = limits.context or model.config.max_position_embeddings
        self._boundary = boundary_id
        self._schedulers = [Scheduler(model.eval(), version, limits, boundary_id, self.stats)]
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._live: dict[str, Sequence] = {}
        self._outbox: dict[asyncio.AbstractEventLoop, list] = {}
        self._names = itertools.count()
        self._dead: PolicyError | None = None
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    # -- Policy -------------------------------------------------------------------------------------------------------

    async def generate(
        self, prompt_ids: Seq[int], params: SamplingParams, request_id: str | None = None
    ) -> AsyncIterator[Chunk]:
        if self._dead is not None:
            raise self._dead
        if not prompt_ids:
            raise PolicyError("the prompt is empty", status=400, kind="invalid_request_error")
        if len(prompt_ids) + params.max_tokens > self.context:
            raise PolicyError(
                f"prompt of {len(prompt_ids)} tokens + max_tokens {params.max_tokens} exceeds the context of {self.context}",
                status=400, kind="invalid_request_error",
            )  # fmt: skip
        if len(self._live) >= self.limits.queue:
            raise PolicyError("the engine's queue is full; retry later", status=429)
        loop, inbox = asyncio.get_running_loop(), asyncio.Queue()
        name = request_id or f"r{next(self._names)}"
        seed = params.seed if params.seed is not None else random.getrandbits(63)
        seq = Sequence(
            name, tuple(prompt_ids), params, lambda item: self._outbox.setdefault(loop, []).append((inbox, item)), seed
        )
        self._live[name] = seq
        self._commands.put(lambda: self._schedulers[-1].waiting.append(seq))
        try:
            while True:
                item = await inbox.get()
                if isinstance(item, PolicyError):
                    raise item
                yield item
                if item.finish_reason is not None:
                    return
        finally:
            seq.aborted = True  # a no-op for a finished request, the abort of an abandoned one
            self._live.pop(name, None)

    async def count(self, prompt_ids: Seq[int]) -> int:
        return len(prompt_ids)

    async def abort(self, request_id: str) -> None:
        if request_id in self._live:
            self._live[request_id].aborted = True
            self._commands.put(lambda: None)

    async def swap(self, checkpoint: str, version: int) -> None:
        """Load `checkpoint` beside the running weights, then serve it. Raises UserError; the old weights stay then."""
        model = await asyncio.to_thread(load_checkpoint, checkpoint)
        await self.adopt(model, version)

    # -- beyond Policy ------------------------------------------------------------------------------------------------

    async def adopt(self, model: TransformerLM, version: int) -> None:
        """Serve this model from the next step on. Returns when new requests get it."""
        if model.config.vocab_size != self._schedulers[-1].model.config.vocab_size:
            raise PolicyError("the new weights have another vocabulary", status=400, kind="invalid_request_error")
        loop, done = asyncio.get_running_loop(), asyncio.Event()

        def change() -> None:
            current = self._schedulers[-1]
            if current.busy:
                fresh = Scheduler(model.eval(), version, self.limits, self._boundary, self.stats)
                self._schedulers.append(fresh)
            else:
                current.renew(model.eval(), version)
            self.version = version
            loop.call_soon_threadsafe(done.set)

        self._commands.put(change)
        await done.wait()

    def close(self) -> None:
        """Stop the thread; requests still running end with an error."""
        self._commands.put(None)
        self._thread.join()

    # -- the thread ---------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            while self._take_commands(wait=not any(s.busy for s in self._schedulers)):
                for scheduler in self._schedulers:
                    if scheduler.busy:
                        scheduler.step()
                self._schedulers = [s for s in self._schedulers[:-1] if s.busy] + self._schedulers[-1:]
                self._hand_over()
            self._stop(PolicyError("the engine was closed"))
        except BaseException as e:
            self._stop(PolicyError(f"the engine failed: {type(e).__name__}: {e}", status=500, kind="server_error"))
            raise

    def _take_commands(self, wait: bool) -> bool:
        """Run what was asked for since the last step. False: close."""
        try:
            while True:
                command = self._commands.get(block=wait)
                if command is None:
                    return False
                command()
                wait = False
        except queue.Empty:
            return True

    def _hand_over(self) -> None:
        """One wake-up per event loop and step, however many requests moved."""
        outbox, self._outbox = self._outbox, {}
        for loop, items in outbox.items():
            try:
                loop.call_soon_threadsafe(_deliver, items)
            except RuntimeError:
                pass  # that event loop is gone, and its requests with it

    def _stop(self, error: PolicyError) -> None:
        self._dead = error
        for scheduler in self._schedulers:
            scheduler.fail_all(error)
        while not self._commands.empty():
            command = self._commands.get()
            if command is not None:
                command()
        for scheduler in self._schedulers:
            scheduler.fail_all(error)
        self._hand_over()


def _deliver(items: list[tuple[asyncio.Queue, Chunk | PolicyError]]) -> None:
    for inbox, item in items:
        inbox.put_nowait(item)
