"""From logits to tokens. A draw depends on the request's seed and the position alone, never on the batch.

The order of operations: penalties, bias, temperature, constraint, top-k, top-p, min-p, draw. What is off costs nothing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import numpy as np
import torch
from torch import Tensor

from tidelock.tokens.policy import Constraint, Kept, PolicyError, SamplingParams, compact

from .cutoffs import cut
from .penalties import Seen, penalise, penalised

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
ROWS_AT_ONCE = 1 << 20  # numbers of a float64 block that still lies in the cache
MAX_STOPS, MAX_STOP = 16, 256


def uniform(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """One number in [0, 1) per (seed, position): SplitMix64. uint64 in, float64 out."""
    with np.errstate(over="ignore"):
        x = seeds + (positions + np.uint64(1)) * GOLDEN
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    return (x >> np.uint64(11)).astype(np.float64) * 2.0**-53


@dataclass(frozen=True)
class Ask:
    """What one row of logits is for: the draw number `position` of a request.

    seen: the request's ids so far, where its params have a penalty. allowed: bool [V], where it has a constraint.
    """

    params: SamplingParams
    seed: int
    position: int
    seen: Seen | None = None
    allowed: np.ndarray | None = None


@dataclass(frozen=True)
class Drawn:
    """One sampled token, as `policy.Chunk` reports it."""

    id: int
    logprob: float  # of the raw logits: the same log_softmax the trainer differentiates; NaN for a broken row
    sampled_logprob: float  # under what was drawn from: 0 when greedy
    top: tuple[tuple[int, float], ...] = ()
    kept: Kept = None


def reshaped(params: SamplingParams) -> bool:
    """Whether the draw is from anything but the softmax of the raw logits."""
    return params.temperature != 1.0 or params.constraint is not None or _changed(params) or _cut_off(params)


def _changed(p: SamplingParams) -> bool:
    return penalised(p) or bool(p.logit_bias)


def _cut_off(p: SamplingParams) -> bool:
    return p.temperature > 0 and (p.top_k > 0 or p.top_p < 1 or p.min_p > 0)


def check_params(params: SamplingParams, vocab: int) -> None:
    """Raises PolicyError (400) for what no draw could honour."""
    p = params
    for why in itertools.chain(_wrong_types(p), _wrong_values(p, vocab)):
        raise PolicyError(why, status=400, kind="invalid_request_error")


INTEGERS = ("max_tokens", "top_k", "top_logprobs", "priority", "seed", "routed_from")
NUMBERS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "deadline_s")
OPTIONAL = ("seed", "routed_from", "deadline_s")


def _wrong_types(p: SamplingParams) -> Iterator[str]:
    """In a process anybody may pass anything; what the engine's thread computes with is of these types."""
    for name in INTEGERS:
        value = getattr(p, name)
        if not _whole(value) and not (value is None and name in OPTIONAL):
            yield f"{name} must be a whole number, not {value!r}"[:200]
        elif value is not None and name != "seed" and abs(value) >= 1 << 53:
            yield f"{name} is too large"
    for name in NUMBERS:
        value = getattr(p, name)
        if not (isinstance(value, Real) and math.isfinite(value)) and not (value is None and name in OPTIONAL):
            yield f"{name} must be a number, not {value!r}"[:200]
    if not isinstance(p.tenant, str):
        yield "tenant must be a string"
    if not all(isinstance(s, str) for s in _items(p.stop)) or isinstance(p.stop, str):
        yield "stop must be strings"
    if not all(_whole(i) for i in _items(p.stop_ids)):
        yield "stop_ids must be whole numbers"
    if not all(isinstance(b, tuple) and len(b) == 2 and _whole(b[0]) and isinstance(b[1], Real) for b in _items(p.logit_bias)):
        yield "logit_bias must be pairs of an id and a number"
    if p.constraint is not None and not isinstance(p.constraint, Constraint):
        yield "constraint must be a Constraint"


def _whole(x: object) -> bool:
    return isinstance(x, Integral) and not isinstance(x, bool)


def _items(x: object) -> Iterable:
    """What is no collection counts as one wrong item."""
    return x if isinstance(x, (tuple, list, set, frozenset, str)) else (None,)


def _wrong_values(p: SamplingParams, vocab: int) -> Iterator[str]:
    wrong = [
        (p.max_tokens < 1, f"max_tokens must be at least 1, not {p.max_tokens}"),
        (not 0 <= p.temperature <= 100, "temperature must be between 0 and 100"),
        (not 0 < p.top_p <= 1, "top_p must be above 0 and at most 1"),
        (not 0 <= p.min_p <= 1, "min_p must be between 0 and 1"),
        (p.top_k < 0, "top_k must not be negative"),
        (not 0 < p.repetition_penalty < 1e4, "repetition_penalty must be above 0 and below 10000"),
        (not all(abs(x) < 1e4 for x in (p.presence_penalty, p.frequency_penalty)), "penalties must be below 10000"),
        (not all(abs(b) < 1e4 for _, b in p.logit_bias), "logit_bias must be finite"),
        (not all(0 <= i < vocab for i, _ in p.logit_bias), f"logit_bias names ids outside the vocabulary of {vocab}"),
        (not 0 <= p.top_logprobs <= 100, "top_logprobs must be between 0 and 100"),
        (p.routed_from is not None and p.routed_from < 0, "routed_from must not be negative"),
        (not all(0 <= i < vocab for i in p.stop_ids), f"stop_ids names ids outside the vocabulary of {vocab}"),
        (len(p.stop) > MAX_STOPS, f"at most {MAX_STOPS} stop strings"),
        (not all(0 < len(s) <= MAX_STOP for s in p.stop), f"a stop string has 1 to {MAX_STOP} characters"),
    ]
    yield from (why for is_wrong, why in wrong if is_wrong)


