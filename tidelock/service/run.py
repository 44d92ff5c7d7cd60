"""One request, from a validated `Ask` to the settled bill, the same for every surface.

The order is the point: find the conversation's stored ids and extend them, hold the money, sample as far as it is
covered, settle, write the trace, and only then say the last word. (Settle first: an answer may lack its trace after a
crash, but never its bill.) A client that saw the end of an answer can rely on its trace and its
charge; a client that left pays exactly for the tokens sampled until then.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from functools import partial
from typing import Any

from msgspec import Struct
from msgspec.structs import asdict, replace

from tidelock.service import errors
from tidelock.service.answer import Bill, Choice, Ended, Event, Piece, Usage
from tidelock.service.ask import Ask
from tidelock.service.errors import ApiError
from tidelock.service.deadline import within
from tidelock.service.forcing import constraint, held, told
from tidelock.service.inbox import Inbox
from tidelock.service.books import Admission, BudgetReached, InsufficientBalance, Latency, Metered
from tidelock.service.keys import Key
from tidelock.service.limiter import RateLimited, Standing
from tidelock.service.reported import billed, engine_ms, upstream
from tidelock.service.state import ServiceState
from tidelock.service.tab import Tab, opened
from tidelock.service.till import Then
from tidelock.tokens.message import Message
from tidelock.tokens.policy import Chunk, Constraint, PolicyError, Prompt, SamplingParams, drawn_from
from tidelock.tokens.template import Template
from tidelock.tokens.trace import Node, Served

# Rows to be written with the charge or not at all: (execute, the answer's last events with the bill, why it was cut short)
Admitted = Callable[[], Awaitable[None]]
Also = Callable[[Any, list[Event], ApiError | None], None]
LONG_TEXT = 1 << 18  # characters whose tokenizing would be noticed by other requests
NO_LIMIT = 1 << 62


class Turn(Struct, frozen=True, gc=False):
    """An `Ask` in its place in the trace, ready to be sampled. `new` are the messages not stored yet, each with the
    ids it adds."""

    request_id: str
    key: Key
    ask: Ask
    scope: str
    consent: bool
    consent_source: str
    parent: str | None
    new: tuple[tuple[Message, tuple[int, ...]], ...]
    opening_ids: tuple[int, ...]
    constraint: Constraint | None
    prompt_ids: tuple[int, ...]
    prompt_tokens: int
    max_tokens: int  # of each choice
    mode: str  # of the price book
    began: float  # time.monotonic()
    standing: list[Standing] = []  # of the limits, once it is admitted: what the answer's headers say

    @property
    def choice_ids(self) -> tuple[str, ...]:
        """What the policy knows the choices by."""
        return (self.request_id,) if self.ask.n == 1 else tuple(f"{self.request_id}-{n}" for n in range(self.ask.n))


async def prepare(state: ServiceState, key: Key, ask: Ask, request_id: str, mode: str = "") -> Turn:
    """Everything that can still refuse the request before money is involved. Raises ApiError."""
    began = time.monotonic()
    _check_allowed(state, key, ask)
    scope = f"{key.id}/{ask.origin.session}"
    directives = told(ask) if state.tells else ()
    parent, new, ids = await laid_out(state, key, ask, directives, state.context_length)
    opening_ids = opening(state.template, ask)
    prompt_ids = Prompt.of(ids, ask.messages + directives, (*state.template.generation_prompt(), *opening_ids))
    prompt_tokens = await state.policy.count(prompt_ids)
    consent, source = key.consent(ask.origin.consent)
    return Turn(
        request_id=request_id,
        key=key,
        ask=ask,
        scope=scope,
        consent=consent,
        consent_source=source,
        parent=parent,
        new=new,
        opening_ids=opening_ids,
        constraint=constraint(state.template, ask),
        prompt_ids=prompt_ids,
        prompt_tokens=prompt_tokens,
        max_tokens=_max_tokens(state, ask, prompt_tokens),
        mode=mode,
        began=began,
    )


async def laid_out(
    state: ServiceState, key: Key, ask: Ask, directives: tuple[Message, ...], most: int = NO_LIMIT
) -> tuple[str | None, tuple[tuple[Message, tuple[int, ...]], ...], list[int]]:
    """`extended`; a long text in a thread, where it keeps nobody waiting but its sender; one that cannot fit not at all."""
    scope = f"{key.id}/{ask.origin.session}"
    characters = sum([len(m.content) + len(m.reasoning) for m in ask.messages])
    if characters > most * state.template.tokenizer.longest:
        raise _too_long(most)
    if characters > LONG_TEXT:
        return await asyncio.to_thread(extended, state, scope, ask, directives, most)
    return extended(state, scope, ask, directives, most)


def extended(
    state: ServiceState, scope: str, ask: Ask, directives: tuple[Message, ...] = (), most: int = NO_LIMIT
) -> tuple[str | None, tuple[tuple[Message, tuple[int, ...]], ...], list[int]]:
    """(the deepest stored node of this conversation, the messages after it with their ids, all ids). An answer that was
    given to a request with directives comes back without them, and with its own ids. Raises a 400 as soon as there are more
    ids than `most`."""
    parent, known = state.traces.match(scope, ask.messages)
    path = state.traces.path(parent.id) if parent else []
    ids, seen = [token for node in path for token in node.ids], [node.message for node in path]
    new: list[tuple[Message, tuple[int, ...]]] = []
    rest = ask.messages[known:] + directives
    if parent and known < len(ask.messages) and (said := state.traces.elsewhere(parent, rest[0])):
        new, rest = [(said[-1].message, said[-1].ids)], rest[1:]
        ids += said[-1].ids
        seen.append(said[-1].message)
    for message in rest:
        added = state.template.added(message, seen)
        new.append((message, tuple(added)))
        ids += added
        if len(ids) > most:
            raise _too_long(most)
        seen.append(message)
    return (parent.id if parent else None), tuple(new), ids


async def count_tokens(state: ServiceState, key: Key, ask: Ask) -> int:
    """Tokens the prompt of this request would be billed for."""
    _check_allowed(state, key, ask)
    _, _, ids = await laid_out(state, key, ask, told(ask) if state.tells else ())
    return await state.policy.count((*ids, *state.template.generation_prompt(), *opening(state.template, ask)))


def _check_allowed(state: ServiceState, key: Key, ask: Ask) -> None:
    """A model that the key may not use is one that is not there."""
    if not key.sees(state.model):
        raise errors.not_found(f"no model {ask.model!r} here; /v1/models lists them", "model", "model_not_found")
    if ask.logprobs and not state.policy.exact:
        raise errors.invalid_request("this model's server speaks text and tells no log-probabilities", "logprobs")


def opening(template: Template, ask: Ask) -> tuple[int, ...]:
    """Ids of the answer's given beginning. Without thinking that is the empty thought, so that the answer comes next."""
    if ask.opening is None and (ask.thinking or held(ask)):
        return ()
    empty, probe = (template.sampled(Message("assistant", text)) for text in ("", "x"))
    tail = 0  # how many ids close a turn whose last channel is its content: those that any content leaves alone
    while empty[-1 - tail] == probe[-1 - tail]:
        tail += 1
    said = template.sampled(ask.opening or Message("assistant"))
    return tuple(said[: len(said) - tail])


