"""Packed weights and the recorded forward: the same bits as the plain model on the same numbers, in any company."""

import ctypes
import dataclasses
import gc
import subprocess
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models.test_ops import packed as batch_of
from tidelock.models import Batch, Cache, CacheView, TransformerLM, ops, preset, quant
from tidelock.models.ops import build, native, packed
from tidelock.models.ops.store import Store
from tidelock.models.rope import Rope
from tidelock.models.serving import rounded_copy, rounded_view, serving_copy
from tidelock.tokens.errors import UserError

pytestmark = pytest.mark.skipif(build.library() is None, reason="no C compiler: weights are served as fp32")
KINDS = list(packed.KINDS)


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from(KINDS), rows=st.integers(1, 70), outputs=st.integers(1, 170), groups=st.integers(1, 5),
       seed=st.integers(0, 99))  # fmt: skip
def test_a_product_with_packed_weights_is_the_fp32_product_with_what_they_stand_for(kind, rows, outputs, groups, seed):
    rng = torch.Generator().manual_seed(seed)
    inputs = 32 * groups if kind in ("int4", "mxfp4") else 7 * groups
    w, x = torch.randn(outputs, inputs, generator=rng) * 0.1, torch.randn(rows, inputs, generator=rng)
    p = packed.pack(w, kind)
    plain = packed.unpack(p)[0].contiguous()
    assert torch.equal(plain, packed.rounded(w, kind))
    together = packed.linear(x, p)
    assert torch.equal(together, native.linear(x, plain))
    assert torch.equal(together, torch.cat([packed.linear(x[i : i + 1], p) for i in range(rows)]))


@pytest.mark.parametrize("kind", ["int4", "mxfp4"])
def test_four_bit_products_are_those_with_the_published_weights_unpacked(kind):
    rng = torch.Generator().manual_seed(0)
    w, x = torch.randn(4, 75, 64, generator=rng), torch.randn(10, 64, generator=rng)
    w[0, 0] = 0
    published = quant.pack(w, kind)
    p, plain, offsets = packed.from_published(published), quant.unpack(published), torch.tensor([0, 3, 3, 10, 10])
    assert torch.equal(packed.unpack(p), plain)
    assert torch.equal(packed.linear(x, packed.from_published(published[1])), native.linear(x, plain[1].contiguous()))
    expected = native.experts_linear(x, offsets, plain.transpose(1, 2).contiguous())
    assert torch.equal(packed.experts_linear(x, offsets, p), expected)


def test_eight_and_sixteen_wide_vectors_give_the_same_bits(tmp_path, monkeypatch):
    """The kernels compiled for AVX2 alone, beside those of this machine."""
    flags = build._cpu_model()
    if "avx512f" not in flags:
        pytest.skip("this machine has one width")
    narrow, sources = tmp_path / "narrow.so", [str(f) for f in build.SOURCES if f.stem in ("packed", "gemm", "team")]
    words = ["gcc", *build.FLAGS, "-O1", "-mno-avx512f", "-shared", *sources, "-o", str(narrow), "-lm"]
    subprocess.run(words, check=True, capture_output=True)
    rng = torch.Generator().manual_seed(0)
    cases = [(torch.randn(rows, 64, generator=rng), packed.pack(torch.randn(75, 64, generator=rng), kind))
             for kind in KINDS for rows in (1, 2, 3, 5, 8, 13, 50)]  # fmt: skip
    wide = [packed.linear(x, p) for x, p in cases]
    monkeypatch.setattr(packed, "library", lambda: ctypes.CDLL(str(narrow)))
    for (x, p), expected in zip(cases, wide):
        assert torch.equal(packed.linear(x, p), expected), (p.kind, x.shape[0])


def model_of(name):
    rng = torch.Generator().manual_seed(5)
    model = TransformerLM(preset(name, 96), seed=3).eval()
    for p in model.parameters():  # away from the tame initial values
        p.data.mul_(2.0)
    for key, bias in model.named_buffers():
        bias.copy_(torch.randn(bias.shape, generator=rng) * 0.1)
    return model


