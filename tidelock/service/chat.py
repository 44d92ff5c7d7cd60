"""One chat completion, from the request's bytes to the settled bill.

The order is the point: authenticate, validate, find the conversation's stored ids and extend them, hold the worst
case, sample, write the trace, settle, and only then say the last word. A client that saw the end of an answer can
rely on its trace and its charge; a client that left pays exactly for the tokens sampled until then.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import asdict, dataclass, field

from tidelock.service import errors, wire
from tidelock.service.keys import Key
from tidelock.service.ledger import Hold, InsufficientBalance
from tidelock.service.state import ServiceState
from tidelock.tokens.message import Message
from tidelock.tokens.policy import Chunk, PolicyError, SamplingParams, drawn_from
from tidelock.tokens.trace import Node


@dataclass(frozen=True)
class Turn:
    """A validated request, ready to be sampled. `new` are the messages not yet in the trace, with the ids each adds."""

    request_id: str
    key: Key
    request: wire.ChatRequest
    scope: str
    sandbox: str
    consent: bool
    consent_source: str
    parent: str | None
    new: tuple[tuple[Message, tuple[int, ...]], ...]
    prompt_ids: tuple[int, ...]
    prompt_tokens: int
    max_tokens: int
    calls_before: int  # tool calls in the conversation so far


@dataclass
class Sample:
    """What has been sampled so far."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[tuple[int, int]] = field(default_factory=list)  # (weights version, tokens) spans
    cached_tokens: int = 0
    finish_reason: str | None = None
    chunks: list[Chunk] = field(default_factory=list)

    def add(self, chunk: Chunk) -> None:
        self.chunks.append(chunk)
        self.ids += chunk.ids
        self.logprobs += chunk.logprobs
        if chunk.ids:
            if self.versions and self.versions[-1][0] == chunk.weights_version:
                self.versions[-1] = (chunk.weights_version, self.versions[-1][1] + len(chunk.ids))
            else:
                self.versions.append((chunk.weights_version, len(chunk.ids)))
        if chunk.finish_reason:
            self.finish_reason = chunk.finish_reason
            self.cached_tokens = chunk.cached_tokens


async def prepare(state: ServiceState, key: Key, body: bytes, request_id: str) -> Turn:
    """Everything that can refuse the request before money is involved. Raises ApiError."""
    request = wire.decode_request(body)
    if request.model != state.model:
        raise errors.not_found(f"no model {request.model!r} here; /v1/models lists them", "model", "model_not_found")
    messages = wire.to_messages(request)
    metadata = request.metadata or {}
    scope = f"{key.id}/{metadata.get('session_id', 'default')}"
    parent, known = state.traces.match(scope, messages)
    ids = list(state.traces.ids(parent.id)) if parent else []
    seen = [node.message for node in state.traces.path(parent.id)] if parent else []
    new = []
    for message in messages[known:]:
        longer = state.template.extend(ids, seen, [message])
        new.append((message, tuple(longer[len(ids) :])))
        ids, seen = longer, [*seen, message]
    prompt_ids = (*ids, *state.template.generation_prompt())
    prompt_tokens = await state.policy.count(prompt_ids)
    consent, source = key.consent(request.consent)
    return Turn(
        request_id=request_id,
        key=key,
        request=request,
        scope=scope,
        sandbox=metadata.get("sandbox_level", "unknown"),
        consent=consent,
        consent_source=source,
        parent=parent.id if parent else None,
        new=tuple(new),
        prompt_ids=prompt_ids,
        prompt_tokens=prompt_tokens,
        max_tokens=_max_tokens(state, request.limit, prompt_tokens),
        calls_before=sum(len(message.tool_calls) for message in messages),
    )


def _max_tokens(state: ServiceState, asked: int | None, prompt_tokens: int) -> int:
    room = state.context_length - prompt_tokens
    if room < 1:
        reason = f"the prompt has {prompt_tokens} tokens and leaves no room in a context of {state.context_length}"
        raise errors.invalid_request(reason, "messages", "context_length_exceeded")
    if asked is None:
        return min(state.default_max_tokens, room)
    if asked > room:
        reason = f"prompt ({prompt_tokens}) plus max_tokens ({asked}) exceed the context of {state.context_length}"
        raise errors.invalid_request(reason, "max_tokens", "context_length_exceeded")
    return asked


