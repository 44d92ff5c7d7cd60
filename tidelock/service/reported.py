"""What is billed where an upstream has a count of its own, and what is kept of that count.

An exact upstream samples the ids we hand on, so its answers are billed by those ids; what it says stands beside them and
must agree (the reconciliation looks). A text upstream samples tokens of another tokenizer, of which ours are a rendering:
it is billed at the smaller of the two counts, prompt and completion each. So a customer never pays for more than the
upstream reports, nor for more than was handed on (which the hold covers); the difference is the operator's. Where the
upstream reports nothing (a cut stream, a client that left) our count stands alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from tidelock.service.answer import Sample
from tidelock.service.books import Upstream
from tidelock.service.prices import Counts


def billed(prompt_tokens: int, samples: Sequence[Sample], exact: bool) -> Counts:
    """`prompt_tokens`: of our rendering; it is billed once, however many answers there are. `exact`: of samples without a
    source."""
    cached = samples[0].cached_tokens
    completion = 0
    for sample in samples:
        said = None if (sample.source.exact if sample.source else exact) else sample.reported
        completion += _least(len(sample.ids), said.completion_tokens if said else None)
        prompt_tokens = _least(prompt_tokens, said.prompt_tokens if said else None)
    return Counts(prompt_tokens, min(cached, prompt_tokens), completion=completion)


def upstream(samples: Sequence[Sample]) -> Upstream:
    """Of a request with several answers: the largest prompt (each was sent it), all completions, and the first answer's
    cached tokens, as the bill has them. What one answer's upstream does not say is not known of the request."""
    said = [sample.reported for sample in samples]
    prompts = [r.prompt_tokens if r else None for r in said]
    completions = [r.completion_tokens if r else None for r in said]
    names = dict.fromkeys(sample.source.name for sample in samples if sample.source)
    return Upstream(
        None if None in prompts else max(prompts),
        None if None in completions else sum(completions),
        said[0].cached_tokens if said[0] else None,
        ",".join(names) or None,
    )


def engine_ms(samples: Sequence[Sample]) -> tuple[int | None, int | None, int | None]:
    """In line, to the first token, from that to the last: of the answer that was in line the longest."""
    told = [sample.times for sample in samples if sample.times is not None]
    if not told:
        return None, None, None
    slowest = max(told, key=lambda times: times.queued_s or 0.0)
    return _ms(slowest.queued_s), _ms(slowest.prefill_s), _ms(slowest.decode_s)


def _ms(seconds: float | None) -> int | None:
    return None if seconds is None else int(seconds * 1000)


def _least(ours: int, theirs: int | None) -> int:
    return ours if theirs is None else min(ours, theirs)
