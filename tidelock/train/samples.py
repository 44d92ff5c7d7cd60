"""From text and conversations to training samples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from tidelock.tokens.message import Message
from tidelock.tokens.template import Template

from .packing import Sample


def text_samples(texts: Iterable[str], tokenizer, length: int, weight: float = 1.0) -> Iterator[Sample]:
    """Documents cut into pieces of at most `length` ids, every token predicted. Documents end as the tokenizer ends them."""
    for text in texts:
        ids = [*tokenizer.encode(text), tokenizer.document_end]
        for at in range(0, len(ids), length):
            piece = ids[at : at + length]
            if len(piece) > 1:
                yield Sample(piece, [0.0] + [weight] * (len(piece) - 1))


def conversation_sample(
    messages: Sequence[Message], trained: Sequence[bool], template: Template, context_weight: float = 0.0
) -> Sample:
    """A conversation as the agent would have produced it.

    Weight 1 on the tokens an assistant samples (everything after the generation prompt) in messages marked `trained`,
    `context_weight` on everything else (0 for SFT; 1 makes it a pretraining document). Raises NotAnExtension where the
    template would have shown a later turn the earlier ones without their reasoning: give it one task at a time then.
    """
    ids: list[int] = []
    weights: list[float] = []
    for i, message in enumerate(messages):
        if message.role == "assistant":
            prompt, sampled = template.extend(ids, messages[:i], [], generation_prompt=True), template.turn(message)
        else:
            prompt, sampled = template.extend(ids, messages[:i], [message]), []
        weights += [context_weight] * (len(prompt) - len(ids))
        weights += [1.0 if trained[i] else context_weight] * len(sampled)
        ids = prompt + sampled
    weights[0] = 0.0
    return Sample(ids, weights)
