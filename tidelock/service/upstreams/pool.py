"""A `Policy` over several: places each request, tries another upstream while nothing of the answer was handed on yet,
and lets the rest wait in turn.

Answers are honest about where they come from: every chunk names its upstream (`source`), its weights version is that
upstream's, and an answer that an upstream does not finish is an error, never an end. Once a token was handed on nothing is
sampled again. Everything here runs in one event loop.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from msgspec.structs import replace

from tidelock.service.record import step
from tidelock.service.upstreams import affinity, faults
from tidelock.service.upstreams.line import Line, Waiter
from tidelock.service.upstreams.metrics import Collector
from tidelock.service.upstreams.probes import watch
from tidelock.service.upstreams.swapping import swap_all
from tidelock.service.upstreams.upstream import Upstream
from tidelock.tokens.directives import is_of_one_request
from tidelock.tokens.policy import Chunk, PolicyError, Prompt, SamplingParams

log = logging.getLogger(__name__)

CHOICES = ("affinity", "least-loaded", "round-robin")
ABORT_S = 5.0  # an upstream that takes longer to stop a request is not waited for


@dataclass
class Options:
    choice: str = "affinity"  # one of CHOICES
    retries: int = 2  # of a request, on upstreams it was not sent to yet
    max_waiting: int = 256  # requests in line; those beyond it are refused at once
    wait_s: float = 60.0  # in line, at most
    spread: float = 1.5  # an upstream may have so many times its share before conversations are sent elsewhere
    probe_s: float = 5.0  # between looks at an upstream that nothing was heard of


@dataclass(eq=False)
class _Job:
    """One request on its way."""

    name: str
    key: bytes
    params: SamplingParams
    prompt_tokens: int
    exact: bool  # only an upstream that samples ids of ours can answer it
    tried: set[Upstream] = field(default_factory=set)  # and failed there
    sent: int = 0
    handed_on: int = 0  # tokens
    upstream: Upstream | None = None
    waiter: Waiter | None = None
    place: asyncio.Future[Upstream | None] | None = None  # None: aborted in line
    aborted: bool = False


class Pool:
    def __init__(self, upstreams: Sequence[Upstream], options: Options = Options(), turn: Sequence[int] = ()) -> None:
        """`turn`: the ids that open an assistant's turn (`Template.generation_prompt`), by which conversations are told
        apart. The upstreams' connections are closed by `run` or `aclose`."""
        self.upstreams, self.options, self._turn = list(upstreams), options, tuple(turn)
        self.refused: dict[str, int] = {"full": 0, "late": 0, "down": 0}
        self.closers: list[Any] = []  # called by `aclose`
        self.line, self._jobs = Line(options.max_waiting), {}
        self._next = 0  # of round-robin
        self._swapping = asyncio.Lock()
        self._swapped: tuple[str, int] | None = None  # what the last swap gave them all

    @property
    def exact(self) -> bool:
        """Of any answer; whether one is, its chunks' source says."""
        return all(u.exact for u in self.upstreams)

    @property
    def waiting(self) -> int:
        return len(self.line)

    @property
    def version(self) -> int:
        """Of the weights, where all exact upstreams are known to have the same; else -1."""
        versions = {u.version for u in self.upstreams if u.exact and not u.held_back}
        return versions.pop() if len(versions) == 1 else -1

    # ---- the Policy ---------------------------------------------------------------------------------------------

    async def generate(
        self, prompt_ids: Sequence[int], params: SamplingParams, request_id: str | None = None
    ) -> AsyncIterator[Chunk]:
        by_head = self.options.choice == "affinity" and len(self.upstreams) > 1
        key = affinity.head(prompt_ids, self._turn) if by_head else b""
        job = _Job(request_id or uuid.uuid4().hex, key, params, len(prompt_ids), self._wants_exact(prompt_ids, params))
        self._jobs[job.name] = job
        try:
            while True:
                if (upstream := await self._place(job)) is None:
                    yield Chunk((), (), -1, "abort")
                    return
                try:
                    async with aclosing(upstream.policy.generate(prompt_ids, params, job.name)) as chunks:
                        async for chunk in chunks:
                            yield (chunk := self._seen(job, upstream, chunk))
                            if chunk.finish_reason is not None:
                                return
                    raise _Unasked("the upstream's answer has no end", status=502)
                except PolicyError as error:
                    if not self._again(job, upstream, error):
                        raise faults.told(error) from error
                finally:
                    self._release(job, upstream)
        finally:
            self._jobs.pop(job.name, None)

    async def count(self, prompt_ids: Sequence[int]) -> int:
        return len(prompt_ids)

    async def abort(self, request_id: str) -> None:
        if (job := self._jobs.get(request_id)) is None:
            return
        job.aborted = True
        if job.waiter is not None:
            self.line.leave(job.waiter)
        if job.place is not None and not job.place.done():
            job.place.set_result(None)
        elif job.upstream is not None:
            try:
                async with asyncio.timeout(ABORT_S):
                    await job.upstream.policy.abort(request_id)
            except (PolicyError, TimeoutError) as error:
                log.warning("%s: %s could not be told to stop (%s)", request_id, job.upstream.name, type(error).__name__)

    async def swap(self, checkpoint: str, version: int) -> None:
        """To all or none; see `swapping`."""
        async with self._swapping:
            await swap_all(self.upstreams, checkpoint, version, self._swapped)
            self._swapped = (checkpoint, version)
        self._serve()

    # ---- its life -----------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Looks after the upstreams until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                for upstream in self.upstreams:
                    group.create_task(watch(upstream, self.options.probe_s, self._serve))
        finally:
            await self.aclose()

    async def aclose(self) -> None:
        for close in self.closers:
            close()

    def close(self) -> None:
        """For those who close an engine: what has to be let go goes with the event loop."""

    def health(self) -> dict[str, Any]:
        working = sum(u.usable for u in self.upstreams)
        status = "ok" if working == len(self.upstreams) else "degraded" if working else "down"
        return {"status": status, "weights_version": self.version, "upstreams": [u.status() for u in self.upstreams]}

    def inexact(self, names: str) -> bool:
        """Whether one of the upstreams that a usage row names speaks text; of one that is gone, whether any here does."""
        exact = {u.name: u.exact for u in self.upstreams}
        return not all(exact.get(name, self.exact) for name in names.split(","))

    def collector(self) -> Collector:
        return Collector(self)

    # ---- one request --------------------------------------------------------------------------------------------

    def _seen(self, job: _Job, upstream: Upstream, chunk: Chunk) -> Chunk:
        """The chunk, counted and with its source. Raises PolicyError for an end that is none."""
        if chunk.finish_reason == "abort" and not job.aborted and not job.handed_on and not chunk.ids:
            raise _Unasked("the upstream ended the answer unasked", status=503)
        if chunk.ids and not job.handed_on:
            upstream.circuit.spoke()
        if job.handed_on + len(chunk.ids) > job.params.max_tokens:  # it was not asked for so many, and nobody pays for them
            chunk = _first(chunk, job.params.max_tokens - job.handed_on)
        job.handed_on += len(chunk.ids)
        upstream.count(chunk, job.prompt_tokens)
        if chunk.finish_reason is not None:
            self._ended(job, upstream, chunk.finish_reason)
        return replace(chunk, source=upstream.source if chunk.source is None else upstream.inexact)

    def _ended(self, job: _Job, upstream: Upstream, reason: str) -> None:
        if reason != "abort":
            upstream.circuit.answered()
            upstream.heard = asyncio.get_running_loop().time()
        elif not job.aborted:
            upstream.tally.failures["abort"] += 1

    def _again(self, job: _Job, upstream: Upstream, error: PolicyError) -> bool:
        """Notes a failure; whether the request may be sent once more."""
        cause, pause_s = faults.cause(error), faults.rest_s(error)
        if faults.own_fault(error):
            upstream.circuit.answered()
            return False
        upstream.tally.failures[cause] += 1
        told = f": {error}" if error.status in (401, 402, 403, 404) else ""  # about our key and model, not about a prompt
        log.warning("%s: upstream %s failed after %d tokens (%s)%s", job.name, upstream.name, job.handed_on, cause, told)
        if pause_s is not None:
            upstream.circuit.rest(pause_s)
            asyncio.get_running_loop().call_later(pause_s + 0.001, self._serve)
        else:
            upstream.circuit.failed(2 if cause == "connect" else 1)
        if job.handed_on or job.aborted or job.sent > self.options.retries:
            return False
        if pause_s is None:
            job.tried.add(upstream)  # a refusal for want of room may be asked again where it was, after the pause
        if not any(self._may(job, u) for u in self.upstreams):
            return False
        upstream.tally.retried += 1
        return True

    def _wants_exact(self, prompt_ids: Sequence[int], params: SamplingParams) -> bool:
        """Who samples our ids holds an answer to its form; where nobody does, a server that speaks text is asked to, if
        there are words for what is wanted."""
        if params.constraint is None:
            return params.routed_from is not None
        said = isinstance(prompt_ids, Prompt) and any(map(is_of_one_request, prompt_ids.messages[-2:]))
        return not said or params.routed_from is not None or any(u.exact for u in self.upstreams)

    # ---- placing ------------------------------------------------------------------------------------------------

    async def _place(self, job: _Job) -> Upstream | None:
        """An upstream with room, the request counted in; None: it was aborted. Raises PolicyError when there is none."""
        if job.exact and not any(u.exact for u in self.upstreams):
            reason = "the model's servers speak text, so an answer cannot be held to a grammar"
            raise PolicyError(reason, status=400, kind="invalid_request_error")
        if job.aborted:
            return None
        if (upstream := self._choose(job)) is not None:
            return self._take(job, upstream)
        if not any(self._may(job, u) for u in self.upstreams):
            raise self._refusal("full" if any(u.usable for u in self.upstreams) else "down")
        job.place = place = asyncio.get_running_loop().create_future()
        job.waiter = Waiter(job.params.tenant, job.params.priority, job)
        try:
            if (out := self.line.join(job.waiter)) is not None:
                out.what.place.set_exception(self._refusal("full"))
            with step("line"):
                await asyncio.wait([place], timeout=self.options.wait_s)
            if not place.done():
                raise self._refusal("late")
            upstream = place.result()
        except BaseException:
            if place.done() and not place.exception() and place.result() is not None:  # it was placed and nobody came
                self._release(job, place.result())
            raise
        finally:
            self.line.leave(job.waiter)
            job.place = job.waiter = None
        if upstream is not None and job.aborted:
            self._release(job, upstream)
            return None
        return upstream

    def _may(self, job: _Job, upstream: Upstream) -> bool:
        """Whether it could answer this request, now or later."""
        if upstream in job.tried or not (upstream.exact or not job.exact):
            return False
        return upstream.usable and upstream.circuit.rests_s() <= self.options.wait_s

    def _choose(self, job: _Job) -> Upstream | None:
        free = [u for u in self.upstreams if u.free and self._may(job, u)]
        if not free:
            return None
        if len(self.upstreams) == 1:
            free[0].tally.affinity["hit"] += 1
            return free[0]
        if self.options.choice == "round-robin":
            self._next += 1
            return free[self._next % len(free)]
        if self.options.choice == "affinity" and not job.tried:
            able = [u for u in self.upstreams if not u.held_back and (u.exact or not job.exact)]
            ranked = sorted(able, key=lambda u: affinity.score(job.key, u.name, u.weight), reverse=True)
            in_flight, weights = sum(u.in_flight for u in free), sum(u.weight for u in free)
            for upstream in ranked:
                if upstream in free and upstream.in_flight < affinity.bound(
                    in_flight, upstream.weight / weights, self.options.spread
                ):
                    upstream.tally.affinity["hit" if upstream is ranked[0] else "spilled"] += 1
                    return upstream
        return min(free, key=lambda u: (u.in_flight + 1) / u.weight)

    def _take(self, job: _Job, upstream: Upstream) -> Upstream:
        upstream.in_flight += 1
        upstream.tally.requests += 1
        upstream.circuit.sent()
        self.line.charge(job.params.tenant, job.params.priority)
        job.upstream, job.sent = upstream, job.sent + 1
        return upstream

    def _release(self, job: _Job, upstream: Upstream) -> None:
        upstream.in_flight -= 1
        job.upstream = None
        if not job.handed_on:
            upstream.circuit.withdrawn()
        self._serve()

    def _serve(self) -> None:
        """Places those in line whose turn it is, as far as there is room."""
        while self.line:
            placed = None
            if any(u.free for u in self.upstreams):
                for waiter in self.line.turns():
                    if (upstream := self._choose(waiter.what)) is not None:
                        placed = waiter
                        break
            if placed is None:
                break
            self.line.leave(placed)
            placed.what.place.set_result(self._take(placed.what, upstream))
        for waiter in [w for w in self.line if not any(self._may(w.what, u) for u in self.upstreams)]:
            self.line.leave(waiter)
            waiter.what.place.set_exception(self._refusal("down"))

    def _refusal(self, why: str) -> PolicyError:
        self.refused[why] += 1
        return faults.down() if why == "down" else faults.full()


class _Unasked(PolicyError):
    cause = "abort"


def _first(chunk: Chunk, tokens: int) -> Chunk:
    """Its first tokens, as an answer that was cut for length."""
    return replace(
        chunk, ids=chunk.ids[:tokens], logprobs=chunk.logprobs[:tokens], sampled_logprobs=chunk.sampled_logprobs[:tokens],
        top_logprobs=chunk.top_logprobs[:tokens], kept=chunk.kept[:tokens], finish_reason="length", stop=None, versions=(),
    )  # fmt: skip
