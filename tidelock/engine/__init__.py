"""The engine: continuous batching over the models' one forward, prefix reuse, sampling, weight swap."""

from .engine import Engine
from .limits import Limits, Stats

__all__ = ["Engine", "Limits", "Stats"]
