"""Which experts ran for which token, for requests that ask: training can then replay the router's choices.

An expert chosen on a near-tie may differ between two kernels, and a token that went through another expert is another
token to the trainer; replaying the choices takes that difference out (the models' `MoE.note_choices` leaves them, and
`MoE.replayed` takes them).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from tidelock.models import MoE, TransformerLM
from tidelock.models.serving import ServingModel


class Routing:
    """The choices of one request, by position from `start` on. A position that runs again is written again."""

    def __init__(self, start: int, layers: int, k: int, experts: int) -> None:
        self.start = start
        self.known = True  # False: some forward ran without leaving its choices, so there is nothing whole to tell
        self._rows = np.zeros((64, layers, k), dtype=np.uint8 if experts <= 256 else np.uint16)

    def note(self, position: int, rows: np.ndarray) -> None:
        """rows [n, layers, k] of the tokens at position, position + 1, ..."""
        rows, at = rows[max(0, self.start - position) :], max(0, position - self.start)
        while at + len(rows) > len(self._rows):
            self._rows = np.concatenate([self._rows, np.zeros_like(self._rows)])
        self._rows[at : at + len(rows)] = rows

    def upto(self, end: int) -> np.ndarray | None:
        """Of the tokens from `start` to before `end`."""
        return self._rows[: max(0, end - self.start)].copy() if self.known else None


def routing_for(start: int | None, model: TransformerLM) -> Routing | None:
    c = model.config
    return None if start is None else Routing(start, c.num_layers, c.num_experts_per_tok, c.n_routed_experts)


@contextmanager
def noted(model: TransformerLM | ServingModel, work: Sequence[tuple[Routing | None, int, int]]) -> Iterator[None]:
    """Around one packed forward: `work` says whose rows it holds, as (its routing, first position, rows) in order."""
    if not any(routing for routing, _, _ in work):
        yield
        return
    with kept(model) as choices:
        yield
        left = choices()
    if all(c is None for c in left):
        for routing, _, _ in work:
            if routing is not None:
                routing.known = False
        return
    empty = torch.zeros_like(next(c for c in left if c is not None))
    rows = torch.stack([empty if c is None else c for c in left], dim=1).numpy()
    at = 0
    for routing, position, n in work:
        if routing is not None:
            routing.note(position, rows[at : at + n])
        at += n


@contextmanager
def kept(model: TransformerLM | ServingModel) -> Iterator[Callable[[], list[torch.Tensor | None]]]:
    """Yields what gives the experts that the last forward chose, int64 [N, k] by layer, None where there are none."""
    if isinstance(model, ServingModel):
        yield model.choices
        return
    layers = [layer.mlp for layer in model.layers]
    moe = [m for m in layers if isinstance(m, MoE)]
    for m in moe:
        m.note_choices = True
    try:
        yield lambda: [m.choices if isinstance(m, MoE) else None for m in layers]
    finally:
        for m in moe:
            m.note_choices, m.choices = False, None


@contextmanager
def replaying(model: TransformerLM, choices: Sequence[torch.Tensor | None]) -> Iterator[None]:
    """Forwards inside take these experts, int64 [N, k] by layer, instead of choosing their own."""
    layers = [layer.mlp for layer in model.layers]
    try:
        for m, chosen in zip(layers, choices, strict=True):
            if isinstance(m, MoE):
                m.replayed = chosen
        yield
    finally:
        for m in layers:
            if isinstance(m, MoE):
                m.replayed = None
