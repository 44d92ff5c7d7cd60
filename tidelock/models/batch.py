"""What a forward reads besides weights: a packed batch of sequences, and the cache they continue from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .config import ModelConfig


@dataclass(frozen=True)
class CacheView:
    """Where each sequence of a batch lives in the cache."""

    block_table: Tensor  # int32 [S, P]: pages of sequence s in order
    slots: Tensor  # int32 [S]: its KDA state slot


class Batch:
    """Packed sequences. Rows cu[s]:cu[s+1] are the new tokens of sequence s; start[s] tokens of it are cached already.

    ids: int64 [N]; cu: int32 [S + 1]; start: int32 [S] (all zero in training).
    """

    def __init__(self, ids: Tensor, cu: Tensor, start: Tensor, view: CacheView | None = None) -> None:
        self.ids, self.cu, self.start = ids, cu, start
        self.n = cu.numel() - 1
        self.slots = None if view is None else view.slots
        self.table = None if view is None else view.block_table

    def positions(self) -> Tensor:
        """Absolute position of every row, int64 [N]."""
        lengths = self.cu[1:] - self.cu[:-1]
        shift = (self.start - self.cu[:-1]).repeat_interleave(lengths)
        return torch.arange(self.ids.numel(), device=self.ids.device) + shift


class Cache:
    """Latent pages for the MLA layers, state slots for the KDA layers.

    pages[l]: fp32 [n_pages, page_size, kv_lora_rank + qk_rope_head_dim] or None
    states[l]: fp32 [n_slots, H, D, D] or None; tails[l]: fp32 [n_slots, W - 1, 3 H D] or None
    """

    def __init__(self, config: ModelConfig, n_pages: int, page_size: int = 16, n_slots: int = 64, device="cpu") -> None:
        c, w = config, config.short_conv_kernel_size - 1
        self.config, self.n_pages, self.page_size, self.n_slots = config, n_pages, page_size, n_slots
        heads, dim = c.kda_num_heads, c.kda_head_dim

        def zeros(kind: str, mixer: str, *shape: int) -> Tensor | None:
            return torch.zeros(*shape, device=device) if kind == mixer else None

        self.pages = [zeros("mla", m, n_pages, page_size, c.latent_row) for m in c.mixers]
        self.states = [zeros("kda", m, n_slots, heads, dim, dim) for m in c.mixers]
        self.tails = [zeros("kda", m, n_slots, w, 3 * heads * dim) for m in c.mixers]

    def copy_slot(self, src: int, dst: int) -> None:
        for t in (*self.states, *self.tails):
            if t is not None:
                t[dst] = t[src]

    def copy_page(self, src: int, dst: int) -> None:
        for t in self.pages:
            if t is not None:
                t[dst] = t[src]
