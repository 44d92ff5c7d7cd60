"""Whether this machine serves exactly what it trains, found out at every start by trying.

Two made-up prompts run through the cache in chunks, in company, across a copied page and state, and one token at a
time; every log-probability is compared with the training forward's.

Weights served in fewer bits are other weights, so theirs differ. What the difference is made of is then found out too: the
kernels' part of it (against the training forward over the same rounded weights; 0 unless something is broken), the share
of tokens that the rounding sends to other experts, and how far they are apart when the training forward takes those experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tidelock.models import Batch, Cache, CacheView, TransformerLM
from tidelock.models.serving import ServingModel, rounded_view

from .routing import kept, replaying

PAGE = 16
# Steps of (sequence, tokens): chunks of all kinds, alone and together. Both sequences end at LENGTHS.
SCHEDULE = [[(0, 16)], [(0, 5), (1, 19)], [(0, 1), (1, 1)], [(1, 1)], [(0, 13), (1, 3)], *[[(0, 1), (1, 1)]] * 3, [(0, 1)]]
LENGTHS = [sum(n for step in SCHEDULE for s, n in step if s == which) for which in (0, 1)]
Choices = list[Tensor | None]  # the experts of every row, int64 [N, k] by layer; None for a dense one


@dataclass(frozen=True)
class Exactness:
    """`numerics`: "exact" (the same bits) or "corrected" (training must correct for a difference of this size).

    Differences are the largest over every id of the vocabulary, NaN when the weights themselves give no numbers."""

    numerics: str
    max_abs_dlogp: float
    max_abs_dlogp_served_weights: float = 0.0  # from the training forward over the weights as they are served
    rerouted: float = 0.0  # share of tokens, 0 to 1, that some layer sends to other experts than in training
    max_abs_dlogp_same_experts: float = 0.0  # when the training forward takes the experts that served


@torch.no_grad()
def self_test(trained: TransformerLM, served: TransformerLM | ServingModel) -> Exactness:
    """Compares over every id of the vocabulary, not only likely ones."""
    ids = [_prompt(n, seed, trained.config.vocab_size) for seed, n in enumerate(LENGTHS)]
    (expected, choices), (got, took) = _whole(trained, ids), _in_pieces(served, ids)
    if torch.equal(expected, got):
        return Exactness("exact", 0.0)
    own = rounded_view(trained, served.weights, served.experts) if isinstance(served, ServingModel) else served
    others = [_whole(own, ids)[0], _whole(trained, ids, took)[0]]
    far, kernels, same = (float((x - got).abs().max()) for x in (expected, *others))
    return Exactness("corrected", far, kernels, float(_others(choices, took).float().mean()), same)


def _others(a: Choices, b: Choices) -> Tensor:
    """bool [N]: the rows that went to other experts in some layer."""
    differs = [(x.sort(1).values != y.sort(1).values).any(1) for x, y in zip(a, b) if x is not None and y is not None]
    return torch.stack(differs).any(0) if differs else torch.zeros(1, dtype=torch.bool)


def _prompt(n: int, seed: int, vocabulary: int) -> Tensor:
    return torch.randint(vocabulary, (n,), generator=torch.Generator().manual_seed(seed))


def _whole(model: TransformerLM, ids: list[Tensor], experts: Choices | None = None) -> tuple[Tensor, Choices]:
    """[N, V] log-probabilities of all rows in order, and the experts that were chosen; `experts`: those to take instead."""
    cu = torch.tensor([0, *torch.tensor([len(i) for i in ids]).cumsum(0)], dtype=torch.int32)
    batch = Batch(torch.cat(ids), cu, torch.zeros(len(ids), dtype=torch.int32))
    with replaying(model, experts or [None] * model.config.num_layers), kept(model) as choices:
        return torch.log_softmax(model.logits(model(batch)), -1), choices()


def _in_pieces(model: TransformerLM | ServingModel, ids: list[Tensor]) -> tuple[Tensor, Choices]:
    """The same by SCHEDULE."""
    pages = [-(-n // PAGE) for n in LENGTHS]
    table = torch.zeros(2, max(pages), dtype=torch.int32)
    table[0, : pages[0]], table[1, : pages[1]] = torch.arange(pages[0]), torch.arange(pages[1]) + pages[0]
    slots, cache = torch.tensor([0, 1], dtype=torch.int32), Cache(model.config, sum(pages) + 1, PAGE, 3)
    done, out, took = [0, 0], [[], []], [[], []]
    for step in SCHEDULE:
        who, sizes = [s for s, _ in step], [n for _, n in step]
        new = torch.cat([ids[s][done[s] : done[s] + n] for s, n in step])
        cu = torch.tensor([0, *torch.tensor(sizes).cumsum(0)], dtype=torch.int32)
        start = torch.tensor([done[s] for s in who], dtype=torch.int32)
        with kept(model) as choices:
            hidden = model(Batch(new, cu, start), cache, CacheView(table[who], slots[who]))
            chosen = [[None] * len(who) if c is None else c.clone().split(sizes) for c in choices()]
        for i, ((s, n), logits) in enumerate(zip(step, model.logits(hidden).split(sizes))):
            out[s].append(torch.log_softmax(logits, -1))
            took[s].append([c[i] for c in chosen])
            done[s] += n
        if done == [21, 19]:  # the middle of a page: go on from copies
            cache.copy_page(int(table[0, 1]), sum(pages))
            cache.copy_slot(0, 2)
            table[0, 1], slots[0] = sum(pages), 2
    by_layer = [[None if steps[0] is None else torch.cat(steps) for steps in zip(*mine)] for mine in took]
    return torch.cat([*out[0], *out[1]]), [None if a is None else torch.cat([a, b]) for a, b in zip(*by_layer)]
