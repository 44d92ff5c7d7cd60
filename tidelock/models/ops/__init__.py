"""Model operations: the C kernels on CPUs that can build them, the field's kernels on a GPU, plain PyTorch elsewhere.

A layer calls `ops.kda(...)`; which implementation runs is decided once per call from where the tensor lives.
"""

from __future__ import annotations

from torch import Tensor

from . import gpu, native, reference
from .build import library


def backend(x: Tensor):
    """The module whose functions serve this tensor: `native` (fp32 CPU, kernels built), `gpu` or `reference`."""
    if x.device.type == "cuda":
        return gpu
    return native if x.device.type == "cpu" and x.dtype.is_floating_point and x.itemsize == 4 and library() else reference


def exact() -> bool:
    """Whether results are bitwise independent of batch, chunking and cache (the C kernels are; the plain path is not)."""
    return library() is not None
