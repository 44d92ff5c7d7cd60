"""Constrained decoding by llguidance: grammars compiled once for our tokenizers, and the ids each allows next.

The library sees every id as its bytes and special tokens as what no text can spell. Compiling and the first mask run on
threads of their own under limits of size and time, so that a grammar that explodes costs its sender a refusal and
nobody else a step.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import llguidance
import numpy as np

from tidelock.tokens import lark
from tidelock.tokens.policy import Constraint, PolicyError
from tidelock.tokens.tokenizer import Vocabulary

MAX_TEXT = 1 << 18  # bytes of a constraint
COMPILE_S = 10.0
CACHED = 256  # compiled grammars kept
WAITING = 64  # compilations asked for and not done; one more is refused
LIMITS = dict(
    initial_lexer_fuel=1_000_000, step_lexer_fuel=200_000, step_max_items=50_000, max_lexer_states=50_000,
    max_grammar_size=100_000, verbose_errors=False,
)  # fmt: skip


class Grammars:
    """The compiled constraints of one tokenizer, least recently used dropped first. `vocab`: the model's, ids beyond the
    tokenizer's are never allowed."""

    def __init__(self, tokenizer: Vocabulary, vocab: int) -> None:
        self._tokenizer, self.vocab = tokenizer, vocab
        self._library: llguidance.LLTokenizer | None = None
        self._compiled: OrderedDict[Constraint, Future] = OrderedDict()
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="grammar")
        self._ahead = ThreadPoolExecutor(1, thread_name_prefix="masks")

    async def matcher(self, constraint: Constraint) -> Matcher:
        """A fresh matcher. Raises PolicyError (400) for what does not compile within the limits."""
        if len(constraint.text) > MAX_TEXT:
            raise _refused(f"its text has more than {MAX_TEXT} bytes")
        job = self._job(constraint)
        try:
            compiled = await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(job)), COMPILE_S)
        except TimeoutError:
            job.cancel()
            raise _refused(f"it takes longer than {COMPILE_S:g} s to compile") from None
        return Matcher(compiled.deep_copy(), self.vocab, self._tokenizer.document_end, self._ahead)

    def _job(self, constraint: Constraint) -> Future:
        """The compilation of a constraint, begun now unless it was before. Raises PolicyError (429) when too many wait."""
        with self._lock:  # requests come from any event loop
            job = self._compiled.get(constraint)
            if job is None or job.cancelled():  # cancelled: it was given up before its turn came
                if sum(not j.done() for j in self._compiled.values()) >= WAITING:
                    raise PolicyError("too many constraints wait to be compiled; retry later", status=429)
                job = self._compiled[constraint] = self._threads.submit(self._compile, constraint)
            self._compiled.move_to_end(constraint)
            for old in list(self._compiled)[: max(0, len(self._compiled) - CACHED)]:
                if self._compiled[old].done():
                    del self._compiled[old]
            return job

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._ahead.shutdown(wait=False, cancel_futures=True)

    def _compile(self, constraint: Constraint) -> llguidance.LLMatcher:
        if self._library is None:
            self._library = _library_tokenizer(self._tokenizer)
        limits = llguidance.LLParserLimits(**LIMITS)
        matcher = llguidance.LLMatcher(self._library, _grammar(constraint), log_level=0, limits=limits)
        if not matcher.is_error():
            matcher.compute_bitmask()  # the first mask builds most of the lexer
        if matcher.is_error():
            raise _refused(matcher.get_error().strip().splitlines()[0][:300])
        return matcher


class Matcher:
    """Where one request is in its grammar."""

    def __init__(self, matcher: llguidance.LLMatcher, vocab: int, end: int, ahead: ThreadPoolExecutor) -> None:
        self._matcher, self._vocab, self._end, self._ahead = matcher, vocab, end, ahead
        self._coming: Future | None = None

    def prepare(self) -> None:
        """Start computing the next mask on another thread, beside the forward that computes the logits.

        A mask of a 164k vocabulary takes 0.1 ms as a rule and 30 ms now and then (`python -m benchmarks.sampling`); it is
        for those that a thread pays."""
        if self._coming is None:
            self._coming = self._ahead.submit(self._matcher.compute_bitmask)

    def allowed(self, stop_ids: Sequence[int]) -> np.ndarray:
        """bool [V]: what may come next. Where the grammar may end, that includes `stop_ids`; where it must, only they.

        Raises PolicyError when the grammar has become too complex on the way.
        """
        coming, self._coming = self._coming, None
        bits = coming.result() if coming is not None else self._matcher.compute_bitmask()
        if self._matcher.is_error():
            raise _refused(self._matcher.get_error().strip().splitlines()[0][:300])
        mask = np.unpackbits(np.frombuffer(bits, dtype=np.uint8), bitorder="little")[: self._vocab].astype(bool)
        mask = np.pad(mask, (0, self._vocab - len(mask)))
        mask[self._end] = False  # the library's sign for "may end here"; ours is the request's stop ids
        if self._matcher.is_accepting():
            mask[list(stop_ids)] = True
        return mask

    @property
    def complete(self) -> bool:
        """Nothing but the end can follow."""
        return self._matcher.is_stopped()

    def take(self, token: int) -> None:
        """Go on by one sampled id. A stop id that only ends the turn is not the grammar's business."""
        if self._matcher.validate_tokens([token]):
            self._matcher.consume_token(token)


def _grammar(constraint: Constraint) -> str:
    if constraint.kind == "json_schema":
        try:
            schema = json.loads(constraint.text)
            return llguidance.LLMatcher.grammar_from_json_schema(schema, defaults=lark.COMPACT)
        except (ValueError, RecursionError, TypeError) as e:
            raise _refused(f"its schema cannot be read: {e}") from None
    if constraint.kind == "regex":
        return llguidance.LLMatcher.grammar_from_regex(constraint.text)
    if constraint.kind == "lark":
        return llguidance.LLMatcher.grammar_from_lark(constraint.text)
    raise _refused(f"its kind {constraint.kind!r} is none of json_schema, regex, lark")


def _library_tokenizer(tokenizer: Vocabulary) -> llguidance.LLTokenizer:
    class Wrapped:
        eos_token_id, bos_token_id = tokenizer.document_end, None
        tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        special_token_ids = list(range(tokenizer.base, tokenizer.vocab_size))

        def __call__(self, text: str) -> list[int]:
            return tokenizer.encode(text)

    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(Wrapped()))


def _refused(why: str) -> PolicyError:
    return PolicyError(f"the constraint is refused: {why}", status=400, kind="invalid_request_error")
