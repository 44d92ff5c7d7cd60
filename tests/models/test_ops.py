"""The C kernels against plain PyTorch, and against themselves in other company: same bits or it is a bug."""

import pytest
import torch

from tidelock.models import Batch, Cache, CacheView, TransformerLM, preset
from tidelock.models.ops import library, native, reference

pytestmark = pytest.mark.skipif(library() is None, reason="no C compiler: the plain PyTorch path is the only one")


def packed(lengths, vocab=96, seed=0):
    rng = torch.Generator().manual_seed(seed)
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    ids = torch.randint(0, vocab, (int(cu[-1]),), generator=rng)
    return Batch(ids, cu, torch.zeros(len(lengths), dtype=torch.int32))


def cases():
    rng = torch.Generator().manual_seed(1)
    rand = lambda *s: torch.randn(*s, generator=rng)  # noqa: E731
    seq = packed([5, 40, 1, 33])
    n = seq.ids.numel()
    idx = torch.randint(0, 4, (n, 2), generator=rng)
    yield "linear", lambda m, x, a, b: m.linear(x, a, b), [rand(n, 24), rand(16, 24), rand(5, 24)]
    yield "head_linear", lambda m, x, w: m.head_linear(x, w), [rand(n, 3, 16), rand(3, 16, 24)]
    yield "rms_norm", lambda m, x, w, g: m.rms_norm(x, w, 1e-5, g), [rand(n, 24), rand(24), rand(n, 24)]
    yield "sigmoid_gate", lambda m, x, g: m.sigmoid_gate(x, g), [rand(n, 24), rand(n, 24)]
    yield "swiglu", lambda m, h: m.glu(h, False, 4.0, 25.0), [rand(n, 32)]
    yield "situ", lambda m, h: m.glu(h, True, 4.0, 25.0), [rand(n, 32) * 6]
    yield "route", lambda m, x: m.route(x, torch.linspace(-0.1, 0.1, 12), 3, 1.5)[1], [rand(n, 12)]
    yield "conv", lambda m, x, w: m.short_conv(x, w, seq, None), [rand(n, 16), rand(16, 4)]
    yield "mix", lambda m, w, a, b, c: m.mix([a, b, c], w, 1e-5), [rand(16), rand(n, 16), rand(n, 16), rand(n, 16)]
    for lower in (-5.0, None):
        yield f"kda_gate {lower}", lambda m, z, dt, a, lower=lower: m.kda_gate(z, dt, a, lower), [rand(n, 32) * 4, rand(32), rand(2)]
    yield "kda", lambda m, qkv, g, beta: m.kda(qkv, -g.exp(), beta, seq, None), [rand(n, 3, 2, 16), rand(n, 2, 16), rand(n, 2)]
    yield "mla", lambda m, q, r: m.mla(q, r, 16, seq, None)[0], [rand(n, 3, 24), rand(n, 24)]

    def experts(m, x, w, p):
        xs, offsets, where = m.dispatch(x, idx, 4)
        return m.combine(m.experts_linear(xs, offsets, w), where, p)

    yield "experts", experts, [rand(n, 16), rand(4, 16, 24), rand(n, 2)]


@pytest.mark.parametrize("name,fn,inputs", list(cases()), ids=[c[0] for c in cases()])
def test_kernel_equals_its_equation_forward_and_backward(name, fn, inputs):
    outputs, grads = [], []
    for module in (native, reference):
        leaves = [x.clone().requires_grad_() for x in inputs]
        y = fn(module, *leaves)
        weights = torch.linspace(-1, 1, y.numel()).view_as(y)
        (y * weights).sum().backward()
        outputs.append(y.detach())
        grads.append([x.grad for x in leaves])
    torch.testing.assert_close(outputs[0], outputs[1], rtol=2e-5, atol=2e-5)
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-4)


def test_situ_keeps_its_digits_however_small_the_input():
    """beta tanh(g / beta) is g for small g: relative error, not absolute (K3 Eq. 12)."""
    g = torch.logspace(-6, 1.5, 400).repeat(2).view(2, 400) * torch.tensor([[1.0], [-1.0]])
    h = torch.cat([g, g], dim=-1)
    got, exact = native.glu(h, True, 4.0, 25.0), reference.glu(h.double(), True, 4.0, 25.0)
    assert ((got - exact).abs() / exact.abs()).max() < 2e-6


@pytest.mark.parametrize("name", ["nano-k3", "nano-k2"])
def test_a_token_gets_the_same_bits_in_any_batch_chunk_or_cache(name):
    config = preset(name, 96)
    model = TransformerLM(config, seed=3).eval()
    for p in model.parameters():  # away from the tame initial values
        p.data.mul_(2.0)
    lengths = [70, 9, 33]
    batch = packed(lengths)
    with torch.no_grad():
        together = model.logits(model(batch)).split(lengths)
    trained = model.logits(model(packed(lengths))).detach().split(lengths)
    for s, ids in enumerate(batch.ids.split(lengths)):
        assert torch.equal(together[s], trained[s])
        for chunks in ([len(ids)], [1] * len(ids), [7, 1, 1, len(ids) - 9][: 4 if len(ids) > 9 else 0] or [len(ids)]):
            cache = Cache(config, n_pages=16, page_size=8, n_slots=2)
            view = CacheView(torch.arange(15, -1, -1, dtype=torch.int32)[None], torch.tensor([1], dtype=torch.int32))
            got, at = [], 0
            for size in chunks:
                part = Batch(ids[at : at + size], torch.tensor([0, size], dtype=torch.int32),
                             torch.tensor([at], dtype=torch.int32))
                with torch.no_grad():
                    got.append(model.logits(model(part, cache, view)))
                at += size
            assert torch.equal(torch.cat(got), together[s]), (name, s, chunks[:3])


@pytest.mark.parametrize("name", ["nano-k3", "nano-k2"])
def test_without_a_compiler_the_same_model_gives_the_same_numbers_and_gradients(name, monkeypatch):
    from tidelock.models import ops

    results = []
    for compiled in (True, False):
        if not compiled:
            monkeypatch.setattr(ops, "library", lambda: None)
        model, batch = TransformerLM(preset(name, 96), seed=3), packed([70, 9, 33])
        logits = model.logits(model(batch))
        (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
        results.append((logits.detach(), {n: p.grad for n, p in model.named_parameters()}))
    (a, ga), (b, gb) = results
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for key in (k for k in ga if ga[k] is not None):  # the first sub-layer reads the embedding: its mixer has no gradient
        assert (ga[key] - gb[key]).norm() <= 1e-3 * ga[key].norm() + 1e-6, key