def _too_long(most: int) -> ApiError:
    reason = f"the prompt has more than {most} tokens and leaves no room in a context of as many"
    return errors.invalid_request(reason, "messages", "context_length_exceeded")


def _max_tokens(state: ServiceState, ask: Ask, prompt_tokens: int) -> int:
    asked = ask.max_tokens
    room = state.context_length - prompt_tokens
    if room < 1:
        reason = f"the prompt has {prompt_tokens} tokens and leaves no room in a context of {state.context_length}"
        raise errors.invalid_request(reason, "messages", "context_length_exceeded")
    if asked is None:
        return min(state.default_max_tokens, room)
    if asked > room and ask.to_fit:
        return room
    if asked > room:
        reason = f"prompt ({prompt_tokens}) plus max_tokens ({asked}) exceed the context of {state.context_length}"
        raise errors.invalid_request(reason, "max_tokens", "context_length_exceeded")
    return asked


class Meter:
    """A tab and what is sampled on it."""

    def __init__(self, state: ServiceState, turn: Turn, tab: Tab) -> None:
        self._state, self._turn, self.tab = state, turn, tab
        self.choices = [Choice(n, turn.ask, state.template, turn.opening_ids) for n in range(turn.ask.n)]
        self.params = replace(
            turn.ask.params,
            max_tokens=turn.max_tokens,
            stop_ids=tuple(state.template.stop_ids),
            constraint=turn.constraint,
            tenant=turn.key.customer,
        )
        self.asked, self.first = time.monotonic(), None  # the model; when its first token came

    @property
    def delivered(self) -> bool:
        """Whether the client has been sent any of it: only then it is charged."""
        return self.tab.delivered

    @delivered.setter
    def delivered(self, value: bool) -> None:
        self.tab.delivered = value

    @property
    def complete(self) -> bool:
        return all(
            c.stopped is not None or (c.sample.ids and c.sample.finish_reason in ("stop", "length")) for c in self.choices
        )

    async def finish(
        self, also: Also | None = None, failed: ApiError | None = None
    ) -> tuple[list[Piece], list[Ended], Bill]:
        """Charges for the answers and stores them, then tells how they ended. `also` joins the charge's transaction."""
        pieces: list[Piece] = []
        ended: list[Ended] = []
        for choice in self.choices:
            *rest, last = choice.end()
            pieces += rest
            ended.append(last)
        new, answers = nodes(self._state, self._turn, self)
        ids = tuple(answer.id for answer in answers)
        joined = None
        if also is not None:
            why = failed or (None if self.complete else _stopped_early())
            joined = lambda execute, bill: also(execute, [*pieces, *ended, bill], why)
        sampled, exact = sum(answer.sampled for answer in answers), all(answer.exact for answer in answers)
        served = Served(self._turn.request_id, ids, sampled, exact, time.time())
        bill = await self._settle(ids, joined, partial(self._state.scribe.put, [*new, *answers], served))
        return pieces, ended, bill

    async def _settle(self, ids: tuple[str, ...], also: Callable[[Any, Bill], None] | None, traced: Then) -> Bill:
        reason = "stop" if self.complete else "abort"
        if self.complete and any(choice.sample.finish_reason == "length" for choice in self.choices):
            reason = "length"
        samples = [choice.sample for choice in self.choices]
        counts = billed(self._turn.prompt_tokens, samples, self._state.policy.exact)
        reasoning = min(sum(choice.reasoning_tokens for choice in self.choices), counts.completion)

        def bill(nano_usd: int) -> Bill:
            return Bill(Usage(counts.prompt, counts.completion, counts.cached, reasoning, nano_usd), ids)

        joined = None if also is None else lambda execute, nano_usd: also(execute, bill(nano_usd))
        began = self._turn.began
        wait, first, total = (None if at is None else int((at - began) * 1000) for at in (self.asked, self.first, time.monotonic()))
        metered = Metered(counts, reason, upstream(samples), Latency(wait, first, total, *engine_ms(samples)))
        return bill(await self.tab.settle(metered, joined, traced))


