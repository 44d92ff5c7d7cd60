"""The one training loop: packs in, optimizer steps out, whatever the objective.

Owns the order of things in a step (forward, objective, backward, clip, MuonClip, QK-Clip, router balance) and nothing
about where data comes from or when to stop.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tidelock.models import Batch, MoE, TransformerLM
from tidelock.tokens.policy import Kept, kept_ids

from .muonclip import MuonClip, qk_clip
from .objectives import cross_entropy
from .packing import Pack
from .schedule import warmup_cosine, wsd

Objective = Callable[..., Tensor]


@dataclass(frozen=True)
class Recipe:
    """How to train. `lr` is Muon's peak; embeddings, head and gains use lr * adamw_scale."""

    lr: float
    steps: int
    adamw_scale: float = 1.0
    weight_decay: float = 0.1
    schedule: str = "cosine"  # "cosine" | "wsd" | "constant"
    warmup: int = 10
    floor: float = 0.1  # of the peak, at the end
    decay_fraction: float = 0.3  # wsd: share of the steps that decay
    max_grad_norm: float = 1.0
    qk_clip: float = 100.0
    balance: str = "sign"  # router balancing: "sign" (K2) | "quantile" (K3)
    balance_rate: float = 1e-3  # of "sign"; "quantile" needs none
    mtp_weight: float = 0.1  # of the loss of the MTP layers, where the model has them
    expert_format: str | None = None  # "int4" | "mxfp4": from here on train what 4-bit serving computes (QAT)

    def lr_at(self, step: int) -> float:
        if self.schedule == "constant":
            return self.lr
        if self.schedule == "wsd":
            return wsd(step, self.steps, self.lr, self.warmup, self.decay_fraction, self.floor * self.lr)
        return warmup_cosine(step, self.steps, self.lr, self.warmup, self.floor * self.lr)


def token_logprobs(model: TransformerLM, pack: Pack, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(log p of each target that carries weight [M], its row in the pack [M]). `hidden`: the forward, if done already.

    Rows without weight never reach the head, which at small scale is a third of the model.
    """
    hidden = model(Batch(pack.ids, pack.cu, pack.start)) if hidden is None else hidden
    rows = pack.weights.nonzero()[:, 0]
    kept = None if pack.kept is None else [pack.kept[i] for i in rows.tolist()]
    return head_logprobs(model, hidden[rows], pack.targets[rows], kept), rows


def head_logprobs(model: TransformerLM, hidden: Tensor, targets: Tensor, kept: Sequence[Kept] | None = None) -> Tensor:
    """log p(target) under the shared head, among the ids `kept` says. hidden [M, d], targets [M] -> [M].

    Cut-offs and constraints change what a token was drawn from; replaying the kept sets makes training's ratio one of
    the same distributions ("sampling-mask replay").
    """
    logits = model.logits(hidden)
    if kept is not None and any(k is not None for k in kept):
        left_out = torch.zeros(logits.shape, dtype=torch.bool)
        for row, ids in zip(left_out, kept):
            if ids is not None:
                row.fill_(True)
                row[torch.from_numpy(kept_ids(ids))] = False
        logits = logits.masked_fill(left_out, float("-inf"))
    return torch.log_softmax(logits, dim=-1).gather(1, targets[:, None])[:, 0]


def mtp_loss(model: TransformerLM, pack: Pack, hidden: Tensor) -> Tensor:
    """Mean over the MTP layers of their cross-entropy (DeepSeek-V3 Eq. 24-25), on the targets that carry weight."""
    owner = torch.repeat_interleave(pack.cu[1:] - pack.cu[:-1])
    states = model.mtp_hidden(hidden, pack.targets, Batch(pack.ids, pack.cu, pack.start))
    losses = []
    for depth, state in enumerate(states, 1):
        inside = owner.roll(-depth) == owner
        inside[-depth:] = False
        weights = pack.weights.roll(-depth) * inside
        rows = weights.nonzero()[:, 0]
        logp = head_logprobs(model, state[rows], pack.targets.roll(-depth)[rows])
        losses.append(cross_entropy(logp, weights[rows]))
    return torch.stack(losses).mean()


class Trainer:
    """A model with its optimizer, taking one step at a time."""

    def __init__(self, model: TransformerLM, recipe: Recipe) -> None:
        self.model, self.recipe, self.step_count = model, recipe, 0
        if recipe.expert_format is not None:
            model.set_expert_format(recipe.expert_format)
        self.optimizer = MuonClip(model, lr=recipe.lr, adamw_scale=recipe.adamw_scale, weight_decay=recipe.weight_decay)

    def step(self, pack: Pack, objective: Objective) -> dict[str, float]:
        """One optimizer step on one pack. Extras of the pack are passed to the objective by name, weighted rows only."""
        recipe, model = self.recipe, self.model.train()
        lr = self.optimizer.set_lr(recipe.lr_at(self.step_count))
        hidden = model(Batch(pack.ids, pack.cu, pack.start))
        logp, rows = token_logprobs(model, pack, hidden)
        loss = objective(logp, pack.weights[rows], **{name: t[rows] for name, t in pack.extras.items()})
        ahead = recipe.mtp_weight * mtp_loss(model, pack, hidden) if model.mtp else 0.0
        (loss + ahead).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
        if not torch.isfinite(norm):
            raise FloatingPointError(f"gradient is not finite at step {self.step_count}")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        clipped = qk_clip(model, recipe.qk_clip)
        for module in model.modules():
            if isinstance(module, MoE):
                module.balance(recipe.balance, recipe.balance_rate)
        self.step_count += 1
        return {"loss": loss.item(), "grad_norm": norm.item(), "lr": lr, "tokens": pack.ids.numel(), "clipped": clipped}


def train(
    model: TransformerLM,
    packs: Iterable[Pack],
    recipe: Recipe,
    objective: Objective,
    on_step: Callable[[int, dict[str, float]], None] = lambda step, figures: None,
) -> list[dict[str, float]]:
    """`recipe.steps` steps over `packs`; returns the figures of every step. The model is left in eval mode."""
    trainer, curve, tokens, begun = Trainer(model, recipe), [], 0, time.monotonic()
    for step, pack in zip(range(recipe.steps), packs):
        figures = trainer.step(pack, objective)
        tokens += int(figures["tokens"])
        curve.append({"step": step, "tokens": tokens, "loss": figures["loss"], "wall_s": time.monotonic() - begun})
        on_step(step, figures)
    model.eval()
    return curve