@pytest.mark.parametrize("name", ["nano-k3", "nano-k2"])
def test_served_in_fp32_the_bits_are_those_of_the_training_forward(name):
    model, batch = model_of(name), batch_of([70, 9, 33])
    model.train()
    trained = model.logits(model(batch)).detach()
    served = serving_copy(model, "fp32")
    assert torch.equal(served.logits(served(batch)), trained)
    assert model.training
    model.lm_head.weight.data.zero_()
    assert torch.equal(served.logits(served(batch)), trained)  # training goes on without it


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["nano-k3", "nano-k2"])
def test_served_bits_are_the_rounded_models_in_any_batch_chunk_and_cache(name, kind):
    model = model_of(name)
    served, plain = serving_copy(model, kind), rounded_copy(model, kind)
    lengths = [70, 9, 33]
    batch = batch_of(lengths)
    with torch.no_grad():
        expected = plain.logits(plain(batch)).split(lengths)
    assert torch.equal(torch.cat(expected), served.logits(served(batch)))
    for s, ids in enumerate(batch.ids.split(lengths)):
        for chunks in ([1] * len(ids), [7, 1, 1, len(ids) - 9] if len(ids) > 9 else [len(ids)]):
            cache = Cache(model.config, n_pages=16, page_size=8, n_slots=2)
            view = CacheView(torch.arange(15, -1, -1, dtype=torch.int32)[None], torch.tensor([1], dtype=torch.int32))
            got, at = [], 0
            for size in chunks:
                cu, start = torch.tensor([0, size], dtype=torch.int32), torch.tensor([at], dtype=torch.int32)
                part = Batch(ids[at : at + size], cu, start)
                got.append(served.logits(served(part, cache, view)))
                at += size
            assert torch.equal(torch.cat(got), expected[s]), (s, chunks[:3])


@pytest.mark.parametrize("name", ["nano-k3", "nano-k2"])
def test_decoding_in_a_batch_of_32_or_alone_on_one_thread_or_two_gives_the_same_bits(name):
    model = serving_copy(model_of(name), "bf16")
    ids = torch.randint(0, 96, (32, 24), generator=torch.Generator().manual_seed(2))

    def decode(rows, threads):
        torch.set_num_threads(threads)
        n, out = len(rows), []
        cache = Cache(model.config, n_pages=2 * n, page_size=16, n_slots=n)
        view = CacheView(torch.arange(2 * n, dtype=torch.int32).view(n, 2), torch.arange(n, dtype=torch.int32))
        for first, size in ((0, 20), *((t, 1) for t in range(20, 24))):
            cu = torch.arange(0, n * size + 1, size, dtype=torch.int32)
            part = Batch(ids[rows, first : first + size].flatten(), cu, torch.full((n,), first, dtype=torch.int32))
            out.append(model.logits(model(part, cache, view)).view(n, size, -1))
        return torch.cat(out, 1)

    threads = torch.get_num_threads()
    try:
        together = decode(list(range(32)), 2)
        assert torch.equal(together, decode(list(range(32)), 1))
        for row in (0, 13, 31):
            assert torch.equal(together[row : row + 1], decode([row], 2))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("kinds", [("bf16", "int4"), ("int8", "int8"), ("fp32", "mxfp4")])
@pytest.mark.parametrize("name", ["nano-k3", "nano-k2"])
def test_the_rounded_view_computes_what_the_rounded_copy_does_and_leaves_the_model_alone(name, kinds):
    model, batch = model_of(name), batch_of([20, 5])
    before = {n: p.clone() for n, p in model.named_parameters()}
    view, plain = rounded_view(model, *kinds), rounded_copy(model, *kinds)
    with torch.no_grad():
        assert torch.equal(view.logits(view(batch)), plain.logits(plain(batch)))
        assert not torch.equal(model.logits(model(batch)), plain.logits(plain(batch)))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert all(p is q for p, q in zip(model.parameters(), view.parameters()))  # no memory of its own


@pytest.mark.parametrize("kind", ["fp32", "bf16", "int4"])
@pytest.mark.parametrize("name", ["nano-k3", "nano-k2"])
def test_the_packed_mtp_layer_is_the_rounded_one_step_by_step(name, kind):
    model = TransformerLM(dataclasses.replace(preset(name, 96), num_mtp_layers=1), seed=3).eval()
    served, plain = serving_copy(model, kind), rounded_copy(model, kind)
    c = model.config
    config = dataclasses.replace(c, mixers=c.mixers[-1:], ffns=c.ffns[-1:], num_mtp_layers=0)
    view = CacheView(torch.arange(4, dtype=torch.int32)[None], torch.tensor([1], dtype=torch.int32))
    caches, at = [Cache(config, n_pages=4, page_size=16, n_slots=2) for _ in range(2)], 0
    rng = torch.Generator().manual_seed(0)
    for n in (20, 1, 3, 1, 10):
        hidden, ids = torch.randn(n, model.config.hidden_size, generator=rng), torch.randint(0, 96, (n,), generator=rng)
        batch = Batch(ids, torch.tensor([0, n], dtype=torch.int32), torch.tensor([at], dtype=torch.int32), view)
        with torch.no_grad():
            expected = plain.mtp_step(hidden, ids, batch, caches[0])
        assert torch.equal(served.mtp_step(hidden, ids, batch, caches[1]), expected), at
        at += n
    assert served.mtp and served.nbytes > serving_copy(TransformerLM(preset(name, 96), seed=3), kind).nbytes


