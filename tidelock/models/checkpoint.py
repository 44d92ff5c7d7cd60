"""Checkpoints: a directory with `model.safetensors` and `config.json`, written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tidelock.tokens.errors import UserError

from .config import ModelConfig
from .lm import TransformerLM


def save_checkpoint(path: str | Path, model: TransformerLM, extra: dict[str, Any] | None = None) -> Path:
    """Write weights and config to `path`. A crash leaves the old checkpoint or the new one, never a mixture."""
    with atomic_directory(Path(path)) as scratch:
        tensors = {name: t.detach().contiguous() for name, t in model.state_dict().items()}
        save_file(tensors, scratch / "model.safetensors")
        (scratch / "config.json").write_text(json.dumps({"model": model.config.to_dict(), "extra": extra or {}}, indent=1))
    return Path(path)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """A scratch directory that takes the place of `path` when the block ends well, and vanishes when it does not."""
    scratch, old = (path.with_name(f".{path.name}.{os.getpid()}.{kind}") for kind in ("tmp", "old"))
    for leftover in (scratch, old):
        shutil.rmtree(leftover, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
        for file in scratch.iterdir():
            with open(file, "rb") as f:
                os.fsync(f.fileno())
        if path.exists():
            os.rename(path, old)
        os.rename(scratch, path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def read_config(path: str | Path) -> dict[str, Any]:
    """The `config.json` of a checkpoint: {"model": ..., "extra": ...}. Raises UserError naming the file."""
    file = Path(path) / "config.json"
    try:
        data = json.loads(file.read_text())
        data["model"], data["extra"]
        return data
    except FileNotFoundError:
        raise UserError(f"no checkpoint at {path}: {file} does not exist") from None
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError, OSError) as e:
        raise UserError(f"corrupt checkpoint: {file} is not a Tidelock config ({e})") from None


def load_checkpoint(path: str | Path, device: str = "cpu") -> TransformerLM:
    """The model saved at `path`. Raises UserError naming the file, and the tensor where one is missing or misshapen."""
    from .hf.shards import Shards  # here, for `hf` as a whole builds on this module

    config = ModelConfig.from_dict(read_config(path)["model"])
    file = Path(path) / "model.safetensors"
    if not file.exists():
        raise UserError(f"no checkpoint at {path}: {file} does not exist")
    tensors, model = Shards(path), TransformerLM(config, seed=None)
    for name, target in model.state_dict().items():
        if name not in tensors:
            raise UserError(f"corrupt checkpoint: {file} lacks tensor {name!r}")
        found = tensors.read(name)
        if found.shape != target.shape:
            raise UserError(f"corrupt checkpoint: {file}: {name!r} is {list(found.shape)}, the config asks for {list(target.shape)}")
        with torch.no_grad():
            target.copy_(found)
    return model.to(device)
