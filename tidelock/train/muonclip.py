"""MuonClip: Muon for the matrices, AdamW for the rest, QK-Clip after the step.

K2 report, Alg. 1 and "Muon is Scalable for LLM Training" (Moonlight): momentum, Newton-Schulz orthogonalisation,
update scaled by 0.2 sqrt(max(n, m)) to AdamW's update RMS, decoupled weight decay. Per-Head Muon (K3 report §2.5):
a projection's heads are orthogonalised one by one.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def newton_schulz(m: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrices, roughly: singular values land near 1. m [B, n, k], any n and k."""
    a, b, c = COEFFICIENTS
    wide = m.shape[-2] <= m.shape[-1]
    x = m if wide else m.transpose(-1, -2)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.transpose(-1, -2)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.transpose(-1, -2)


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(Muon, AdamW). AdamW takes what says so (`optim = "adamw"`: embeddings, head, convolutions) and every vector."""
    muon, adamw = [], []
    for p in model.parameters():
        (adamw if p.dim() < 2 or getattr(p, "optim", None) == "adamw" else muon).append(p)
    return muon, adamw


def as_blocks(t: Tensor, blocks: int) -> Tensor:
    """The matrices to orthogonalise separately: [experts, n, m] as it is, [n, m] cut into `blocks` row blocks."""
    return t if t.dim() == 3 else t.view(blocks, t.shape[0] // blocks, t.shape[1])


class MuonClip(torch.optim.Optimizer):
    """One learning rate drives both halves: Muon steps by lr, AdamW by lr * adamw_scale (no decay on vectors)."""

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.1,
        adamw_scale: float = 0.3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        muon, adamw = split_parameters(model)
        vectors, matrices = [p for p in adamw if p.dim() < 2], [p for p in adamw if p.dim() >= 2]
        groups = [
            {"params": muon, "kind": "muon", "scale": 1.0, "weight_decay": weight_decay},
            {"params": matrices, "kind": "adamw", "scale": adamw_scale, "weight_decay": weight_decay},
            {"params": vectors, "kind": "adamw", "scale": adamw_scale, "weight_decay": 0.0},
        ]
        defaults = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "betas": betas, "eps": eps}
        super().__init__([g for g in groups if g["params"]], defaults)
        self.set_lr(lr)

    def set_lr(self, lr: float) -> float:
        for group in self.param_groups:
            group["lr"] = lr * group["scale"]
        return lr

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._muon(group, params) if group["kind"] == "muon" else self._adamw(group, params)

    def _muon(self, group: dict, params: list[Tensor]) -> None:
        """M = mu M + G; W = W - lr (0.2 sqrt(max(n, m)) NS(M) + wd W). Equal shapes go through NS in one batch."""
        grads = [p.grad for p in params]
        momenta = [self._buffer(p, "momentum") for p in params]
        torch._foreach_mul_(momenta, group["momentum"])
        torch._foreach_add_(momenta, grads)
        updates = torch._foreach_add(grads, momenta, alpha=group["momentum"]) if group["nesterov"] else momenta

        stacks: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for p, update in zip(params, updates):
            blocks = as_blocks(update, getattr(p, "muon_blocks", 1))
            n, m = blocks.shape[-2:]
            stacks[min(n, m), max(n, m)].append((p, blocks if n <= m else blocks.transpose(-1, -2)))

        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        for (_, longest), members in stacks.items():
            scale = -group["lr"] * 0.2 * longest**0.5
            ortho = newton_schulz(torch.cat([blocks for _, blocks in members]))
            for (p, blocks), o in zip(members, ortho.split([b.shape[0] for _, b in members])):
                target = as_blocks(p, getattr(p, "muon_blocks", 1))
                target.add_(o if target.shape[-2] <= target.shape[-1] else o.transpose(-1, -2), alpha=scale)

    def _adamw(self, group: dict, params: list[Tensor]) -> None:
        (b1, b2), lr = group["betas"], group["lr"]
        grads = [p.grad for p in params]
        first, second = ([self._buffer(p, name) for p in params] for name in ("exp_avg", "exp_avg_sq"))
        t = group["t"] = group.get("t", 0) + 1
        torch._foreach_lerp_(first, grads, 1 - b1)
        torch._foreach_mul_(second, b2)
        torch._foreach_addcmul_(second, grads, grads, 1 - b2)
        denominator = torch._foreach_sqrt(second)
        torch._foreach_div_(denominator, (1 - b2**t) ** 0.5)
        torch._foreach_add_(denominator, group["eps"])
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        torch._foreach_addcdiv_(params, first, denominator, -lr / (1 - b1**t))

    def _buffer(self, p: Tensor, name: str) -> Tensor:
        state = self.state[p]
        if name not in state:
            state[name] = torch.zeros_like(p, memory_format=torch.contiguous_format)
        return state[name]


def qk_clip(model: nn.Module, tau: float) -> int:
    """QK-Clip (K2 report, Alg. 1): every attention module shrinks the heads whose largest logit of the last forward
    passed tau. Returns how many heads were clipped."""
    return sum(m.clip_qk(tau) for m in model.modules() if hasattr(m, "clip_qk"))
