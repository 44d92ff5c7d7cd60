"""Weights as serving keeps them: 32, 16, 8 or 4 bits, in the panels that `c/packed.c` streams through.

Activations and sums stay fp32 whatever the kind, and every sum runs in the order of the inputs, so a product has the
bits of the fp32 product with `unpack(w)`, in any batch.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from tidelock.tokens.errors import UserError

from .. import quant
from .build import library
from .store import Store

PANEL = 32
_L = ctypes.c_long
KINDS = {"fp32": 0, "bf16": 1, "fp16": 2, "int8": 3, "int4": 4, "mxfp4": 5}  # the enum of c/packed.h


class CWeight(ctypes.Structure):
    """`Weight` of c/packed.h."""

    _fields_ = [("kind", ctypes.c_int32), ("panels", ctypes.c_int32), ("n", ctypes.c_int64), ("k", ctypes.c_int64),
                ("w", ctypes.c_void_p), ("scale", ctypes.c_void_p)]  # fmt: skip


@dataclass(frozen=True)
class PackedWeight:
    """`matrices` weights [n, k] (outputs, inputs) of one kind. Sizes of w and scale: see c/packed.h."""

    kind: str
    matrices: int
    n: int
    k: int
    w: Tensor
    scale: Tensor | None

    @cached_property
    def c(self) -> CWeight:
        scale = None if self.scale is None else self.scale.data_ptr()
        return CWeight(KINDS[self.kind], -(-self.n // PANEL), self.n, self.k, self.w.data_ptr(), scale)

    def kept_in(self, store: Store) -> PackedWeight:
        """The same in memory of `store`."""
        return replace(self, w=store.keep(self.w), scale=None if self.scale is None else store.keep(self.scale))

    @property
    def nbytes(self) -> int:
        return self.w.nbytes + (0 if self.scale is None else self.scale.nbytes)


def pack(w: Tensor, kind: str) -> PackedWeight:
    """fp32 w [n, k] or [matrices, n, k]. int8: one scale per output, max|w| / 127; int4 and mxfp4: `quant.pack`'s scheme.

    Raises UserError for an unknown kind, 4 bits with inputs that are no multiple of 32, and weights that fp16 cannot hold.
    """
    known(kind)
    w = w.detach().float()
    w = w if w.dim() == 3 else w[None]
    matrices, n, k = w.shape
    if matrices > 1:  # one at a time stays in the processor's cache
        each = [pack(m, kind) for m in w]
        scale = None if each[0].scale is None else torch.cat([p.scale for p in each])
        return PackedWeight(kind, matrices, n, k, torch.cat([p.w for p in each]), scale)
    scale = None
    if kind == "fp32":
        coded = _panels(w)
    elif kind == "bf16":
        coded = _panels(w.to(torch.bfloat16))
        coded = _pairs(coded)
    elif kind == "fp16":
        coded = _panels(w.half())
        if not coded.isfinite().all():
            raise UserError(f"fp16 cannot hold weights as large as {w.abs().max():.3g}; use bf16")
    elif kind == "int8":
        codes, scale = _int8(w)
        coded, scale = _words(_panels((codes.short() + 128).to(torch.uint8), 4)), _panels(scale)
    else:
        return from_published(quant.pack(w, kind))
    return PackedWeight(kind, matrices, n, k, coded, scale)


def from_published(p: quant.Packed) -> PackedWeight:
    """A 4-bit weight [n, k] or [matrices, n, k] of a checkpoint, its codes laid out anew and never unpacked."""
    p = p if p.packed.dim() == 3 else p[None]
    if p.format == "int4":
        shifts = torch.arange(0, 32, 4, dtype=torch.int32)
        codes, scale = (p.packed[..., None] >> shifts & 15).flatten(-2).to(torch.uint8), p.scale
    else:  # bf16 has fp32's exponents, so it holds UE8M0 exactly
        codes = torch.stack([p.packed & 15, p.packed >> 4], -1).flatten(-2)
        scale = torch.ldexp(torch.ones(p.scale.shape), p.scale.int() - 127).to(torch.bfloat16)
    coded = _panels(codes)
    coded = _words(coded[..., 0::2, :] | coded[..., 1::2, :] << 4)
    scale = _pairs(_panels(scale))
    matrices, n, k = p.shape
    return PackedWeight(p.format, matrices, n, k, coded, scale)


def linear(x: Tensor, p: PackedWeight) -> Tensor:
    """x fp32 [M, k] W^T -> [M, n], straight from the packed weight (its only matrix)."""
    x, out = x.contiguous(), x.new_empty(x.shape[0], p.n)
    library().tl_packed_linear(_L(x.shape[0]), _p(x), _L(p.k), ctypes.byref(p.c), _p(out), _L(p.n))
    return out


def experts_linear(x: Tensor, offsets: Tensor, p: PackedWeight) -> Tensor:
    """x fp32 [rows sorted by expert, k], offsets int64 [matrices + 1] -> [rows, n]. Idle experts are not touched."""
    x, out = x.contiguous(), x.new_empty(x.shape[0], p.n)
    library().tl_packed_grouped_linear(_L(p.matrices), _p(offsets), _p(x), ctypes.byref(p.c), _p(out))
    return out


def known(kind: str) -> None:
    if kind not in KINDS:
        raise UserError(f"unknown weight kind {kind!r}; use {', '.join(KINDS)}")


def unpack(p: PackedWeight) -> Tensor:
    """fp32 [matrices, n, k]: the numbers that products with `p` compute with."""
    out = torch.empty(p.matrices, p.k, p.n)
    for e in range(p.matrices):
        library().tl_unpack(ctypes.byref(p.c), ctypes.c_long(e), ctypes.c_void_p(out[e].data_ptr()))
    return out.transpose(1, 2)


def rounded(w: Tensor, kind: str) -> Tensor:
    """fp32 w [..., n, k] through `kind` and back, without the C library: the same numbers as `unpack(pack(w, kind))`."""
    if kind == "fp32":
        return w.detach().float()
    if kind in ("bf16", "fp16"):
        return w.detach().to(torch.bfloat16 if kind == "bf16" else torch.float16).float()
    if kind == "int8":
        codes, scale = _int8(w.detach().float())
        return codes.float() * scale
    return quant.unpack(quant.pack(w.detach(), kind))


def _p(t: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(t.data_ptr())


def _int8(w: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 [..., n, k] and scales fp32 [..., n, 1], rounded up to 22 bits (why: `decoded` in c/packed.c)."""
    scale = w.abs().amax(-1, keepdim=True) / 127
    scale = ((scale.view(torch.int32) + 3) & ~3).view(torch.float32)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (w / scale).round().to(torch.int8), scale


def _panels(x: Tensor, inputs: int = 1) -> Tensor:
    """[matrices, n, k] -> [matrices, panels, k, 32], zero rows added, and inputs up to a multiple of `inputs`."""
    padded = torch.nn.functional.pad(x, (0, -x.shape[2] % inputs, 0, -x.shape[1] % PANEL))
    return padded.view(x.shape[0], -1, PANEL, padded.shape[2]).transpose(2, 3).contiguous()


def _words(x: Tensor) -> Tensor:
    """Bytes [..., rows, 32] -> int32 words [..., rows / 4, 32], the first row's byte the lowest."""
    return x.unflatten(-2, (-1, 4)).transpose(-1, -2).contiguous().view(torch.int32)[..., 0]


def _pairs(x: Tensor) -> Tensor:
    """bf16 [..., 32] -> int32 [..., 16]: output i in the low half, output i + 16 above it."""
    bits = x.view(torch.int16).int()
    return (bits[..., : PANEL // 2] & 0xFFFF) | (bits[..., PANEL // 2 :] << 16)
