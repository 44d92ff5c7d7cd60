"""What changes logits before they are a distribution: penalties on ids already seen, and biases."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tidelock.tokens.policy import SamplingParams


class Seen:
    """The ids of one request: those of its prompt, and how often each has been sampled."""

    def __init__(self, prompt: Sequence[int]) -> None:
        self.prompt = np.unique(np.asarray(prompt, dtype=np.int64))
        self.counts: dict[int, int] = {}

    def add(self, token: int) -> None:
        self.counts[token] = self.counts.get(token, 0) + 1


def penalised(params: SamplingParams) -> bool:
    return bool(params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0)


def penalise(x: np.ndarray, params: Sequence[SamplingParams], seen: Sequence[Seen | None]) -> None:
    """Change the logits fp32 [R, V] in place: repetition, then presence and frequency, then bias.

    repetition: of every id in prompt or output, x > 0 becomes x / r, x <= 0 becomes x r (CTRL, arXiv:1909.05858).
    presence, frequency: of every id in the output, x - presence - frequency * count. bias: x + b.
    """
    for row, p, s in zip(x, params, seen):
        if s is not None:
            sampled = np.fromiter(s.counts.keys(), np.int64, len(s.counts))
            counts = np.fromiter(s.counts.values(), np.float32, len(s.counts))
            if p.repetition_penalty != 1.0:
                ids = np.union1d(s.prompt, sampled)
                row[ids] = np.where(row[ids] > 0, row[ids] / np.float32(p.repetition_penalty), row[ids] * np.float32(p.repetition_penalty))
            row[sampled] -= np.float32(p.presence_penalty) + np.float32(p.frequency_penalty) * counts
        for token, bias in p.logit_bias:
            row[token] += np.float32(bias)
