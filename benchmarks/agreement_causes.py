"""Why two engines part: what rounding alone does to a model's choices, and which near-tie each difference stood on.

`swayed(model, kind)` is the model's own forward with another engine's rounding: the inputs of fp16 matrices rounded to fp16,
as llama.cpp does, or (fp32) the plain PyTorch operations, whose sums run in another order.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from tidelock.engine.routing import kept, replaying
from tidelock.models import Batch, MoE, TransformerLM, layers, ops

FLIPS = 12  # near-ties of the router that are tried, the nearest first


@contextmanager
def swayed(narrow: frozenset[int] | None) -> Iterator[None]:
    """`narrow`: ids of the parameters stored in fp16; None: another order of sums in fp32."""
    backend, kernels = layers.ops.backend, ops.backend(torch.empty(0))
    linear, experts_linear = kernels.linear, kernels.experts_linear
    try:
        if narrow is None:
            layers.ops.backend = lambda x: ops.reference
        else:
            kernels.linear = lambda x, *w: linear(x.half().float() if id(w[0]) in narrow else x, *w)
            kernels.experts_linear = lambda x, at, w: experts_linear(x.half().float() if id(w) in narrow else x, at, w)
        yield
    finally:
        layers.ops.backend, kernels.linear, kernels.experts_linear = backend, linear, experts_linear


@contextmanager
def _scored(model: TransformerLM) -> Iterator[list[Tensor]]:
    """What every router decides by, [N, E] in the order of the layers."""
    out: list[Tensor] = []

    def note(m: MoE):
        return m.gate.register_forward_hook(lambda _, __, y: out.append(y.sigmoid() + m.e_score_correction_bias))

    hooks = [note(m) for m in (layer.mlp for layer in model.layers) if isinstance(m, MoE)]
    try:
        yield out
    finally:
        for h in hooks:
            h.remove()


@torch.no_grad()
def look(model: TransformerLM, ids: list[int], experts: list[Tensor | None] | None = None):
    """(logits [N, V], experts by layer, router scores by MoE layer) of one sequence; `experts`: to take instead."""
    batch = Batch(torch.tensor(ids), torch.tensor([0, len(ids)], dtype=torch.int32), torch.zeros(1, dtype=torch.int32))
    with replaying(model, experts) if experts else nullcontext(), kept(model) as choices, _scored(model) as scores:
        return model.logits(model(batch)), choices(), scores


def noise(model: TransformerLM, prompts, answers, narrow: frozenset[int] | None, some: int = 20) -> tuple[float, float]:
    """The most that rounding changes, over what `some` prompts sampled and with the same experts: the distance of the two
    best logits, and the distance of two router scores."""
    logit = router = 0.0
    for prompt, answer in list(zip(prompts, answers))[:some]:
        ids = [*prompt, *answer]
        a, chosen, scores = look(model, ids)
        with swayed(narrow):
            b, _, others = look(model, ids, chosen)
        best = a.topk(2).indices
        logit = max(logit, float((a.gather(1, best).diff(dim=1) - b.gather(1, best).diff(dim=1)).abs().max()))
        router = max(router, *(2 * float((x - y).abs().max()) for x, y in zip(scores, others)))
    return logit, router


def apart(model: TransformerLM, prompts, answers, ask: Callable[[list[int]], dict[int, float]], some: int = 200) -> float:
    """How far the distance of the two best logits is from what `ask` (ids -> log-probabilities of the next) says, in 95 of
    100 places of what was sampled; the rest may be a router's flip."""
    far, rng = [], random.Random(0)
    for prompt, answer in random.Random(0).choices([(p, a) for p, a in zip(prompts, answers) if a], k=some):
        ids = [*prompt, *answer[: rng.randrange(len(answer))]]
        mine, said = look(model, ids)[0][-1], ask(ids)
        x, y = mine.topk(2).indices.tolist()
        if x in said and y in said:
            far.append(abs(float(mine[x] - mine[y]) - (said[x] - said[y])))
    return sorted(far)[int(0.95 * len(far))] if far else math.nan


def cause(model: TransformerLM, ids: list[int], mine: int, theirs: int, narrow, limits: tuple[float, float]) -> dict:
    """Of two engines that continue `ids` by `mine` (ours) and `theirs`. `limits`: how near logits and router scores must be
    to count as a near-tie.

    kind: "logits" (ours are that near), "router" (a router's scores are, and the other expert gives their token; `tie`: how
    near) or "unexplained"; `same`: our forward under their rounding gives their token."""
    logits, chosen, scores = look(model, ids)
    with swayed(narrow):
        same = int(look(model, ids)[0][-1].argmax()) == theirs
    found = {"ours": float(logits[-1, mine] - logits[-1, theirs]), "same": same, "kind": "unexplained"}
    if found["ours"] <= limits[0]:
        return found | {"kind": "logits"}
    for tie, layer, row, other in _near_ties(model, chosen, scores, limits[1]):
        flipped: list[Tensor | None] = [None] * len(chosen)
        flipped[layer] = chosen[layer].clone()
        flipped[layer][row] = other
        if int(look(model, ids, flipped)[0][-1].argmax()) == theirs:
            return found | {"kind": "router", "tie": tie}
    return found


def _near_ties(model: TransformerLM, chosen, scores, limit: float) -> list[tuple[float, int, int, Tensor]]:
    """(distance, layer, row, the experts it would be) of the nearest last choices, at most `limit` apart."""
    ties, moe = [], [i for i, c in enumerate(chosen) if c is not None]
    for layer, s in zip(moe, scores):
        k = model.layers[layer].mlp.k
        top = s.topk(k + 1)
        apart = top.values[:, k - 1] - top.values[:, k]
        for row in (apart <= limit).nonzero()[:, 0].tolist():
            other = torch.cat([top.indices[row, : k - 1], top.indices[row, k:]])
            ties.append((float(apart[row]), layer, row, other))
    return sorted(ties, key=lambda t: t[0])[:FLIPS]
