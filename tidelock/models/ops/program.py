"""A forward recorded once and run as one C call: what serving uses where a step of a few tokens is mostly overhead.

`Program` is a backend like `native`, but of values that are not there yet: a layer's own forward, given `Rows`, writes
down which kernels it calls on which buffers (`c/program.c` has the steps). Weights are packed on the way, in the kind
that `kind_of` says. Nothing about a model is written twice, and the bits are those of the layers on the same numbers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tidelock.tokens.errors import UserError

from ..rope import Rope
from .build import library
from .latent import Latent
from .packed import PackedWeight, pack
from .store import Store

LINE = 16  # floats; every buffer starts on a cache line


class _Step(ctypes.Structure):
    """`Step` of c/program.c."""

    _fields_ = [("rows", ctypes.c_int64), ("seqs", ctypes.c_int64),
                *((n, ctypes.c_void_p) for n in ("ids", "cu", "start", "slots", "table")),
                ("table_width", ctypes.c_int64), ("page_size", ctypes.c_int64),
                *((n, ctypes.c_void_p) for n in ("pages", "states", "tails", "position", "row"))]  # fmt: skip


class _Op(ctypes.Structure):
    """`Op` of c/program.c."""

    _fields_ = [("run", ctypes.c_void_p), ("inputs", ctypes.c_int32 * 4), ("outputs", ctypes.c_int32 * 4),
                ("n", ctypes.c_int32 * 6), ("f", ctypes.c_float * 2), ("p", ctypes.c_void_p * 4)]  # fmt: skip


@dataclass(eq=False)
class Rows:
    """A [N, width] value of a program being recorded; another shape of a row is the same memory."""

    program: Program | None  # while recording
    width: int  # in floats, of one row
    fixed: int = 0  # floats beside the rows
    first: int = -1  # the op that writes it
    last: int = -1  # the op that reads it last
    slot: int = -1
    parts: int = 1  # rows of which this is one after the other: the choices of a token

    @property
    def shape(self) -> tuple[int, int]:
        return -1, self.width

    def view(self, *_) -> Rows:
        return self

    view_as = reshape = view

    def __add__(self, other: Rows) -> Rows:
        return self.program.add(self, other)


@dataclass(frozen=True)
class Layer:
    """Stands for layer `index`'s part of the cache while recording."""

    index: int


class LayerCache:
    """Stands for a `Cache` while recording."""

    def __init__(self, layers: int) -> None:
        self.pages = self.states = self.tails = [Layer(i) for i in range(layers)]