@asynccontextmanager
async def metered(state: ServiceState, turn: Turn) -> AsyncIterator[Meter]:
    """Raises ApiError: 429 if the balance does not cover the prompt and one token of each choice, or a limit is reached.
    Batches have a queue instead of limits."""
    if turn.mode != "batch":
        await state.tiers.refresh()
    book = state.prices.now
    most = turn.max_tokens * turn.ask.n
    admission = Admission(
        turn.request_id,
        turn.key.customer,
        turn.key.id,
        state.model,
        book.price(state.model, turn.mode),
        book.version,
        turn.prompt_tokens,
        most,
        state.hold_lifetime_s,
        turn.mode,
        least_tokens=turn.ask.n,
        project=turn.key.project,
        ladder=None if turn.mode == "batch" else state.tiers.ladder,
        reserve=turn.prompt_tokens + most,
        budgeted=state.budgeted,
    )
    try:
        async with opened(state.till, admission, turn.ask.stream) as tab:
            turn.standing.append(tab.hold.standing)
            yield Meter(state, turn, tab)
    except BudgetReached:
        raise errors.budget_reached() from None
    except InsufficientBalance:
        raise errors.insufficient_balance() from None
    except RateLimited as reached:
        raise errors.rate_limited(turn.key.customer, turn.key.id, reached) from None


