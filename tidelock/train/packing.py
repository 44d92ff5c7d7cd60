"""Packing: samples of any length become flat batches of whole sequences, so that no computed row is padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tidelock.tokens.policy import Kept


@dataclass(frozen=True)
class Sample:
    """Ids and, for each, the loss weight of predicting it from its past (so weights[0] is always 0).

    extras: further per-token figures that follow the same convention (advantage, old_logp). kept: what cut-offs and
    constraint had left when the token was drawn (`policy.Kept`), if it is to be trained under the same; None = all.
    """

    ids: list[int]
    weights: list[float]
    extras: dict[str, list[float]] = field(default_factory=dict)
    kept: list[Kept] | None = None


@dataclass(frozen=True)
class Pack:
    """S samples in N rows. Row i predicts targets[i] (its successor in the same sample) with weight weights[i].

    ids, targets: int64 [N]; weights: fp32 [N], 0 in each sample's last row; cu: int32 [S + 1]; start: int32 [S], zeros.
    kept: N sets of ids that row i's prediction is normalised over, or None where no sample has any.
    """

    ids: Tensor
    targets: Tensor
    weights: Tensor
    cu: Tensor
    start: Tensor
    extras: dict[str, Tensor]
    kept: tuple[Kept, ...] | None = None


def make_pack(samples: Sequence[Sample]) -> Pack:
    def shifted(lists: Iterator[list[float]]) -> list[float]:
        return [x for values in lists for x in (*values[1:], 0)]

    lengths = [len(s.ids) for s in samples]
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    names = samples[0].extras if samples else {}
    return Pack(
        torch.tensor([i for s in samples for i in s.ids], dtype=torch.int64),
        torch.tensor(shifted(s.ids for s in samples), dtype=torch.int64),
        torch.tensor(shifted(s.weights for s in samples), dtype=torch.float32),
        cu,
        torch.zeros(len(samples), dtype=torch.int32),
        {n: torch.tensor(shifted(s.extras[n] for s in samples), dtype=torch.float32) for n in names},
        tuple(k for s in samples for k in (*(s.kept or [None] * len(s.ids))[1:], None)) if any(s.kept for s in samples) else None,
    )


def pack(samples: Sequence[Sample], max_tokens: int) -> list[Pack]:
    """Whole samples, in order, into packs of at most `max_tokens` rows. A longer sample makes a pack of its own."""
    packs, current, size = [], [], 0
    for sample in samples:
        if current and size + len(sample.ids) > max_tokens:
            packs.append(make_pack(current))
            current, size = [], 0
        current.append(sample)
        size += len(sample.ids)
    return packs + ([make_pack(current)] if current else [])


def stream(samples: Iterator[Sample], max_tokens: int) -> Iterator[Pack]:
    """Packs from an endless stream, in its order."""
    current, size = [], 0
    for sample in samples:
        if current and size + len(sample.ids) > max_tokens:
            yield make_pack(current)
            current, size = [], 0
        current.append(sample)
        size += len(sample.ids)