class Meter:
    """A hold that is closed exactly once: settled for what was sampled, or released."""

    def __init__(self, state: ServiceState, turn: Turn, hold: Hold) -> None:
        self._ledger = state.ledger
        self.hold = hold
        self.params = SamplingParams(
            max_tokens=hold.max_tokens,
            temperature=1.0 if turn.request.temperature is None else turn.request.temperature,
            top_p=1.0 if turn.request.top_p is None else turn.request.top_p,
            stop_ids=tuple(state.template.stop_ids),
            seed=turn.request.seed,
        )
        self.sample = Sample()
        self.delivered = False  # whether the client has been sent any of it
        self.usage: wire.Usage | None = None

    def settle(self) -> wire.Usage:
        sample = self.sample
        nano_usd = self._ledger.settle(
            self.hold,
            cached_tokens=sample.cached_tokens,
            completion_tokens=len(sample.ids),
            finish_reason=sample.finish_reason or "abort",
        )
        self.usage = wire.Usage(self.hold.prompt_tokens, len(sample.ids), sample.cached_tokens, nano_usd)
        return self.usage

    def close(self) -> None:
        """For the ways out that did not settle: what was delivered is charged, what was not is free."""
        if self.usage is None and self.delivered:
            self.settle()
        elif self.usage is None:
            self._ledger.release(self.hold.request_id)


@contextmanager
def metered(state: ServiceState, turn: Turn) -> Iterator[Meter]:
    """Raises ApiError (429) if the wallet does not cover the prompt and one token."""
    try:
        hold = state.ledger.hold(
            turn.key.customer,
            turn.key.id,
            turn.request_id,
            model=state.model,
            price=state.price,
            price_version=state.prices.version,
            prompt_tokens=turn.prompt_tokens,
            max_tokens=turn.max_tokens,
            lifetime_s=state.hold_lifetime_s,
        )
    except InsufficientBalance:
        raise errors.insufficient_balance() from None
    meter = Meter(state, turn, hold)
    try:
        yield meter
    finally:
        meter.close()


async def sampled(state: ServiceState, turn: Turn, meter: Meter) -> AsyncIterator[Chunk]:
    """The policy's chunks, counted before they are passed on. Raises ApiError."""
    try:
        async with aclosing(state.policy.generate(turn.prompt_ids, meter.params, turn.request_id)) as chunks:
            async for chunk in chunks:
                meter.sample.add(chunk)
                yield chunk
    except PolicyError as error:
        raise errors.policy_failed(str(error), error.status, error.kind) from error


def record(state: ServiceState, turn: Turn, meter: Meter, message: Message) -> str:
    """Writes the new messages and the answer to the trace, in one durable batch; returns the answer's node id."""
    sample = meter.sample
    common = {
        "scope": turn.scope,
        "template": state.template.hash,
        "sandbox": turn.sandbox,
        "consent": turn.consent,
        "consent_source": turn.consent_source,
        "exact": state.policy.exact,
    }
    parent, nodes = turn.parent, []
    for given, ids in turn.new:
        nodes.append(Node.of(parent, given, ids, **common))
        parent = nodes[-1].id
    ids = (*state.template.generation_prompt(), *sample.ids)
    sampled_logprobs, kept = drawn_from(sample.chunks)
    answer = Node.of(
        parent,
        message,
        ids,
        sampled=len(sample.ids),
        logprobs=tuple(sample.logprobs),
        sampled_logprobs=sampled_logprobs,
        kept=kept,
        weights_versions=tuple(sample.versions),
        sampling=asdict(meter.params),
        finish_reason=sample.finish_reason or "abort",
        **common,
    )
    state.traces.add_many([*nodes, answer])
    return answer.id