async def whole(
    state: ServiceState, turn: Turn, left: asyncio.Event, also: Also | None = None, admitted: Admitted | None = None
) -> tuple[list[Ended], Bill]:
    """The finished answers. Raises ApiError; a failure costs nothing, a client that left pays for what was sampled.

    `also` writes in the same transaction as the charge: both happen, or neither. `admitted` is awaited when the money is
    held, before anything is sampled.
    """
    async with metered(state, turn) as meter:
        if admitted is not None:
            await admitted()
        try:
            with within(state.request_timeout_s), state.tally.computing(state.model):
                await _together([_sampled(state, turn, meter, choice) for choice in meter.choices])
            if not meter.complete:
                raise _stopped_early()
        except TimeoutError:
            raise errors.timed_out(state.request_timeout_s) from None
        finally:
            meter.delivered = meter.complete or left.is_set()
            if meter.delivered and any(choice.sample.ids for choice in meter.choices):
                _, ended, bill = await meter.finish(also)
    return ended, bill


async def stream(
    state: ServiceState, turn: Turn, left: asyncio.Event, also: Also | None = None, admitted: Admitted | None = None,
    merge_s: float | None = None,
) -> AsyncIterator[list[Event]]:  # fmt: skip
    """Events as they happen, all there are at a time; [] = nothing for `keep_alive_s`. The ends come with the bill.
    `also` and `admitted` as for `whole`.

    Raises ApiError, with the bill of what was sent until then. Closing the iterator is leaving: what was sampled until then is stored and charged.
    """
    async with metered(state, turn) as meter:
        if admitted is not None:
            await admitted()
        inbox = Inbox(min(state.keep_alive_s, state.request_timeout_s), state.merge_s if merge_s is None else merge_s)
        deadline = asyncio.get_running_loop().time() + state.request_timeout_s
        tasks = [asyncio.create_task(_pump(state, turn, meter, choice, inbox)) for choice in meter.choices]
        rest: list[Piece] = []
        failure: Exception | None = None
        failed: ApiError | None = None
        try:
            running = len(tasks)
            while running and not left.is_set():
                items = await inbox.take()
                failure = next((item for item in items if isinstance(item, Exception)), None)
                running -= items.count(None)
                pieces = [item for item in items if item is not None and not isinstance(item, Exception)]
                if running and asyncio.get_running_loop().time() >= deadline:
                    raise errors.timed_out(state.request_timeout_s)
                if pieces or not items:
                    meter.delivered |= any(choice.sample.ids for choice in meter.choices)
                    yield pieces  # before the failure that came after them: they will be charged
                if failure is not None:
                    raise failure
            if not meter.complete:
                raise _stopped_early()
        except ApiError as error:
            failed = error
            raise
        finally:
            inbox.close()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            # cut at the end of the money before there was anything to show, it is whole and yet was not sent
            meter.delivered |= (meter.complete and failure is None) or left.is_set()
            if meter.delivered and any(choice.sample.ids for choice in meter.choices):
                rest, ended, bill = await meter.finish(also, failed)
                if failed is not None:
                    failed.bill = bill
    yield [*rest, *ended, bill]


