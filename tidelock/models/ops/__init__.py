"""Model operations: the C kernels on CPUs that can build them, the field's kernels on a GPU, plain PyTorch elsewhere.

A layer calls `ops.backend(x).kda(...)`; which implementation runs is decided per call from what x is: where the tensor
lives, or that it is no tensor yet but a value of a `Program` being recorded.
"""

from __future__ import annotations

from torch import Tensor

from . import gpu, native, reference
from .build import library
from .program import Rows


def backend(x: Tensor | Rows):
    """What serves this value: `native` (fp32 CPU, kernels built), `gpu`, `reference`, or the program x belongs to."""
    if isinstance(x, Rows):
        return x.program
    if x.device.type == "cuda":
        return gpu
    return native if x.device.type == "cpu" and x.dtype.is_floating_point and x.itemsize == 4 and library() else reference


def exact() -> bool:
    """Whether results are bitwise independent of batch, chunking and cache (the C kernels are; the plain path is not)."""
    return library() is not None
