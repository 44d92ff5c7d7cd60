"""What the model reads before anybody uses it: text and demonstrations, as samples for each training stage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from random import Random

from tidelock.envs.registry import demos
from tidelock.envs.task import Demo
from tidelock.tokens.template import Template
from tidelock.tokens.tokenizer import BPETokenizer
from tidelock.train.packing import Sample
from tidelock.train.samples import conversation_sample, text_samples

TEXT_WEIGHT = 0.25
HEAD_START = 200_000  # tokens of demonstrations before the first text


# Families whose words decide more than what to copy (which unit, how often) get more demonstrations when fine-tuning.
SHARES = {"records": 2, "convert": 2, "hops": 2}


def interleave(families: Sequence[str], split: str, seed: int, shares: Mapping[str, int] = {}) -> Iterator[Demo]:
    """Endless demonstrations, the families taking turns by their shares."""
    streams = [demos(name, split, seed * 10 + i) for name in families for i in range(shares.get(name, 1))]
    while True:
        for stream in streams:
            yield next(stream)


def train_tokenizer(texts: Sequence[str], families: Sequence[str], vocab_size: int, seed: int) -> BPETokenizer:
    """BPE over the text and over what conversations are made of, so that common tag headers become single tokens."""
    from tidelock.tokens.template import get_template
    from tidelock.tokens.tokenizer import ByteTokenizer

    template, stream = get_template("xtml", ByteTokenizer()), interleave(families, "train", seed)
    pieces: list[str] = []
    for _ in range(200 * len(families)):
        pieces += segments(template, next(stream))
    return BPETokenizer.train([*texts, *pieces], vocab_size)


def segments(template: Template, demo: Demo) -> list[str]:
    """The plain-text pieces between markers of a rendered conversation."""
    tokenizer, pieces, piece = template.tokenizer, [], []
    for token in template.render(demo.messages):
        if tokenizer.is_special(token):
            pieces.append(tokenizer.decode(piece))
            piece = []
        else:
            piece.append(token)
    return [p for p in pieces if p]


def demo_sample(demo: Demo, template: Template, bare: bool, context_weight: float) -> Sample:
    """`bare` leaves the system message out: less to read per token that is learned from."""
    skip = 1 if bare else 0
    return conversation_sample(demo.messages[skip:], demo.trained[skip:], template, context_weight)


def pretraining(
    texts: Sequence[str], families: Sequence[str], template: Template, *, text_share: float, length: int, seed: int, text_weight: float = TEXT_WEIGHT
) -> Iterator[Sample]:
    """Endless mixture of bare demonstrations and, after a head start, text: `text_share` of the tokens from then on.

    Finding and copying what was asked about is the skill everything else waits for, and at this size it appears
    suddenly. Text delays it, so text comes after it and its tokens weigh less; names in questions cannot be predicted
    and weigh nothing.
    """
    rng = Random(f"pretraining/{seed}")
    pieces = list(text_samples(texts, template.tokenizer, length, text_weight))
    rng.shuffle(pieces)
    stream, at, read, shown = interleave(families, "train", seed), 0, 0, 0
    while True:
        if pieces and read * (1 - text_share) <= (shown - HEAD_START) * text_share:
            sample = pieces[at % len(pieces)]
            at, read = at + 1, read + len(sample.ids)
        else:
            sample = demo_sample(next(stream), template, bare=rng.random() < 0.8, context_weight=0.0)
            shown += len(sample.ids)
        yield sample


def finetuning(families: Sequence[str], template: Template, seed: int) -> Iterator[Sample]:
    """Endless whole demonstrations; only what the agent says is learned."""
    for demo in interleave(families, "train", seed, SHARES):
        yield demo_sample(demo, template, bare=False, context_weight=0.0)