async def _sampled(
    state: ServiceState, turn: Turn, meter: Meter, choice: Choice, inbox: Inbox | None = None
) -> None:
    """Samples one choice to its end. Raises ApiError."""
    params: SamplingParams = meter.params
    if turn.ask.n > 1 and params.seed is not None:
        params = replace(params, seed=params.seed + choice.index)
    try:
        async with aclosing(state.policy.generate(turn.prompt_ids, params, turn.choice_ids[choice.index])) as chunks:
            async for chunk in chunks:
                if meter.first is None and chunk.ids:
                    meter.first = time.monotonic()
                covered = await meter.tab.take(len(chunk.ids))
                broke = covered < len(chunk.ids)
                pieces = choice.take(_cut(chunk, covered) if broke else chunk)
                if inbox is not None:
                    inbox.put(pieces)
                if broke and inbox is not None:
                    raise errors.budget_reached(midway=True) if meter.tab.over_budget else errors.balance_exhausted()
                if broke or choice.stopped is not None:
                    break
    except PolicyError as error:
        raise errors.policy_failed(str(error), error.status, error.kind) from error


def _cut(chunk: Chunk, tokens: int) -> Chunk:
    """Its beginning, as an answer that was too long: what the balance covers."""
    return Chunk(
        chunk.ids[:tokens], chunk.logprobs[:tokens], chunk.weights_version, "length",
        sampled_logprobs=chunk.sampled_logprobs[:tokens], top_logprobs=chunk.top_logprobs[:tokens], kept=chunk.kept[:tokens],
        source=chunk.source,
    )  # fmt: skip


async def _pump(state: ServiceState, turn: Turn, meter: Meter, choice: Choice, inbox: Inbox) -> None:
    try:
        with state.tally.computing(state.model):
            await _sampled(state, turn, meter, choice, inbox)
        inbox.put([None])
    except Exception as error:
        inbox.put([error])


async def _together(parts: list) -> None:
    """Runs all; the first failure stops the others and is raised."""
    if len(parts) == 1:
        await parts[0]
        return
    tasks = [asyncio.create_task(part) for part in parts]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _stopped_early() -> ApiError:
    return errors.policy_failed("the answer was stopped before its end", 503, "engine_overloaded_error")


def nodes(state: ServiceState, turn: Turn, meter: Meter) -> tuple[list[Node], list[Node]]:
    """(the new messages, the answers) as the trace keeps them."""
    common = {
        "scope": turn.scope,
        "template": state.template.hash,
        "sandbox": turn.ask.origin.sandbox,
        "consent": turn.consent,
        "consent_source": turn.consent_source,
    }
    exact = state.policy.exact
    parent, new = turn.parent, []
    for given, ids in turn.new:
        new.append(Node.of(parent, given, ids, exact=exact, **common))
        parent = new[-1].id
    answers = []
    params = meter.params
    sampling = asdict(params)
    if params.constraint is not None:
        sampling["constraint"] = asdict(params.constraint)
    for choice in meter.choices:
        sample = choice.sample
        sampled_logprobs, kept = drawn_from(sample.chunks)
        answers.append(
            Node.of(
                parent,
                choice.message,
                (*state.template.generation_prompt(), *turn.opening_ids, *sample.ids),
                sampled=len(sample.ids),
                logprobs=tuple(sample.logprobs),
                sampled_logprobs=sampled_logprobs,
                kept=kept,
                weights_versions=tuple(sample.versions),
                sampling=sampling,
                finish_reason="stop" if choice.stopped is not None else sample.finish_reason or "abort",
                exact=sample.source.exact if sample.source else exact,
                **common,
            )
        )
    return new, answers
