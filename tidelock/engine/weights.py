"""A set of weights the engine can serve, and what must hold before it does.

Everything slow or doubtful about new weights happens here, off the engine's thread: reading, checking, packing and one
trial forward. What is left for the engine is to exchange a reference between two steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tidelock.models import Batch, ModelConfig, TransformerLM, load_checkpoint
from tidelock.models.serving import ServingModel, serving_copy
from tidelock.tokens.errors import UserError
from tidelock.tokens.policy import PolicyError


@dataclass(frozen=True, eq=False)
class Weights:
    """Compared and hashed by identity: two sets of weights never share a cache entry, whatever version they claim."""

    model: TransformerLM | ServingModel
    version: int


def served(model: TransformerLM, packing: str | None) -> TransformerLM | ServingModel:
    """The model as it is served: itself, or a copy packed as `models.serving` says. Raises UserError for an unknown
    packing."""
    return model.eval() if packing is None else serving_copy(model, packing)


def load(checkpoint: str) -> TransformerLM:
    """Raises UserError, whatever went wrong."""
    try:
        return load_checkpoint(checkpoint)
    except (OSError, MemoryError) as e:
        raise UserError(f"cannot read the checkpoint {checkpoint}: {e}") from None


def check(model: TransformerLM, serving: ModelConfig) -> None:
    """Raises PolicyError unless `model` can take the place of a model of the shape `serving`."""
    new = model.config
    if new.vocab_size != serving.vocab_size:
        raise _refused(f"the new weights have another vocabulary ({new.vocab_size} ids, not {serving.vocab_size})")
    if _cache_shape(new) != _cache_shape(serving):
        raise _refused(f"the new weights ({new.name}) need a cache of another shape than the ones served ({serving.name}); "
                       "start an engine of their own")
    for name, p in model.named_parameters():
        if not torch.isfinite(p).all():
            raise _refused(f"the new weights are not all numbers: {name}")


def rehearse(model: TransformerLM | ServingModel) -> None:
    """One small forward, so that nothing is packed or compiled on the engine's thread. Raises PolicyError on NaN."""
    n = min(16, model.config.max_position_embeddings)
    ids = torch.arange(n) % model.config.vocab_size
    batch = Batch(ids, torch.tensor([0, n], dtype=torch.int32), torch.zeros(1, dtype=torch.int32))
    with torch.no_grad():
        logits = model.logits(model(batch))
    if not torch.isfinite(logits).all():
        raise _refused("the new weights give logits that are not numbers")


def _cache_shape(c: ModelConfig) -> tuple:
    return c.mixers, c.latent_row, c.kda_num_heads, c.kda_head_dim, c.short_conv_kernel_size


def _refused(message: str) -> PolicyError:
    return PolicyError(message, status=400, kind="invalid_request_error")
