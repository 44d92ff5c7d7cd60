"""Whether this machine serves exactly what it trains, found out at every start by trying.

Two made-up prompts run through the cache in chunks, in company, across a copied page and state, and one token at a
time; every log-probability is compared with the training forward's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tidelock.models import Batch, Cache, CacheView, TransformerLM
from tidelock.models.serving import ServingModel

PAGE = 16
# Steps of (sequence, tokens): chunks of all kinds, alone and together. Both sequences end at LENGTHS.
SCHEDULE = [[(0, 16)], [(0, 5), (1, 19)], [(0, 1), (1, 1)], [(1, 1)], [(0, 13), (1, 3)], *[[(0, 1), (1, 1)]] * 3, [(0, 1)]]
LENGTHS = [sum(n for step in SCHEDULE for s, n in step if s == which) for which in (0, 1)]


@dataclass(frozen=True)
class Exactness:
    """`numerics`: "exact" (the same bits) or "corrected" (training must correct for a difference of this size)."""

    numerics: str
    max_abs_dlogp: float  # NaN when the weights themselves give no numbers


@torch.no_grad()
def self_test(trained: TransformerLM, served: TransformerLM | ServingModel) -> Exactness:
    """Compares over every id of the vocabulary, not only likely ones."""
    ids = [_prompt(n, seed, trained.config.vocab_size) for seed, n in enumerate(LENGTHS)]
    expected, got = [_whole(trained, i) for i in ids], _in_pieces(served, ids)
    expected, got = torch.cat(expected), torch.cat(got)
    return Exactness("exact" if torch.equal(expected, got) else "corrected", float((expected - got).abs().max()))


def _prompt(n: int, seed: int, vocabulary: int) -> Tensor:
    return torch.randint(vocabulary, (n,), generator=torch.Generator().manual_seed(seed))


def _whole(model: TransformerLM, ids: Tensor) -> Tensor:
    batch = Batch(ids, torch.tensor([0, len(ids)], dtype=torch.int32), torch.zeros(1, dtype=torch.int32))
    return torch.log_softmax(model.logits(model(batch)), -1)


def _in_pieces(model: TransformerLM | ServingModel, ids: list[Tensor]) -> list[Tensor]:
    pages = [-(-n // PAGE) for n in LENGTHS]
    table = torch.zeros(2, max(pages), dtype=torch.int32)
    table[0, : pages[0]], table[1, : pages[1]] = torch.arange(pages[0]), torch.arange(pages[1]) + pages[0]
    slots, cache = torch.tensor([0, 1], dtype=torch.int32), Cache(model.config, sum(pages) + 1, PAGE, 3)
    done, out = [0, 0], [[], []]
    for step in SCHEDULE:
        who = [s for s, _ in step]
        new = torch.cat([ids[s][done[s] : done[s] + n] for s, n in step])
        cu = torch.tensor([0, *torch.tensor([n for _, n in step]).cumsum(0)], dtype=torch.int32)
        start = torch.tensor([done[s] for s in who], dtype=torch.int32)
        hidden = model(Batch(new, cu, start), cache, CacheView(table[who], slots[who]))
        for (s, n), logits in zip(step, model.logits(hidden).split([n for _, n in step])):
            out[s].append(torch.log_softmax(logits, -1))
            done[s] += n
        if done == [21, 19]:  # the middle of a page: go on from copies
            cache.copy_page(int(table[0, 1]), sum(pages))
            cache.copy_slot(0, 2)
            table[0, 1], slots[0] = sum(pages), 2
    return [torch.cat(o) for o in out]
