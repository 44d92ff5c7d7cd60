"""Checkpoints between Hugging Face layout and ours, one tensor at a time."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from tidelock.tokens.errors import UserError

from .. import quant
from ..checkpoint import atomic_directory
from ..config import ModelConfig
from ..lm import TransformerLM
from .companions import copy_files, write_companions
from .config import from_hf, layout_of, to_hf
from .gguf import write_gguf
from .gguf_vocab import read_vocabulary
from .names import IGNORED, ISLANDS, Part, parts
from .shards import Planned, Shards, write_shards

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHARD_BYTES = 5 << 30
FP8_BLOCK = 128  # DeepSeek-V3's block of one scale


def load_hf(path: str | Path) -> TransformerLM:
    """The model in a Hugging Face directory, in fp32: plain, FP8-block, INT4 or MXFP4 packed. Raises UserError naming
    the file and the tensor that is missing, misshapen or truncated."""
    source = HFSource(path)
    model = TransformerLM(source.config, seed=None)
    state = model.state_dict()
    for native, group in source.groups():
        source.assemble(group, state[native])
    return model


def save_hf(
    model: TransformerLM, path: str | Path, dtype: str = "float32", quantize: str | None = None,
    max_shard_bytes: int = SHARD_BYTES,
) -> Path:  # fmt: skip
    """Write `model` in the published layout of its shape, whole or not at all. `quantize`: "int4" | "mxfp4" packs the
    routed experts, "none" does not, None does as the shape's expert_format says; `dtype` for the rest, but the fp32
    islands (router bias, decays, convolutions) stay fp32."""
    state = model.state_dict()
    listed = list(parts(model.config))
    tensors = (part.view(state[part.native]) for part in listed)
    return _write_hf(Path(path), model.config, listed, tensors, state, dtype, quantize, max_shard_bytes)


def convert(
    source: str | Path, target: str | Path, to: str = "hf", dtype: str = "float32", quantize: str | None = None,
    max_shard_bytes: int = SHARD_BYTES, on_tensor: Callable[[int, int], None] = lambda done, total: None,
    tokenizer: str | Path | None = None,
) -> Path:  # fmt: skip
    """Rewrite the checkpoint directory `source` (ours or Hugging Face) as `target` in the layout `to` ("hf" |
    "tidelock": a directory, "gguf": a file), holding one expert or one other tensor at a time ("gguf": the experts of one
    layer). `dtype` and `quantize` as in `save_hf`. `on_tensor(done, total)` counts written tensors; `tokenizer` is the
    directory of the tokenizer's files, by default `source` itself or the `tokenizer` of the run directory it lies in."""
    source, target = Path(source), Path(target)
    ours = "model" in _read_json(source / "config.json")
    if ours and to == "tidelock":
        raise UserError(f"{source} is a Tidelock checkpoint already")
    config = read_any_config(source)
    meta, listed = _meta_state(config), list(parts(config))
    tokens = Path(tokenizer) if tokenizer else find_tokenizer(source)

    def beside(scratch: Path) -> None:
        if to == "hf":
            write_companions(scratch, source, tokens, config.name, layout_of(config))
        else:
            copy_files(source, scratch)

    def counted(tensors: Iterator[Tensor]) -> Iterator[Tensor]:
        for i, t in enumerate(tensors, 1):
            yield t
            on_tensor(i, len(listed))

    if to == "hf":
        tensors = _views(Shards(source), listed, meta, source) if ours else HFSource(source).each(meta, listed)
        done = _write_hf(target, config, listed, counted(tensors), meta, dtype, quantize, max_shard_bytes, beside)
    elif to == "tidelock":
        done = _write_ours(target, HFSource(source), meta, on_tensor, len(listed), beside)
    elif to == "gguf":
        if quantize:
            raise UserError("a GGUF file is packed by llama.cpp's own llama-quantize; convert it plain first")
        read = _plain_reader(source, meta) if ours else HFSource(source).reader(meta)
        return write_gguf(target, config, read, read_vocabulary(tokens, config.vocab_size), dtype, on_tensor)
    else:
        raise UserError(f"unknown layout {to!r}; use hf, tidelock or gguf")
    return done


def read_any_config(path: str | Path) -> ModelConfig:
    """The shape of a checkpoint directory, ours or Hugging Face. Raises UserError naming the file and the field."""
    file = Path(path) / "config.json"
    data = _read_json(file)
    try:
        return ModelConfig.from_dict(data["model"]) if "model" in data else from_hf(data, Path(path).name)
    except UserError as e:
        raise UserError(f"{file}: {e}") from None
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise UserError(f"{file} is not a model config we can read ({e!r})") from None


