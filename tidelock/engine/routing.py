"""Which experts ran for which token, for requests that ask: training can then replay the router's choices.

An expert chosen on a near-tie may differ between two kernels, and a token that went through another expert is another
token to the trainer; replaying the choices takes that difference out (the models' `MoE.note_choices` leaves them).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from tidelock.models import MoE, TransformerLM


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
def noted(model: TransformerLM, work: Sequence[tuple[Routing | None, int, int]]) -> Iterator[None]:
    """Around one packed forward: `work` says whose rows it holds, as (its routing, first position, rows) in order."""
    if not any(routing for routing, _, _ in work):
        yield
        return
    layers = [layer.mlp for layer in model.layers]
    moe = [m for m in layers if isinstance(m, MoE)]
    for m in moe:
        m.note_choices = True
    try:
        yield
        left = [m.choices for m in moe]
    finally:
        for m in moe:
            m.note_choices, m.choices = False, None
    if not moe or any(choices is None for choices in left):
        for routing, _, _ in work:
            if routing is not None:
                routing.known = False
        return
    empty, of = torch.zeros_like(left[0]), iter(left)
    rows = torch.stack([next(of) if isinstance(m, MoE) else empty for m in layers], dim=1).numpy()
    at = 0
    for routing, position, n in work:
        if routing is not None:
            routing.note(position, rows[at : at + n])
        at += n