class Program:
    """Records a forward, then runs it. Not to be run by two threads at once: the buffers are its own.

    kind_of(parameter) says how a weight is packed. max_positions: how far the tables of rotary angles reach.
    """

    def __init__(self, kind_of: Callable[[Tensor], str], max_positions: int) -> None:
        self.kind_of, self.max_positions = kind_of, max_positions
        self.nbytes = 0  # of weights
        self.packed: list[PackedWeight] = []
        self._ops: list[_Op] = []
        self._keep: list = []  # what the ops point to
        self._store = Store()
        self._given: list[Rows] = []
        self._values: list[list[Rows | None]] = []  # inputs and outputs of each op, in the order of its fields
        self._mixed: dict[int, list[Rows]] = {}
        self._routes: list[Rows] = []
        self._angles: dict[tuple, tuple[Tensor, Tensor]] = {}
        self._arena = torch.empty(0)

    # -- the operations, as in `reference` ----------------------------------------------------------------------------

    def input(self, width: int) -> Rows:
        """A value that the caller gives to `run`."""
        self._given.append(Rows(self, width))
        return self._given[-1]

    def embed(self, table: Tensor) -> tuple[Tensor, Rows]:
        """The table as it is kept (fp32 or bf16), and its rows at the batch's ids."""
        half = self.kind_of(table) != "fp32"
        kept = (table.detach().to(torch.bfloat16) if half else table.detach().float().clone()).contiguous()
        self.nbytes += kept.nbytes
        return kept, self._emit("embed", [], table.shape[1], n=(table.shape[1], half), p=(kept,))

    def linear(self, x: Rows, *weights: Tensor) -> Rows:
        packed = self._pack(torch.cat([w.detach() for w in weights]), weights[0])
        return self._emit("linear", [x], packed.n, p=(packed,))

    def add(self, a: Rows, b: Rows) -> Rows:
        return self._emit("add", [a, b], a.width, n=(a.width,))

    def concat(self, a: Rows, b: Rows) -> Rows:
        return self._emit("concat", [a, b], a.width + b.width, n=(a.width, b.width))

    def rms_norm(self, x: Rows, w: Tensor, eps: float, gate: Rows | None = None) -> Rows:
        d = w.numel()
        return self._emit("rms_norm", [x, gate], x.width, n=(d, x.width // d), f=(eps,), p=(self._own(w),))

    def sigmoid_gate(self, x: Rows, g: Rows) -> Rows:
        return self._emit("sigmoid_gate", [x, g], x.width, n=(x.width,))

    def glu(self, h: Rows, situ: bool, beta: float, linear_beta: float) -> Rows:
        width = h.width // 2
        out = self._emit("glu", [h], width, n=(width // h.parts, int(situ), h.parts), f=(beta, linear_beta))
        out.parts = h.parts
        return out

    def mix(self, sources: Sequence[Rows], w: Tensor, eps: float) -> Rows:
        out = self._emit("mix", [], sources[0].width, n=(sources[0].width, len(sources)), f=(eps,), p=(self._own(w),))
        self._mixed[len(self._ops) - 1] = list(sources)
        return out

    def route(self, logits: Rows, bias: Tensor, k: int, scale: float) -> tuple[Rows, Rows]:
        idx, p = self._emit("route", [logits], 2 * k, k, n=(logits.width, k), f=(scale,), p=(self._own(bias),))
        self._routes.append(idx)
        return idx, p

    def dispatch(self, x: Rows, idx: Rows, experts: int) -> tuple[Rows, Rows, Rows]:
        k, d = idx.width // 2, x.width
        xs, offsets, where = self._emit("dispatch", [x, idx], k * d, 0, 2 * k, n=(d, k, experts))
        offsets.fixed, xs.parts = 2 * (experts + 1), k
        return xs, offsets, where

    def experts_linear(self, x: Rows, offsets: Rows, w: Tensor) -> Rows:
        packed = self._pack(w.detach().transpose(1, 2), w)
        out = self._emit("experts_linear", [x, offsets], x.parts * packed.n, n=(packed.matrices,), p=(packed,))
        out.parts = x.parts
        return out

    def combine(self, xs: Rows, where: Rows, p: Rows) -> Rows:
        d = xs.width // p.width
        return self._emit("combine", [xs, where, p], d, n=(d, p.width))

    def short_conv(self, x: Rows, w: Tensor, seq, tails: Layer) -> Rows:
        taps = self._own(w.detach().t())
        return self._emit("short_conv", [x], x.width, n=(w.shape[1], x.width, tails.index), p=(taps,))

    def kda_gate(self, z: Rows, dt_bias: Tensor, a_log: Tensor, lower: float | None) -> Rows:
        h = a_log.numel()
        vectors = (self._own(dt_bias), self._own(a_log))
        return self._emit("kda_gate", [z], z.width, n=(h, z.width // h), f=(lower or 0.0,), p=vectors)

    def kda(self, qkv: Rows, g: Rows, beta: Rows, seq, states: Layer) -> Rows:
        h = beta.width
        return self._emit("kda", [qkv, g, beta], g.width, n=(h, g.width // h, states.index))

    def latent_rows(self, kv: Rows, w: Tensor, eps: float, at: Latent, rope: Rope | None, batch) -> Rows:
        tables = (self._own(w), *self._turns(rope))
        return self._emit("latent_rows", [kv], kv.width, n=(at.rank, at.rope), f=(eps,), p=tables)

    def write_pages(self, pages: Layer, rows: Rows, batch) -> None:
        self._emit("write_pages", [rows], n=(rows.width, pages.index))

    def absorb(self, q: Rows, kv_b: Tensor, at: Latent, rope: Rope | None, scale: float, batch) -> Rows:
        packed = self._pack(at.up(kv_b.detach())[0].transpose(1, 2), kv_b)
        return self._emit("absorb", [q], at.heads * (at.rank + at.rope), n=(at.heads, at.nope, at.rope, at.rank),
                          f=(scale,), p=(packed, *self._turns(rope)))  # fmt: skip

    def mla(self, q: Rows, rows: Rows, rank: int, batch, pages: Layer) -> tuple[Rows, None]:
        heads = q.width // rows.width
        return self._emit("mla", [q, rows], heads * rank, n=(heads, rows.width, rank, pages.index)), None

    def expand(self, o: Rows, kv_b: Tensor, at: Latent) -> Rows:
        packed = self._pack(at.up(kv_b.detach())[1], kv_b)
        return self._emit("expand", [o], at.heads * at.value, n=(at.heads, at.rank, at.value), p=(packed,))

    # -- recording ----------------------------------------------------------------------------------------------------

    def _emit(self, name: str, inputs: list[Rows | None], *widths: int, n=(), f=(), p=()):
        op = _Op(run=ctypes.cast(getattr(library(), f"op_{name}"), ctypes.c_void_p).value)
        op.n[: len(n)], op.f[: len(f)] = [int(i) for i in n], list(f)
        for i, thing in enumerate(p):
            self._keep.append(thing)
            if isinstance(thing, PackedWeight):
                op.p[i] = ctypes.addressof(thing.c)
            elif thing is not None:
                op.p[i] = thing.data_ptr()
        outputs = [Rows(self, width) for width in widths]
        self._ops.append(op)
        self._values.append([*inputs, *[None] * (4 - len(inputs)), *outputs])
        return outputs[0] if len(outputs) == 1 else tuple(outputs) or None

    def _own(self, w: Tensor) -> Tensor:
        """A copy of small parameters: training may go on with the originals."""
        kept = w.detach().float().clone().contiguous()
        self.nbytes += kept.nbytes
        return kept

    def _pack(self, w: Tensor, owner: Tensor) -> PackedWeight:
        packed = pack(w, self.kind_of(owner)).kept_in(self._store)
        self.nbytes += packed.nbytes
        self.packed.append(packed)
        return packed

    def _turns(self, rope: Rope | None) -> tuple[Tensor | None, Tensor | None]:
        if rope is None:
            return None, None
        key = (rope.dim, rope.theta, rope.yarn)
        if key not in self._angles:
            self._angles[key] = rope.turns(torch.arange(self.max_positions))
        return self._angles[key]

    def finish(self, out: Rows) -> Program:
        """No more ops; `out` is what `run` returns. Buffers whose last reader is done are used again."""
        self._out = out
        for i, values in enumerate(self._values):
            for value in [*values, *self._mixed.get(i, [])]:
                if value is not None:
                    value.first, value.last = i if value.first < 0 else value.first, i
        for value in (out, *self._routes):
            value.last = len(self._ops)  # to be read when all is done
        slots: list[tuple[int, int]] = []  # width and fixed part of each
        free: dict[tuple[int, int], list[int]] = {}
        given = {id(v) for v in self._given}
        for i, values in enumerate(self._values):
            named = [v for v in values if v is not None]
            for value in named:
                if value.slot < 0 and id(value) not in given:
                    size = (-(-value.width // LINE) * LINE, -(-value.fixed // LINE) * LINE)
                    if not free.get(size):
                        free.setdefault(size, []).append(len(slots))
                        slots.append(size)
                    value.slot = free[size].pop()
            for value in {id(v): v for v in [*named, *self._mixed.get(i, [])]}.values():
                if value.last == i and id(value) not in given:
                    free[-(-value.width // LINE) * LINE, -(-value.fixed // LINE) * LINE].append(value.slot)
        for i, value in enumerate(self._given):
            value.slot = len(slots) + i
        for i, (op, values) in enumerate(zip(self._ops, self._values)):
            op.inputs[:] = [-1 if v is None else v.slot for v in values[:4]]
            op.outputs[: len(values) - 4] = [v.slot for v in values[4:]]
            if i in self._mixed:
                ids = torch.tensor([v.slot for v in self._mixed[i]], dtype=torch.int32)
                self._keep.append(ids)
                op.p[1] = ids.data_ptr()
        starts = np.cumsum([(0, 0), *slots, *[(0, 0)] * len(self._given)], axis=0, dtype=np.int64)
        self._per_row, self._fixed, self._slots = starts[:, 0], starts[:, 1], len(slots)
        self._list = (_Op * len(self._ops))(*self._ops)
        for value in (out, *self._given, *self._routes):  # no circle: weights that are replaced go at once
            value.program = None
        del self._values, self._mixed
        return self

    # -- running ------------------------------------------------------------------------------------------------------

    def run(self, rows: int, batch=None, cache=None, given: Sequence[Tensor] = ()) -> Tensor:
        """fp32 [rows, width] of the recorded output. batch and cache (on the CPU) as for the model; `given`: a contiguous
        fp32 [rows, width] for every `input`."""
        need = int(self._per_row[-1]) * rows + int(self._fixed[-1]) + LINE
        if need > self._arena.numel():
            self._arena = torch.empty(need)
        self._rows, out = rows, torch.empty(rows, self._out.width)
        base = -(-self._arena.data_ptr() // 64) * 64
        where = base + 4 * (self._per_row * rows + self._fixed)
        for i, value in enumerate(given):
            where[self._slots + i] = value.data_ptr()
        where[self._out.slot] = out.data_ptr()
        step = _Step(rows=rows, position=self._scratch(rows), row=self._places.data_ptr() + 8 * rows)
        if batch is not None:
            ids, cu, start = batch.ids.contiguous(), batch.cu.contiguous(), batch.start.contiguous()
            step.seqs, step.ids, step.cu, step.start = batch.n, ids.data_ptr(), cu.data_ptr(), start.data_ptr()
        if cache is not None:
            slots, table = batch.slots.contiguous(), batch.table.contiguous()
            step.slots, step.table = slots.data_ptr(), table.data_ptr()
            step.table_width, step.page_size = table.shape[1], cache.page_size
            step.pages, step.states, step.tails = (ctypes.addressof(a) for a in self._addresses(cache))
        size, limit, buffers = ctypes.c_long(len(self._list)), ctypes.c_long(self.max_positions), where.ctypes.data
        if library().tl_run(ctypes.byref(step), size, self._list, ctypes.c_void_p(buffers), limit):
            raise UserError(f"a sequence is longer than the {self.max_positions} positions of this model")
        return out

    def choices(self) -> list[Tensor]:
        """The experts of every row in the last run, int64 [rows, k], by MoE layer; good until the next run."""
        base = -(-self._arena.data_ptr() // 64) * 16 - self._arena.data_ptr() // 4  # floats skipped to a cache line
        found, rows = [], self._rows
        for idx in self._routes:
            at = base + int(self._per_row[idx.slot]) * rows + int(self._fixed[idx.slot])
            found.append(self._arena[at : at + idx.width * rows].view(torch.int64).view(rows, -1))
        return found

    def _scratch(self, rows: int) -> int:
        if getattr(self, "_places", None) is None or self._places.numel() < 2 * rows:
            self._places = torch.empty(2 * rows, dtype=torch.int64)
        return self._places.data_ptr()

    def _addresses(self, cache) -> tuple[ctypes.Array, ...]:
        """Pointers to every layer's part of the cache, made once per cache."""
        known = getattr(self, "_cache", None)
        if known is None or known[0] is not cache:
            arrays = tuple(
                (ctypes.c_void_p * len(part))(*[None if t is None else t.data_ptr() for t in part])
                for part in (cache.pages, cache.states, cache.tails)
            )
            self._cache = (cache, arrays)
        return self._cache[1]
