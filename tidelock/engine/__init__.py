"""The engine: continuous batching over the models' one forward, prefix reuse, sampling, weight swap."""

from .engine import Engine
from .scheduler import Limits

__all__ = ["Engine", "Limits"]
