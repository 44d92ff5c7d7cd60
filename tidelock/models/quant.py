"""The 4-bit formats of the published weights: INT4 in groups of 32 (K2 Thinking) and MXFP4 (K3), routed experts only.

One scheme for training (`fake_quant`), checkpoints (`pack`, `tensors`) and serving (`served`, or products straight from the
packed bits where memory counts): the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tidelock.tokens.errors import UserError

GROUP = 32
FORMATS = {"int4": "pack-quantized", "mxfp4": "mxfp4-pack-quantized"}  # names in compressed-tensors
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])  # by nibble: sign, code
MIDPOINTS = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])  # between neighbouring codes


@dataclass(frozen=True)
class Packed:
    """W [..., out, in] in 4 bits. INT4: packed int32 [..., out, in/8], eight nibbles q + 8, the first in the lowest bits;
    scale bf16 [..., out, in/32]. MXFP4: packed uint8 [..., out, in/2], low nibble first; scale uint8 (UE8M0, bias 127)."""

    format: str
    packed: Tensor
    scale: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.packed.shape[:-1], self.packed.shape[-1] * (8 if self.format == "int4" else 2))

    def __getitem__(self, index) -> Packed:
        return Packed(self.format, self.packed[index], self.scale[index])


def pack(w: Tensor, format: str) -> Packed:
    """Quantise fp32 w [..., out, in], in a multiple of 32. Packing what was unpacked gives the same bits."""
    _known(format)
    if w.shape[-1] % GROUP:
        raise UserError(f"{format} needs input widths that are multiples of {GROUP}, got {list(w.shape)}")
    groups = w.float().unflatten(-1, (-1, GROUP))
    return (_pack_int4 if format == "int4" else _pack_mxfp4)(groups)


def _pack_int4(groups: Tensor) -> Packed:
    """q = round(w / s) in -7..7, s = bf16(max|w| / 7), at least 1e-5 (K2 Thinking's recipe)."""
    scale = (groups.abs().amax(-1) / 7).clamp(min=1e-5).to(torch.bfloat16)
    q = (groups / scale.float()[..., None]).round().clamp(-7, 7)
    nibbles = (q.flatten(-2).to(torch.int32) + 8).unflatten(-1, (-1, 8))
    shifts = torch.arange(0, 32, 4, device=q.device, dtype=torch.int32)
    return Packed("int4", (nibbles << shifts).sum(-1, dtype=torch.int64).to(torch.int32), scale)


def _pack_mxfp4(groups: Tensor) -> Packed:
    """Shared exponent floor(log2 max|w|) - 2 (OCP MX v1.0 §6.3), values to the nearest E2M1 code, ties to even, at most 6.
    Zeros are stored as +0."""
    top = groups.abs().amax(-1)
    exponent = (torch.frexp(top).exponent - 3).clamp(-127, 127)  # frexp's mantissa is in [1/2, 1)
    exponent = torch.where(top > 0, exponent, torch.full_like(exponent, -127))
    x = torch.ldexp(groups, -exponent[..., None])
    midpoints = MIDPOINTS.to(x.device)
    size = x.abs().contiguous()
    below, upto = torch.bucketize(size, midpoints), torch.bucketize(size, midpoints, right=True)
    code = torch.where(below % 2 == 0, below, upto)  # they differ on a midpoint only: take the even one
    nibbles = torch.where((x < 0) & (code > 0), code + 8, code).flatten(-2).to(torch.uint8)
    return Packed("mxfp4", nibbles[..., 0::2] | nibbles[..., 1::2] << 4, (exponent + 127).to(torch.uint8))


def unpack(p: Packed) -> Tensor:
    """fp32 [..., out, in]."""
    if p.format == "int4":
        shifts = torch.arange(0, 32, 4, device=p.packed.device, dtype=torch.int32)
        values, scale = ((p.packed[..., None] >> shifts & 15) - 8).flatten(-2).float(), p.scale.float()
    else:
        nibbles = torch.stack([p.packed & 15, p.packed >> 4], -1).flatten(-2)
        values = E2M1.to(p.packed.device)[nibbles.int()]
        scale = torch.ldexp(torch.ones_like(p.scale, dtype=torch.float32), p.scale.int() - 127)
    return (values.unflatten(-1, (-1, GROUP)) * scale[..., None]).flatten(-2)


class _FakeQuant(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w, format):
        return unpack(pack(w, format))

    @staticmethod
    def backward(ctx, dw):
        return dw, None


def fake_quant(w: Tensor, format: str, dim: int = -1) -> Tensor:
    """What serving will compute with, and the gradient as if nothing had been rounded (straight-through; QAT).
    `dim` is the input dimension, along which groups lie."""
    return _FakeQuant.apply(w.transpose(dim, -1), format).transpose(dim, -1).contiguous()


def served(w: Tensor, format: str, dim: int = -1) -> Tensor:
    """The values of `fake_quant` without a gradient, kept on `w` until the optimizer (or a load) changes it."""
    key, entry = (w._version, w.data_ptr(), format, dim), getattr(w, "_served", None)
    if entry is None or entry[0] != key:
        with torch.no_grad():
            entry = w._served = (key, fake_quant(w, format, dim))
    return entry[1]


def tensors(name: str, p: Packed) -> dict[str, Tensor]:
    """The published tensors that stand for weight `name`."""
    found = {f"{name}_packed": p.packed, f"{name}_scale": p.scale}
    if p.format == "int4":
        found[f"{name}_shape"] = torch.tensor(p.shape, dtype=torch.int64, device=p.packed.device)
    return found


def from_tensors(format: str, packed: Tensor, scale: Tensor) -> Packed:
    """The weight that published tensors stand for. Raises UserError when they do not fit each other."""
    _known(format)
    p = Packed(format, packed, scale)
    wanted = torch.int32 if format == "int4" else torch.uint8
    if packed.dtype != wanted or scale.shape != (*p.shape[:-1], p.shape[-1] // GROUP):
        raise UserError(f"{format} weight: packed {packed.dtype} {list(packed.shape)} and scale {list(scale.shape)} do not fit; "
                        f"packed must be {wanted} and scale one per {GROUP} inputs")
    return p


def quantization_config(format: str) -> dict[str, Any]:
    """The entry of config.json: every Linear but what `ignore` names, which leaves the routed experts."""
    _known(format)
    weights = dict(num_bits=4, type="int" if format == "int4" else "float", symmetric=True, strategy="group",
                   group_size=GROUP, dynamic=False, observer="minmax")  # fmt: skip
    ignore = ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*"]
    if format == "mxfp4":
        ignore += ["re:.*routed_expert_(down|up)_proj.*", "re:.*_res_proj.*"]
    return dict(quant_method="compressed-tensors", format=FORMATS[format], quantization_status="compressed", ignore=ignore,
                config_groups=dict(group_0=dict(weights=weights, targets=["Linear"], input_activations=None,
                                                output_activations=None)))  # fmt: skip


def _known(format: str) -> None:
    if format not in FORMATS:
        raise UserError(f"unknown quantisation {format!r}; use int4 or mxfp4")