class HFSource:
    """A Hugging Face directory as our tensors."""

    def __init__(self, path: str | Path) -> None:
        self.path, self.config = Path(path), read_any_config(path)
        self.shards = Shards(self.path)
        self.prefix = next((p for p in ("language_model.", "") if f"{p}model.embed_tokens.weight" in self.shards), "")
        self.refuse_strangers()

    def parts(self) -> Iterator[Part]:
        """Published tensors by the names this checkpoint uses, in the order of ours."""
        return parts(self.config, layout_of(self.config), self.prefix)

    def refuse_strangers(self) -> None:
        """A tensor that no part of ours stands for would be dropped in silence: a bias, say, that belongs to the model."""
        known = {p.name for p in self.parts()} | {p.name.replace(".mlp.", ".block_sparse_moe.") for p in self.parts()}
        for name, entry in self.shards.entries.items():
            stem = name
            for suffix in ("_packed", "_scale", "_shape", "_scale_inv"):
                stem = stem.removesuffix(suffix)
            ahead = re.match(r"(?:language_model\.)?model\.layers\.(\d+)\.", name)  # MTP layers that the config does not count
            if stem not in known and not any(x in name for x in IGNORED) and not (ahead and int(ahead[1]) >= self.config.num_layers):
                raise UserError(f"{entry.file}: tensor {name!r} has no place in a model of this config")

    def groups(self) -> Iterator[tuple[str, list[Part]]]:
        """Our tensors in order, each with the published ones that make it up."""
        for native, group in itertools.groupby(self.parts(), key=lambda p: p.native):
            yield native, list(group)

    @torch.no_grad()
    def assemble(self, group: list[Part], into: Tensor) -> None:
        for part in group:
            view = part.view(into)
            view.copy_(self.fetch(part, view.shape))

    def reader(self, meta: dict[str, Tensor]) -> Callable[[str], Tensor]:
        """Our tensors by name."""
        groups = dict(self.groups())

        def read(native: str) -> Tensor:
            t = torch.empty(meta[native].shape)
            self.assemble(groups[native], t)
            return t

        return read

    def each(self, meta: dict[str, Tensor], listed: list[Part]) -> Iterator[Tensor]:
        """The published tensors one by one, in the order of `listed`."""
        for own, part in zip(self.parts(), listed):
            yield self.fetch(own, part.view(meta[part.native]).shape)

    def fetch(self, part: Part, shape: torch.Size) -> Tensor:
        """One published tensor of `shape`, dequantised."""
        name, shards = part.name, self.shards
        if name not in shards and (alias := name.replace(".mlp.", ".block_sparse_moe.")) in shards:
            name = alias  # transformers' Kimi Linear class renames dense layers too when it saves
        if name in shards:
            t = self._fp8(name) if shards.entries[name].dtype == torch.float8_e4m3fn else shards.read(name)
        elif f"{name}_packed" in shards:
            t = quant.unpack(self._packed(name))
        else:
            raise UserError(f"corrupt checkpoint: {self.path} lacks tensor {name!r}")
        if name.endswith("A_log") and t.numel() >= shape.numel():  # padded, or shaped to broadcast
            t = t.flatten()[: shape.numel()].view(shape)
        if t.shape != shape:
            where = shards.entries[name if name in shards else f"{name}_packed"].file
            raise UserError(f"corrupt checkpoint: {where}: {name!r} is {list(t.shape)}, the config asks for {list(shape)}")
        return t

    def _with_scale(self, name: str, scale: str) -> tuple[Tensor, Tensor]:
        if scale not in self.shards:
            raise UserError(f"corrupt checkpoint: {self.path} lacks tensor {scale!r}")
        return self.shards.read(name), self.shards.read(scale)

    def _fp8(self, name: str) -> Tensor:
        w, scale = self._with_scale(name, f"{name}_scale_inv")
        blocks = [-(-n // FP8_BLOCK) for n in w.shape]
        if list(scale.shape) != blocks:
            raise UserError(f"corrupt checkpoint: {self.shards.entries[name].file}: {f'{name}_scale_inv'!r} is {list(scale.shape)}, "
                            f"{list(w.shape)} in blocks of {FP8_BLOCK} needs {blocks}")
        return fp8_blocks(w, scale)

    def _packed(self, name: str) -> quant.Packed:
        packed, scale = self._with_scale(f"{name}_packed", f"{name}_scale")
        try:
            return quant.from_tensors("mxfp4" if packed.dtype == torch.uint8 else "int4", packed, scale)
        except UserError as e:
            raise UserError(f"corrupt checkpoint: {self.shards.entries[f'{name}_packed'].file}: {name!r}: {e}") from None


def fp8_blocks(w: Tensor, scale: Tensor) -> Tensor:
    """DeepSeek-V3's FP8 weights: w [n, k] e4m3 times scale [ceil(n/128), ceil(k/128)] of its block -> fp32."""
    rows, columns = (s.repeat_interleave(FP8_BLOCK)[:n] for s, n in zip(map(torch.arange, scale.shape), w.shape))
    return w.float() * scale.float()[rows][:, columns]


def find_tokenizer(checkpoint: Path) -> Path | None:
    """Where a checkpoint's tokenizer lies: beside its weights, or in the run directory that made it."""
    for directory in (checkpoint, checkpoint.resolve().parent.parent / "tokenizer"):
        if any((directory / name).exists() for name in ("tokenizer.json", "tiktoken.model")):
            return directory
    return None


def _plain_reader(source: Path, meta: dict[str, Tensor]) -> Callable[[str], Tensor]:
    shards = Shards(source)

    def read(native: str) -> Tensor:
        _check(shards, native, meta, source)
        return shards.read(native)

    return read


def _check(shards: Shards, native: str, meta: dict[str, Tensor], source: Path) -> None:
    if native not in shards:
        raise UserError(f"corrupt checkpoint: {source / 'model.safetensors'} lacks tensor {native!r}")
    if (entry := shards.entries[native]).shape != meta[native].shape:
        raise UserError(f"corrupt checkpoint: {entry.file}: {native!r} is {list(entry.shape)}, "
                        f"the config asks for {list(meta[native].shape)}")


def _views(shards: Shards, listed: list[Part], meta: dict[str, Tensor], source: Path) -> Iterator[Tensor]:
    for (native, expert), group in itertools.groupby(listed, key=lambda p: (p.native, p.expert)):
        _check(shards, native, meta, source)
        ours = shards.read(native, expert)
        for part in group:
            yield part.of(ours)


def _nothing(scratch: Path) -> None:
    pass


def _write_hf(path, config, listed, tensors, state, dtype, quantize, max_shard_bytes, beside=_nothing) -> Path:
    if dtype not in DTYPES:
        raise UserError(f"unknown dtype {dtype!r}; use one of {', '.join(DTYPES)}")
    data, quantize = to_hf(config, dtype), quantize or config.expert_format
    if quantize == "none":
        quantize = None
    if quantize:
        data.get("text_config", data)["quantization_config"] = quant.quantization_config(quantize)

    def stored(part: Part, t: Tensor) -> dict[str, Tensor]:
        """What goes to disk for one published tensor; works on meta tensors too, for the plan."""
        if quantize and part.routed:
            return quant.tensors(part.name, quant.pack(t.float(), quantize))
        if part.pad_to > t.numel():
            t = torch.cat([t, t.new_zeros(part.pad_to - t.numel())])
        return {part.name: t.to(torch.float32 if part.name.endswith(ISLANDS) else DTYPES[dtype])}

    plan = [Planned(name, t.dtype, tuple(t.shape)) for part in listed
            for name, t in stored(part, part.view(state[part.native].to("meta"))).items()]  # fmt: skip
    flat = (t for part, tensor in zip(listed, tensors) for t in stored(part, tensor).values())
    with atomic_directory(path) as scratch:
        write_shards(scratch, plan, flat, max_shard_bytes)
        (scratch / "config.json").write_text(json.dumps(data, indent=1))
        beside(scratch)
    return path


def _write_ours(path: Path, source: HFSource, meta: dict[str, Tensor], on_tensor, total: int, beside=_nothing) -> Path:
    groups, done = list(source.groups()), itertools.count(1)
    plan = [Planned(native, torch.float32, tuple(meta[native].shape)) for native, _ in groups]

    def pieces(native: str, group: list[Part]) -> Iterator[Tensor]:
        """The tensor, or one expert after the other."""
        for expert, some in itertools.groupby(group, key=lambda p: p.expert):
            t = torch.empty(meta[native].shape if expert is None else meta[native].shape[1:])
            for part in some:
                view = part.of(t)
                view.copy_(source.fetch(part, view.shape))
                on_tensor(next(done), total)
            yield t

    with atomic_directory(path) as scratch:
        write_shards(scratch, plan, (pieces(*group) for group in groups), 1 << 62)
        (scratch / "config.json").write_text(json.dumps({"model": source.config.to_dict(), "extra": {}}, indent=1))
        beside(scratch)
    return path


def _meta_state(config: ModelConfig) -> dict[str, Tensor]:
    with torch.device("meta"):
        return TransformerLM(config, seed=None).state_dict()


def _read_json(file: Path) -> dict:
    try:
        data = json.loads(file.read_text())
    except FileNotFoundError:
        raise UserError(f"no checkpoint at {file.parent}: {file} does not exist") from None
    except (OSError, ValueError) as e:
        raise UserError(f"corrupt checkpoint: {file} is not JSON ({e})") from None
    if not isinstance(data, dict):
        raise UserError(f"corrupt checkpoint: {file} holds no object")
    return data