def sample(logits: Tensor, asks: Sequence[Ask]) -> list[Drawn]:
    """logits fp32 [B, V], row i for asks[i]. Temperature 0 is greedy: the likeliest id that the constraint allows."""
    raw = logits.numpy()
    own = [i for i, a in enumerate(asks) if _changed(a.params) or a.allowed is not None]
    x = dict(zip(own, _adjust(raw[own], [asks[i] for i in own]))) if own else {}  # rows that are not the raw logits
    ids = logits.argmax(dim=-1).numpy()
    for i in own:
        ids[i] = x[i].argmax()
    sampled, kept = np.zeros(len(asks)), [None] * len(asks)
    warm = [i for i, a in enumerate(asks) if a.params.temperature > 0]
    cold = [i for i, a in enumerate(asks) if a.params.temperature <= 0 and a.allowed is not None]
    few, all_of_it = [i for i in warm if _cut_off(asks[i].params)], [i for i in warm if not _cut_off(asks[i].params)]
    if all_of_it:
        _draw_from_all([x.get(i, raw[i]) for i in all_of_it], [asks[i] for i in all_of_it], all_of_it, ids, sampled)
    if few:
        rows = np.stack([x.get(i, raw[i]) for i in few])
        for i, among in zip(few, _draw_from_few(rows, [asks[i] for i in few], few, ids, sampled)):
            kept[i] = compact(among, raw.shape[1])
    for i in cold + [i for i in all_of_it if asks[i].allowed is not None]:
        kept[i] = compact(np.flatnonzero(asks[i].allowed), raw.shape[1])
    scores = torch.log_softmax(logits, dim=-1)
    logprobs = scores.gather(1, torch.from_numpy(ids)[:, None])[:, 0].tolist()
    tops = _likeliest(scores, asks)
    return [Drawn(*row) for row in zip(ids.tolist(), logprobs, sampled.tolist(), tops, kept)]


def _adjust(x: np.ndarray, asks: Sequence[Ask]) -> np.ndarray:
    """Penalties, bias and constraint on rows of our own. A constraint that allows nothing changes nothing."""
    penalise(x, [a.params for a in asks], [a.seen for a in asks])
    for row, ask in zip(x, asks):
        if ask.allowed is not None:
            np.copyto(row, -np.inf, where=~ask.allowed)
    return x


def _draws(asks: Sequence[Ask]) -> np.ndarray:
    seeds = np.array([a.seed for a in asks], dtype=np.uint64)
    return uniform(seeds, np.array([a.position for a in asks], dtype=np.uint64))


def _draw_from_all(
    rows: list[np.ndarray], asks: Sequence[Ask], where: list[int], ids: np.ndarray, sampled: np.ndarray
) -> None:
    """Invert the cumulative distribution over the whole vocabulary, a few rows at a time."""
    u, v = _draws(asks), len(rows[0])
    step = max(1, ROWS_AT_ONCE // v)
    for at in range(0, len(rows), step):
        temperatures = np.array([a.params.temperature for a in asks[at : at + step]])
        scores = np.stack(rows[at : at + step]).astype(np.float64) / temperatures[:, None]
        scores -= scores.max(axis=1, keepdims=True)
        edges = np.cumsum(np.exp(scores), axis=1)
        total = edges[:, -1]
        drawn = np.minimum((edges <= (u[at : at + step] * total)[:, None]).sum(axis=1), v - 1)
        ids[where[at : at + step]] = drawn
        sampled[where[at : at + step]] = scores[np.arange(len(drawn)), drawn] - np.log(total)


def _draw_from_few(
    rows: np.ndarray, asks: Sequence[Ask], where: list[int], ids: np.ndarray, sampled: np.ndarray
) -> list[np.ndarray]:
    """The same among the ids the cut-offs left, which are returned: the ids left out would add exact zeros."""
    values = (np.array([getattr(a.params, n) for a in asks]) for n in ("temperature", "top_k", "top_p", "min_p"))
    among, weights = cut(rows, *values)
    edges = np.cumsum(weights, axis=1)
    left = np.maximum((weights > 0).sum(axis=1), 1)
    place = np.minimum((edges <= (_draws(asks) * edges[:, -1])[:, None]).sum(axis=1), left - 1)
    each = np.arange(len(asks))
    ids[where] = among[each, place]
    with np.errstate(divide="ignore", invalid="ignore"):  # a broken row: its logprob is NaN too
        sampled[where] = np.log(weights[each, place] / edges[:, -1])
    return [row[:n] for row, n in zip(among, left)]


def _likeliest(scores: Tensor, asks: Sequence[Ask]) -> list[tuple[tuple[int, float], ...]]:
    out: list[tuple[tuple[int, float], ...]] = [()] * len(asks)
    for i in [i for i, a in enumerate(asks) if a.params.top_logprobs]:
        values, ids = scores[i].topk(min(asks[i].params.top_logprobs, scores.shape[1]))
        out[i] = tuple(zip(ids.tolist(), values.tolist()))
    return out
