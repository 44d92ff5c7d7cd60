"""One request's side of sampling: what its next draw needs, when it ends, and what must be held back until then."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from tidelock.tokens.policy import Chunk, PolicyError, SamplingParams
from tidelock.tokens.stops import StopFinder

from .grammar import Matcher
from .penalties import Seen, penalised
from .sampling import Ask, Drawn, reshaped, sample


class Sampler:
    """`read` gives the text bytes of an id (None = no text), for stop strings; `matcher` is the constraint's.

    The ids in which a stop string lies are part of the output like any others: they were sampled, metered and may be
    trained. `Chunk.stop` says what to cut from the text. Until a stop is ruled out, the ids that may belong to one wait.
    """

    def __init__(
        self, prompt: Sequence[int], params: SamplingParams, seed: int,
        read: Callable[[int], bytes | None] | None = None, matcher: Matcher | None = None,
    ) -> None:  # fmt: skip
        self.params, self.seed, self.count = params, seed % (1 << 64), 0
        self.matcher = matcher
        self._seen = Seen(prompt) if penalised(params) else None
        self._read, self._finder = read, StopFinder(params.stop) if params.stop else None
        self._unsent: list[Drawn] = []
        self._found: str | None = None
        self._reshaped = reshaped(params)

    def prepare(self) -> None:
        """A draw is near: what it needs besides logits can be computed beside the forward."""
        if self.matcher is not None:
            self.matcher.prepare()

    @property
    def looks_back(self) -> bool:
        """Whether a draw depends on what was drawn before it, through more than the logits."""
        return self._seen is not None or self.matcher is not None

    def ask(self, ahead: int = 0) -> Ask:
        """For the next draw, or the one `ahead` of it. Raises PolicyError when the constraint has become too complex."""
        allowed = self.matcher.allowed(self.params.stop_ids) if self.matcher else None
        return Ask(self.params, self.seed, self.count + ahead, self._seen, allowed)

    def add(self, drawn: Drawn) -> str | None:
        """Takes the token that was drawn. Returns why the request ends with it, or None."""
        self._unsent.append(drawn)
        self.count += 1
        if self._seen is not None:
            self._seen.add(drawn.id)
        if self.matcher is not None:
            self.matcher.take(drawn.id)
        if self._finder is not None:
            self._found = self._finder.feed(self._read(drawn.id))
        if drawn.id in self.params.stop_ids or self._found is not None:
            return "stop"
        if self.matcher is not None and self.matcher.complete and not self.params.stop_ids:
            return "stop"
        return "length" if self.count >= self.params.max_tokens else None

    def ready(self) -> int:
        """How many tokens may be sent now."""
        return max(0, len(self._unsent) - (self._finder.held if self._finder else 0))

    def chunk(self, version: int, finish_reason: str | None, cached: int, everything: bool = False) -> Chunk:
        """What may be sent, or everything: at the end, and before a change of weights (a chunk is of one version)."""
        n = len(self._unsent) if everything or finish_reason is not None else self.ready()
        tokens, self._unsent = self._unsent[:n], self._unsent[n:]
        kept = tuple(t.kept for t in tokens)
        return Chunk(
            tuple(t.id for t in tokens),
            tuple(t.logprob for t in tokens),
            version,
            finish_reason,
            cached,
            sampled_logprobs=tuple(t.sampled_logprob for t in tokens) if self._reshaped else (),
            top_logprobs=tuple(t.top for t in tokens) if self.params.top_logprobs else (),
            kept=kept if any(k is not None for k in kept) else (),
            stop=self._found if finish_reason is not None else None,
        )


def draw(samplers: Sequence[tuple[Sampler, int]], logits: Tensor) -> list[Drawn | PolicyError]:
    """For (sampler, n) number i the n-th draw from now on, from row i of logits fp32 [B, V]; or why there is none: one
    request's failure is its own."""
    out: list[Drawn | PolicyError | None] = [None] * len(samplers)
    asks, rows = [], []
    for i, (sampler, ahead) in enumerate(samplers):
        try:
            asks.append(sampler.ask(ahead))
            rows.append(i)
        except PolicyError as e:
            out[i] = e
    if rows:
        drawn = sample(logits if len(rows) == len(samplers) else logits[rows], asks)
        for i, ask, one in zip(rows, asks, drawn):
            if one.logprob != one.logprob:
                out[i] = PolicyError("the model produced a value that is not a number", status=500, kind="server_error")
            elif ask.allowed is not None and not ask.allowed[one.id]:
                out[i] = PolicyError("the constraint leaves no token to go on with", status=400, kind="invalid_request_error")
            else:
                out[i] = one
    return out
