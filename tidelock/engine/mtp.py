"""Drafts by a model's own multi-token prediction layer: from the state at t and the token after it, the token after that.

The layer has a cache of its own, apart from the pages and slots of the model: it sees only tokens that were really
sampled, so it never has to go back, and nothing of it outlives a request. It reads the recent past alone (the end of
the prompt, then what was decoded), which costs a worse guess now and then and no memory per prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from tidelock.models import Batch, Cache, CacheView, ModelConfig, TransformerLM

PROMPT = 64  # rows of a prompt that are read
WINDOW = 1024  # rows after which a request's past begins anew
PAGE = 64


class MTPDrafts:
    """The first MTP layer of the model, for up to `places` requests."""

    def __init__(self, config: ModelConfig, places: int) -> None:
        kind = config.mixers[-1]
        one = replace(config, mixers=(kind,), ffns=config.ffns[-1:], num_mtp_layers=0)
        self._pages = WINDOW // PAGE if kind == "mla" else 1
        self._cache = Cache(one, places * self._pages, PAGE, places if kind == "kda" else 1)
        self._free = list(range(places))
        self._rows = [0] * places

    def take(self) -> int | None:
        """A place for one request; None when all are taken."""
        if not self._free:
            return None
        place = self._free.pop()
        self._rows[place] = 0
        return place

    def release(self, place: int) -> None:
        self._free.append(place)

    @torch.no_grad()
    def guess(self, model: TransformerLM, places: Sequence[int], hidden: Sequence[Tensor], following: Sequence[Sequence[int]]) -> list[int]:
        """hidden[i] [n_i, d]: the model's states of the newest rows of request i, whose next tokens are following[i].
        Returns for each the likeliest token after the last of those."""
        for i, place in enumerate(places):
            if self._rows[place] + len(following[i]) > WINDOW:
                self._rows[place] = 0
        lengths = [len(f) for f in following]
        cu = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
        start = torch.tensor([self._rows[p] for p in places], dtype=torch.int32)
        table = torch.tensor([[p * self._pages + i for i in range(self._pages)] for p in places], dtype=torch.int32)
        ids = torch.tensor([token for f in following for token in f], dtype=torch.int64)
        batch = Batch(ids, cu, start, CacheView(table, torch.tensor(places, dtype=torch.int32)))
        state = model.mtp_step(torch.cat(list(hidden)), ids, batch, self._cache)
        for place, n in zip(places, lengths):
            self._rows[place] += n
        return model.logits(state[cu[1:].long() - 1]).argmax(dim=-1).tolist()
