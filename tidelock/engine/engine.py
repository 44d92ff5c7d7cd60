"""The in-process engine: a `Policy` whose model runs on a thread of its own.

Callers put commands on a queue and await their chunks; the thread takes commands between two steps. New weights are
loaded, checked and packed elsewhere, so a swap costs the thread an assignment.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import queue
import random
import threading
from collections.abc import AsyncIterator, Callable
from collections.abc import Sequence as Seq

import numpy as np

from tidelock.models import TransformerLM
from tidelock.models.serving import ServingModel
from tidelock.tokens.policy import Chunk, PolicyError, SamplingParams
from tidelock.tokens.template import Template

from .grammar import Grammars
from .limits import Limits, Stats
from .sampler import Sampler
from .sampling import check_params
from .scheduler import Scheduler
from .selftest import self_test
from .sequence import Sequence
from .weights import Weights, check, load, rehearse, served

log = logging.getLogger(__name__)
SWAPS = ("finish", "continue")
PAUSES = ("abort", "wait", "keep")
PAUSED = PolicyError("the engine is paused; retry later", status=503)


class Engine:
    """Policy over a model in this process. `boundary_id` is the template's end-of-message id (for prefix reuse).

    `weights` None serves the model's own modules, a name ("fp32", "bf16", "int8", ...: see `models.serving`) a packed copy,
    which is faster; `exactness` says whether that gives the training forward's numbers.
    `template` tells ids from text: only with it are stop strings and constraints understood.
    """

    def __init__(
        self, model: TransformerLM, version: int = 0, *, limits: Limits = Limits(), boundary_id: int | None = None,
        weights: str | None = None, template: Template | None = None,
    ) -> None:  # fmt: skip
        self.exact = True
        self.version = version
        self.limits = limits
        self.stats = Stats()
        self.context = limits.context or model.config.max_position_embeddings
        ready = served(model.eval(), weights)
        self.exactness = self_test(model, ready)
        self._packing, self._config, self._template = weights, model.config, template
        self._grammars = Grammars(template.tokenizer, model.config.vocab_size) if template else None
        self._scheduler = Scheduler(Weights(ready, version), limits, boundary_id, self.stats)
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._live: set[Sequence] = set()
        self._live_bytes = 0
        self._counting = threading.Lock()
        self._outbox: dict[asyncio.AbstractEventLoop, list] = {}
        self._names = itertools.count()
        self._refusing: PolicyError | None = None
        self._frozen = False
        self._when_idle: list[Callable[[], None]] = []
        self._dead: PolicyError | None = None
        self._failed = False  # the last step
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    # -- Policy -------------------------------------------------------------------------------------------------------

    async def generate(
        self, prompt_ids: Seq[int], params: SamplingParams, request_id: str | None = None
    ) -> AsyncIterator[Chunk]:
        prompt = self._checked(prompt_ids, params)
        sampler = self._sampler(prompt_ids, params)
        if params.constraint is not None:  # while it compiled, the door may have closed
            sampler.matcher = await self._grammars.matcher(params.constraint)
            self._checked(prompt_ids, params)
        loop, inbox = asyncio.get_running_loop(), asyncio.Queue()
        seq = Sequence(
            request_id or f"r{next(self._names)}", prompt, params,
            lambda item: self._outbox.setdefault(loop, []).append((inbox, item)),
            sampler.seed, None if params.deadline_s is None else self._scheduler.clock() + params.deadline_s,
            sampler=sampler,
        )  # fmt: skip
        self._count_in(seq)
        try:
            self._commands.put(lambda: self._scheduler.submit(seq))
            _raise(self._dead)  # it may have died meanwhile and not have seen us
            while True:
                item = await inbox.get()
                if isinstance(item, PolicyError):
                    raise item
                yield item
                if item.finish_reason is not None:
                    return
        finally:
            self._count_out(seq)
            self._commands.put(lambda: self._scheduler.end(seq, "abort"))  # nothing, if it is finished

    async def count(self, prompt_ids: Seq[int]) -> int:
        return len(prompt_ids)

    async def abort(self, request_id: str) -> None:
        for seq in [s for s in tuple(self._live) if s.request_id == request_id]:
            self._commands.put(lambda seq=seq: self._scheduler.end(seq, "abort"))

    async def swap(self, checkpoint: str, version: int, policy: str = "finish") -> None:
        """Load `checkpoint` beside the running weights, then serve it. Raises UserError or PolicyError; then the old
        weights go on serving. `policy`: see `adopt`."""
        await self.adopt(await asyncio.to_thread(load, checkpoint), version, policy)

    # -- beyond Policy ------------------------------------------------------------------------------------------------

    async def adopt(self, model: TransformerLM, version: int, policy: str = "finish") -> None:
        """Serve this model from the next step on. Returns when new requests get it.

        "finish": a request that has begun ends on the weights it began with, whose cache stays until then.
        "continue": it goes on with the new weights as soon as they have run, beside its stream from the old ones, its prompt
        and answer so far; its chunks tell which version sampled which tokens.
        """
        if policy not in SWAPS:
            raise PolicyError(f"unknown swap policy {policy!r}; use one of {', '.join(SWAPS)}", status=400,
                              kind="invalid_request_error")  # fmt: skip
        ready = await asyncio.to_thread(self._prepared, model)

        def change() -> None:
            self._scheduler.swap(Weights(ready, version), go_on=policy == "continue")
            self.version = version

        await self._on_thread(change)

    def _prepared(self, model: TransformerLM) -> TransformerLM | ServingModel:
        check(model, self._config)
        ready = served(model.eval(), self._packing)
        rehearse(ready)
        return ready

    async def pause(self, mode: str = "keep") -> None:
        """Stop between two steps, as vLLM's /pause does. "keep": running requests freeze and new ones queue; "wait":
        returns when the running and waiting ones are done; "abort": ends them. The last two refuse new ones (503)."""
        if mode not in PAUSES:
            raise PolicyError(f"unknown pause mode {mode!r}; use one of {', '.join(PAUSES)}", status=400,
                              kind="invalid_request_error")  # fmt: skip
        if mode == "keep":
            await self._on_thread(lambda: setattr(self, "_frozen", True))
            return
        self._refusing = PAUSED
        if mode == "abort":
            await self._on_thread(self._abort_all)
        else:
            loop, idle = asyncio.get_running_loop(), asyncio.Event()
            await self._on_thread(lambda: self._drain(lambda: loop.call_soon_threadsafe(idle.set)))
            await idle.wait()

    async def resume(self) -> None:
        self._refusing = None
        await self._on_thread(lambda: setattr(self, "_frozen", False))

    @property
    def paused(self) -> bool:
        return self._frozen or self._refusing is not None

    def close(self) -> None:
        """Stop the thread; requests still running end with an error."""
        self._commands.put(None)
        self._thread.join()
        if self._grammars is not None:
            self._grammars.close()

    # -- the door -----------------------------------------------------------------------------------------------------

    def _checked(self, prompt_ids: Seq[int], params: SamplingParams) -> np.ndarray:
        """The prompt as int32. Raises PolicyError for what can never run, before anything is allocated for it."""
        _raise(self._dead, self._refusing)
        check_params(params, self._config.vocab_size)
        longest = len(prompt_ids) + params.max_tokens
        if not len(prompt_ids):
            raise _bad("the prompt is empty")
        if longest > self.context:
            raise _bad(f"prompt of {len(prompt_ids)} tokens + max_tokens {params.max_tokens} "
                       f"exceeds the context of {self.context}")  # fmt: skip
        if longest > self._scheduler.memory.capacity:
            raise _bad(f"{longest} tokens are more than the engine's cache holds")
        if len(self._live) >= self.limits.queue:
            raise _full()
        try:
            prompt = np.asarray(prompt_ids)
        except (TypeError, ValueError, OverflowError):
            prompt = None
        if prompt is None or prompt.ndim != 1 or prompt.dtype.kind not in "iu":
            raise _bad("the prompt is not a list of token ids")
        if prompt.min() < 0 or prompt.max() >= self._config.vocab_size:
            raise _bad(f"token ids must be in 0..{self._config.vocab_size - 1}")
        return prompt.astype(np.int32)

    def _sampler(self, prompt_ids: Seq[int], params: SamplingParams) -> Sampler:
        """Raises PolicyError (400) for parameters that no draw could honour."""
        if self._template is None and (params.stop or params.constraint):
            raise _bad("this engine was given no tokenizer, so it knows no stop strings and no constraints")
        read = self._template.text_reader(prompt_ids) if params.stop else None
        return Sampler(prompt_ids, params, params.seed if params.seed is not None else random.getrandbits(63), read)

    def _count_in(self, seq: Sequence) -> None:
        with self._counting:
            if self._live_bytes + seq.prompt.nbytes > self.limits.queue_bytes:
                raise _full()
            self._live.add(seq)
            self._live_bytes += seq.prompt.nbytes

    def _count_out(self, seq: Sequence) -> None:
        with self._counting:
            self._live.discard(seq)
            self._live_bytes -= seq.prompt.nbytes

    # -- the thread ---------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            deadline = None
            while self._take_commands(deadline):
                deadline = self._scheduler.expire()
                if self._scheduler.busy and not self._frozen:
                    self._step()
                if not self._scheduler.busy:
                    while self._when_idle:
                        self._when_idle.pop()()
                self._hand_over()
            self._stop(PolicyError("the engine was closed"))
        except BaseException as e:
            self._stop(PolicyError(f"the engine failed: {type(e).__name__}: {e}", status=500, kind="server_error"))
            raise

    def _step(self) -> None:
        """What goes wrong in a step ends the requests that ran in it, and no others: they are told, and the engine goes on.
        A second failure at once means that the harm is elsewhere: then everybody is told, and it still goes on."""
        try:
            self._scheduler.step()
            self._failed = False
        except Exception as e:
            log.exception("a step failed")
            error = PolicyError(f"the engine failed in this step: {type(e).__name__}: {e}", status=500, kind="server_error")
            if self._failed:
                self._scheduler.fail_all(error)
            else:
                self._scheduler.fail_step(error)
            self._failed = True

    def _take_commands(self, deadline_s: float | None) -> bool:
        """Run what was asked for since the last step; with nothing to step, wait for it. False: close."""
        wait = not self._scheduler.busy or self._frozen
        try:
            while True:
                command = self._commands.get(wait, None if deadline_s is None else max(deadline_s, 0.0))
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

    async def _on_thread(self, command: Callable[[], None]) -> None:
        """Run `command` between two steps and wait until it has."""
        _raise(self._dead)
        loop, done = asyncio.get_running_loop(), asyncio.Event()

        def work() -> None:
            command()
            loop.call_soon_threadsafe(done.set)

        self._commands.put(work)
        _raise(self._dead)
        await done.wait()

    def _drain(self, then: Callable[[], None]) -> None:
        self._frozen = False
        self._when_idle.append(then)

    def _abort_all(self) -> None:
        for seq in (*self._scheduler.requests, *self._scheduler.line):
            self._scheduler.end(seq, "abort")

    def _stop(self, error: PolicyError) -> None:
        self._dead = error
        self._scheduler.fail_all(error)
        while not self._commands.empty():
            command = self._commands.get()
            if command is not None:
                command()
        self._scheduler.fail_all(error)
        while self._when_idle:
            self._when_idle.pop()()
        self._hand_over()
        self._scheduler.close()


def _deliver(items: list[tuple[asyncio.Queue, Chunk | PolicyError]]) -> None:
    for inbox, item in items:
        inbox.put_nowait(item)


def _raise(*errors: PolicyError | None) -> None:
    """The first that is one, as a new object: an exception that is raised again and again keeps every caller's frames."""
    for error in errors:
        if error is not None:
            raise PolicyError(str(error), status=error.status, kind=error.kind)


def _bad(message: str) -> PolicyError:
    return PolicyError(message, status=400, kind="invalid_request_error")


def _full() -> PolicyError:
    return PolicyError("the engine's queue is full; retry later", status=429)
