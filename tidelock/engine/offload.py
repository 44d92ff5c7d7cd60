"""Where evicted pages and snapshots go: host memory up to a budget, then files up to another, then nowhere.

A blob comes back bit for bit or not at all: a file carries its digest, and one that is missing, short or altered is a
miss. Files belong to the process that wrote them; what a killed process left is swept by the next one.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor

from tidelock.tokens.errors import UserError

from .limits import Limits

DIGEST = 16  # bytes


class Store:
    """Tensors by key, least recently used pushed down a tier first."""

    def __init__(self, limits: Limits) -> None:
        self._host_budget, self._disk_budget = limits.host_bytes, limits.disk_bytes if limits.disk_dir else 0
        self._host: OrderedDict[int, Tensor] = OrderedDict()
        self._disk: OrderedDict[int, tuple[int, torch.Size]] = OrderedDict()
        self._host_bytes = self._disk_bytes = 0
        self._keys = itertools.count(1)
        self._dir = _own_directory(Path(limits.disk_dir)) if self._disk_budget else None

    @property
    def open(self) -> bool:
        return self._host_budget > 0 or self._disk_budget > 0

    def __contains__(self, key: int | None) -> bool:
        return key in self._host or key in self._disk

    def put(self, blob: Tensor) -> int | None:
        """A key for fp32 `blob`, or None when no tier has room for it."""
        if blob.nbytes > max(self._host_budget, self._disk_budget):
            return None
        key = next(self._keys)
        if blob.nbytes > self._host_budget:
            self._to_disk(key, blob)
        else:
            self._host[key], self._host_bytes = blob, self._host_bytes + blob.nbytes
            while self._host_bytes > self._host_budget:
                old, tensor = self._host.popitem(last=False)
                self._host_bytes -= tensor.nbytes
                self._to_disk(old, tensor)
        return key if key in self else None

    def get(self, key: int) -> Tensor | None:
        """The blob, or None: it was pushed out, or its file is not what was written."""
        if key in self._host:
            self._host.move_to_end(key)
            return self._host[key]
        if key in self._disk:
            size, shape = self._disk[key]
            self._disk.move_to_end(key)
            blob = _read(self._file(key), size, shape)
            if blob is None:
                self.drop(key)
            return blob
        return None

    def drop(self, key: int | None) -> None:
        if key in self._host:
            self._host_bytes -= self._host.pop(key).nbytes
        elif key in self._disk:
            self._disk_bytes -= self._disk.pop(key)[0]
            self._file(key).unlink(missing_ok=True)

    def close(self) -> None:
        if self._dir is not None:
            shutil.rmtree(self._dir, ignore_errors=True)

    def _file(self, key: int) -> Path:
        return self._dir / f"{key}.kv"

    def _to_disk(self, key: int, blob: Tensor) -> None:
        """Best effort: a full or failing disk loses the blob, which is then a miss."""
        if blob.nbytes > self._disk_budget:
            return
        while self._disk_bytes + blob.nbytes > self._disk_budget:
            self.drop(next(iter(self._disk)))
        data, scratch = blob.numpy().tobytes(), self._file(key).with_suffix(".tmp")
        try:
            scratch.write_bytes(_digest(data) + data)
            os.replace(scratch, self._file(key))
        except OSError:
            scratch.unlink(missing_ok=True)
            return
        self._disk[key] = (blob.nbytes, blob.shape)
        self._disk_bytes += blob.nbytes


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=DIGEST).digest()


def _read(file: Path, size: int, shape: torch.Size) -> Tensor | None:
    try:
        data = file.read_bytes()
    except OSError:
        return None
    if len(data) != DIGEST + size or _digest(data[DIGEST:]) != data[:DIGEST]:
        return None
    return torch.frombuffer(bytearray(data[DIGEST:]), dtype=torch.float32).view(shape)


_engines = itertools.count()


def _own_directory(base: Path) -> Path:
    """A directory of this process under `base`; those of processes that are gone are removed. Raises UserError."""
    own = base / f"kv-{os.getpid()}-{next(_engines)}"
    shutil.rmtree(own, ignore_errors=True)  # of an earlier process with our number
    try:
        own.mkdir(parents=True)
    except OSError as e:
        raise UserError(f"cannot offload to {base}: {e.strerror}") from None
    for other in base.glob("kv-*-*"):
        pid = other.name.split("-")[1]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists() and Path("/proc/self").exists():
            shutil.rmtree(other, ignore_errors=True)
    return own