def test_weights_lie_on_cache_lines_and_go_with_their_last_user():
    served = serving_copy(model_of("nano-k3"), "int4")
    parts = [t for p in served.packed() for t in (p.w, p.scale) if t is not None]
    assert all(t.data_ptr() % 64 == 0 for t in parts)
    gone = weakref.ref(served.packed()[0])
    assert gone() is not None
    gc.disable()  # nothing that only a collector finds
    try:
        del served, parts
        assert gone() is None
    finally:
        gc.enable()


def test_what_is_stored_is_a_copy_in_pieces_that_grow():
    store = Store()
    given = [torch.randn(n, 5).to(kind) for n, kind in ((3, torch.float32), (300_000, torch.float32), (7, torch.bfloat16))]
    given += [torch.full((1 << 20,), i, dtype=torch.int32) for i in range(3)]
    kept = [store.keep(t) for t in given]
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(given, kept))
    given[0].zero_()
    assert kept[0].any()
    ends = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in kept)
    assert all(a[1] <= b[0] for a, b in zip(ends, ends[1:]))


def test_routed_experts_alone_can_be_narrow():
    model, batch = model_of("nano-k3"), batch_of([20, 5])
    served, plain = serving_copy(model, "bf16", experts="int4"), rounded_copy(model, "bf16", experts="int4")
    with torch.no_grad():
        assert torch.equal(served(batch), plain(batch))
    assert served.nbytes < serving_copy(model, "bf16").nbytes


def test_experts_trained_in_four_bits_are_served_in_them_and_their_choices_can_be_read():
    model, batch = model_of("nano-k3"), batch_of([20, 5])
    model.set_expert_format("mxfp4")
    served = serving_copy(model, "fp32")
    assert torch.equal(served(batch), model(batch).detach())  # QAT's own bits
    moe = model.layers[-1].mlp
    rows = []
    moe.register_forward_hook(lambda module, inputs, _: rows.append(inputs[0]))
    model(batch)
    scores = torch.sigmoid(moe.gate(rows[0])) + moe.e_score_correction_bias
    assert torch.equal(served.choices()[-1].sort(-1).values, scores.topk(moe.k, -1).indices.sort(-1).values)
    assert served.choices()[0] is None  # a dense layer
    with pytest.raises(UserError, match="mxfp4"):
        serving_copy(model, "bf16", experts="int8")


def test_rotary_angles_of_a_position_do_not_depend_on_its_company():
    rope = Rope(16, 10000.0, None)
    cos, sin = rope.turns(torch.arange(5000))
    for positions in (torch.arange(17, 4000, 7), torch.tensor([4999]), torch.arange(3)):
        for table, few in zip((cos, sin), rope.turns(positions)):
            assert torch.equal(table[positions], few)


def test_what_cannot_be_served_is_refused_by_name():
    model = model_of("nano-k2")
    with pytest.raises(UserError, match="int3"):
        serving_copy(model, "int3")
    served = serving_copy(model)
    limit = model.config.max_position_embeddings
    with pytest.raises(UserError, match=str(limit)):
        served(Batch(torch.tensor([1]), torch.tensor([0, 1], dtype=torch.int32), torch.tensor([limit], dtype=torch.int32)))
    model.lm_head.weight.data[0, 0] = 1e6
    with pytest.raises(UserError, match="fp16"):
        serving_copy(model, "fp16")


def test_without_a_compiler_the_copy_is_the_rounded_model(monkeypatch):
    monkeypatch.setattr(ops, "library", lambda: None)
    model = model_of("nano-k2")
    served = serving_copy(model, "int8")
    expected = packed.rounded(model.lm_head.weight, "int8")
    assert isinstance(served, TransformerLM) and torch.equal(served.lm_head.weight, expected)
