"""safetensors files, read and written a tensor at a time.

The library's writer wants all tensors at once and its reader maps whole files; a terabyte wants neither. The format is
a length, a JSON header and the bytes. Every error names the file and, where there is one, the tensor.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tidelock.tokens.errors import UserError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "I64": torch.int64, "I32": torch.int32, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
INDEX = "model.safetensors.index.json"
MAX_HEADER = 1 << 30


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: dtype, shape and its bytes [begin, end) of the file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class Shards:
    """All tensors of a checkpoint directory by name, opened lazily."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.entries: dict[str, Entry] = {}
        for file in self._files():
            self.entries.update(read_header(file))

    def _files(self) -> list[Path]:
        index = self.directory / INDEX
        if not index.exists():
            files = sorted(self.directory.glob("*.safetensors"))
            if not files:
                raise UserError(f"no checkpoint at {self.directory}: it has no .safetensors file")
            return files
        try:
            names = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError) as e:
            raise UserError(f"corrupt checkpoint: {index} is not an index of shards ({e})") from None
        return [self.directory / n for n in sorted(names)]

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def read(self, name: str, row: int | None = None) -> Tensor:
        """The tensor, or one row of its first dimension."""
        e = self.entries[name]
        shape = e.shape if row is None else e.shape[1:]
        size = (e.end - e.begin) // (1 if row is None else e.shape[0])
        buffer = bytearray(size)
        with open(e.file, "rb") as f:
            f.seek(e.begin + size * (row or 0))
            if f.readinto(buffer) != len(buffer):
                raise UserError(f"corrupt checkpoint: {e.file} is truncated within tensor {name!r}")
        if not buffer:
            return torch.empty(shape, dtype=e.dtype)
        return torch.frombuffer(buffer, dtype=torch.uint8).view(e.dtype).view(shape)


def read_header(file: Path) -> dict[str, Entry]:
    try:
        size = file.stat().st_size
        with open(file, "rb") as f:
            head = f.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else MAX_HEADER + 1
            if length > min(MAX_HEADER, size - 8):
                raise UserError(f"corrupt checkpoint: {file} is truncated or no safetensors file")
            header = json.loads(f.read(length))
    except FileNotFoundError:
        raise UserError(f"corrupt checkpoint: {file} does not exist") from None
    except (OSError, ValueError) as e:
        raise UserError(f"corrupt checkpoint: {file} has no readable header ({e})") from None
    return {name: _entry(file, name, info, 8 + length, size) for name, info in header.items() if name != "__metadata__"}


def _entry(file: Path, name: str, info: dict, base: int, size: int) -> Entry:
    try:
        dtype, shape, (begin, end) = info["dtype"], tuple(info["shape"]), info["data_offsets"]
        expected = torch.Size(shape).numel() * (DTYPES[dtype].itemsize if dtype in DTYPES else 0)
    except (KeyError, TypeError, ValueError) as e:
        raise UserError(f"corrupt checkpoint: {file}: the header of {name!r} is not understood ({e})") from None
    if dtype not in DTYPES:
        raise UserError(f"{file}: tensor {name!r} has dtype {dtype}, which is not supported")
    if end - begin != expected:
        raise UserError(f"corrupt checkpoint: {file}: {name!r} holds {end - begin} bytes, its shape needs {expected}")
    if base + end > size:
        raise UserError(f"corrupt checkpoint: {file} is truncated within tensor {name!r}")
    return Entry(file, DTYPES[dtype], shape, base + begin, base + end)


@dataclass(frozen=True)
class Planned:
    """A tensor to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_shards(directory: Path, plan: list[Planned], tensors: Iterable[Tensor | Iterator[Tensor]], max_bytes: int) -> list[str]:
    """Write `tensors`, which come in the order of `plan`, into files of at most `max_bytes` (one tensor may exceed it).
    A tensor may also come as an iterator over its rows. The caller sees to it that they reach the disk (`atomic_directory`).

    More than one file gets an index. Returns the file names.
    """
    groups: list[list[Planned]] = [[]]
    for p in plan:
        if groups[-1] and sum(x.nbytes for x in groups[-1]) + p.nbytes > max_bytes:
            groups.append([])
        groups[-1].append(p)
    stream, single = iter(tensors), len(groups) == 1
    names = ["model.safetensors" if single else f"model-{i:05}-of-{len(groups):05}.safetensors"
             for i in range(1, len(groups) + 1)]  # fmt: skip
    for name, group in zip(names, groups):
        _write_file(directory / name, group, stream)
    if not single:
        index = {
            "metadata": {"total_size": sum(p.nbytes for p in plan)},
            "weight_map": {p.name: name for name, group in zip(names, groups) for p in group},
        }
        (directory / INDEX).write_text(json.dumps(index, indent=1))
    return names


def _write_file(file: Path, group: list[Planned], stream: Iterator[Tensor | Iterator[Tensor]]) -> None:
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for p in group:
        header[p.name] = {"dtype": NAMES[p.dtype], "shape": list(p.shape), "data_offsets": [at, at + p.nbytes]}
        at += p.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for p in group:
            whole, written = next(stream), 0
            for t in (whole,) if isinstance(whole, Tensor) else whole:
                t = t.detach().to("cpu", p.dtype).contiguous()
                f.write(memoryview(t.flatten().view(torch.uint8).numpy()) if t.numel() else b"")
                written += t.nbytes
            assert written == p.nbytes, (p, written)
