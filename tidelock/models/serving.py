"""A model made ready to serve: weights packed in fewer bits, the forward run as one C call per step.

The arithmetic is the training forward's, in fp32, on the packed weights' values. So what is exact stays exact: a token's
logits do not depend on the batch, the chunking, the cache or the threads, and they are those of
`rounded_copy(model, ...)`, bit for bit. Served in fp32 they are the training forward's own.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from tidelock.tokens.errors import UserError

from . import ops
from .batch import Batch, Cache, CacheView
from .lm import TransformerLM
from .ops.packed import PANEL, PackedWeight, known, rounded
from .ops.program import LayerCache, Program

FOUR_BITS = ("int4", "mxfp4")


class ServingModel:
    """Answers like a `TransformerLM` (forward, logits, mtp_step, config, eval), without gradients and with its own copy of
    the weights. One thread at a time. Of several MTP layers it has the first."""

    def __init__(self, model: TransformerLM, weights: str, experts: str) -> None:
        self.config, self.weights, self.experts = model.config, weights, experts
        kinds = {id(p): kind for p, kind in weight_kinds(model, weights, experts)}
        body = Program(lambda p: kinds[id(p)], model.config.max_position_embeddings)
        with torch.no_grad():
            training, _ = model.training, model.eval()
            self._table, embedded = body.embed(model.embed_tokens.weight)
            out = model.hidden(embedded, None, LayerCache(model.config.num_layers))
            self._body = body.finish(out)
            head = Program(lambda p: kinds[id(p)], 1)
            self._head = head.finish(model.lm_head(head.input(model.config.hidden_size)))
            self._guess = self._recorded_guess(model, kinds) if model.mtp else None
            model.train(training)
        self.nbytes = sum(p.nbytes for p in self._programs())
        self._counts = model.parameter_counts()
        self.mtp = self._guess is not None  # whether there is an `mtp_step`

    def __call__(self, batch: Batch, cache: Cache | None = None, view: CacheView | None = None) -> Tensor:
        """Hidden states fp32 [N, d] of the new rows, as `TransformerLM.forward`."""
        if view is not None:
            batch = Batch(batch.ids, batch.cu, batch.start, view)
        return self._body.run(batch.ids.numel(), batch, cache)

    def logits(self, hidden: Tensor) -> Tensor:
        """[M, d] -> [M, V] fp32."""
        return self._head.run(hidden.shape[0], given=[hidden.contiguous()])

    def mtp_step(self, hidden: Tensor, next_ids: Tensor, batch: Batch, cache: Cache) -> Tensor:
        """As `TransformerLM.mtp_step`."""
        return self._guess.run(hidden.shape[0], batch, cache, [hidden.contiguous(), self.embed_tokens(next_ids)])

    def embed_tokens(self, ids: Tensor) -> Tensor:
        """int64 [N] -> fp32 [N, d]."""
        return self._table[ids].float()

    def choices(self) -> list[Tensor | None]:
        """The experts that ran for every row of the last forward, int64 [N, k] by layer (None for a dense one); read them
        before the next forward."""
        found = iter(self._body.choices())
        return [next(found) if kind == "moe" else None for kind in self.config.ffns]

    def packed(self) -> list[PackedWeight]:
        """Every packed weight, in the order of use."""
        return [weight for p in self._programs() for weight in p.packed]

    def _programs(self) -> list[Program]:
        return [p for p in (self._body, self._head, self._guess) if p is not None]

    @staticmethod
    def _recorded_guess(model: TransformerLM, kinds: dict[int, str]) -> Program:
        c, cache = model.config, LayerCache(1)
        guess = Program(lambda p: kinds[id(p)], c.max_position_embeddings)
        mine = (cache.states[0], cache.tails[0]) if c.mixers[-1] == "kda" else cache.pages[0]
        return guess.finish(model.mtp[0](guess.input(c.hidden_size), guess.input(c.hidden_size), None, mine))

    def eval(self) -> ServingModel:
        return self

    def parameter_counts(self) -> tuple[int, int]:
        return self._counts


def serving_copy(
    model: TransformerLM, weights: str = "bf16", experts: str | None = None
) -> ServingModel | TransformerLM:
    """`model` with packed weights: "fp32" | "bf16" | "fp16" | "int8" | "int4" | "mxfp4"; `experts` for the routed
    experts alone (the published recipes are "bf16" with experts "int4" or "mxfp4"; what a model was trained in is the
    default and the only choice). Later changes of `model` do not reach it.

    Memory: the copy's weights (32, 16, 8, 4.5 bits a number; `nbytes`) beside the original's, and while packing a few
    times the largest weight. What stays fp32 or 16 bits in the narrow kinds: see `weight_kind`.
    Exact: equal bits in any batch, chunking, cache state and number of threads; equal to `rounded_copy(model, ...)`,
    and with "fp32" to `model` itself. Without a C compiler the answer is `rounded_copy(model, ...)`: the same numbers,
    no faster.
    Raises UserError for unknown kinds.
    """
    experts = _experts_kind(model, weights, experts)
    if ops.library() is None or next(model.parameters()).device.type != "cpu":
        return rounded_copy(model, weights, experts)
    return ServingModel(model, weights, experts)


@torch.no_grad()
def rounded_copy(model: TransformerLM, weights: str, experts: str | None = None) -> TransformerLM:
    """A plain model whose weights are the values that packed ones stand for: what a `serving_copy` computes with."""
    experts, out = _experts_kind(model, weights, experts), copy.deepcopy(model).eval()
    out.set_expert_format(None)  # what follows rounds them, for once
    for p, kind in weight_kinds(out, weights, experts):
        p.copy_(_rounded(p, kind))
    return out


@torch.no_grad()
def rounded_view(model: TransformerLM, weights: str, experts: str) -> TransformerLM:
    """`rounded_copy` without its memory: the parameters are the model's own, and rounded for as long as the sub-layer that
    has them runs. `model` itself is left alone."""
    out = copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())}).eval()
    out.set_expert_format(None)
    kinds = {id(p): kind for p, kind in weight_kinds(model, weights, experts) if kind != "fp32"}

    def swap_in(module: nn.Module, *_) -> None:
        for m in module.modules():
            m.kept = dict(m._parameters)
            for name, p in m.kept.items():
                if id(p) in kinds:
                    m._parameters[name] = nn.Parameter(_rounded(p, kinds[id(p)]), requires_grad=False)

    def swap_out(module: nn.Module, *_) -> None:
        for m in module.modules():
            m._parameters.update(m.kept)

    for part in (out.embed_tokens, out.lm_head, *(m for layer in out.layers for m in (layer.self_attn, layer.mlp))):
        part.register_forward_pre_hook(swap_in)
        part.register_forward_hook(swap_out, always_call=True)
    return out


def _rounded(p: Tensor, kind: str) -> Tensor:
    if p.dim() < 3:
        return rounded(p, kind)
    out = torch.empty(p.shape)
    for mine, w in zip(out, p):  # experts, stored [inputs, outputs]; one at a time stays in the processor's cache
        mine.copy_(rounded(w.t(), kind).t())
    return out


def _experts_kind(model: TransformerLM, weights: str, experts: str | None) -> str:
    """Experts that were trained in a 4-bit format are served in it."""
    trained = model.config.expert_format
    if trained is None:
        return experts or weights
    if experts not in (None, trained):
        raise UserError(f"the experts of this model are trained in {trained}; they cannot be served in {experts}")
    return trained


def weight_kinds(model: TransformerLM, weights: str, experts: str) -> list[tuple[Tensor, str]]:
    for kind in (weights, experts):
        known(kind)
    return [(p, weight_kind(name, p, weights, experts)) for name, p in model.named_parameters()]


def weight_kind(name: str, p: Tensor, weights: str, experts: str) -> str:
    """How one parameter is kept. Always fp32: norms, convolutions, decays, depth mixers, and the router, whose near ties
    decide between experts. Narrower than 16 bits is for matrices whose inputs are summed over in order: the embedding and
    MLA's kv_b (read across, once per direction) stay bf16. The head, one matrix that decides every token, has 8 bits
    where others have 4; 4 bits need inputs in groups of 32, other matrices stay bf16."""
    if p.dim() < 2 or name.endswith(("mlp.gate.weight", ".conv", "_res.proj.weight")):
        return "fp32"
    kind = experts if name.endswith(("w_in", "w_out")) else weights
    if name.startswith("embed_tokens"):
        return "fp32" if kind == "fp32" else "bf16"
    if name.endswith("kv_b_proj.weight") and kind not in ("fp32", "bf16", "fp16"):
        return "bf16"
    if name.startswith("lm_head") and kind in FOUR_BITS:
        return "int8"
    inputs = p.shape[-2] if p.dim() == 3 else p.shape[-1]
    return "bf16" if kind in FOUR_BITS and inputs % PANEL else kind
