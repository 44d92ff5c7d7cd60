"""The gated delta rule: three forms, one meaning, at every decay."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tidelock.models import Batch
from tidelock.models.ops import delta, library, native, reference

HEADS, DIM = 2, 16
# log-decay per token: almost none, K3's whole range, Kimi Linear's far end, and channels of both kinds side by side
DECAYS = {"none": (-1e-6, 0.0), "gentle": (-0.1, 0.0), "K3 range": (-5.0, 0.0), "at the bound": (-5.0, -4.99),
          "violent": (-80.0, -20.0), "mixed": None}  # fmt: skip


def inputs(tokens, decay, dtype=torch.float32, seed=0):
    rng = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(tokens, HEADS, DIM, generator=rng, dtype=torch.float64) for _ in range(3))
    q, k = (x / x.norm(dim=-1, keepdim=True) for x in (q, k))
    if DECAYS[decay] is None:
        g = -torch.exp(8 * torch.rand(1, HEADS, DIM, generator=rng, dtype=torch.float64) - 6).expand(tokens, -1, -1)
    else:
        low, high = DECAYS[decay]
        g = low + (high - low) * torch.rand(tokens, HEADS, DIM, generator=rng, dtype=torch.float64)
    b = torch.rand(tokens, HEADS, generator=rng, dtype=torch.float64)
    return [x.to(dtype) for x in (q * DIM**-0.5, k, v, g, b, torch.zeros(HEADS, DIM, DIM, dtype=torch.float64))]


def relative(a, b):
    return float((a.double() - b).norm() / b.norm())


@pytest.mark.parametrize("decay", DECAYS)
def test_chunkwise_equals_recurrent_equals_float64_over_4096_tokens(decay):
    wide = inputs(4096, decay, torch.float64)
    o64, s64 = delta.recurrent(*wide)
    single = [x.float() for x in wide]
    for rule in (delta.recurrent, delta.chunkwise):
        o, s = rule(*single)
        assert relative(o, o64) < 1e-4 and relative(s, s64) < 1e-4, rule.__name__
    o, s = delta.chunkwise(*wide)
    assert relative(o, o64) < 1e-10 and relative(s, s64) < 1e-10


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("module", [pytest.param(native, marks=pytest.mark.skipif(library() is None, reason="no compiler")), reference])
def test_the_operation_equals_float64_whole_and_in_arbitrary_splits(module, decay):
    q, k, v, g, b, _ = inputs(1500, decay, torch.float64, seed=3)
    o64, s64 = delta.recurrent(q, k, v, g, b, torch.zeros(HEADS, DIM, DIM, dtype=torch.float64))
    qkv, g32, logit = torch.stack([q, k, v], 1).float(), g.float().contiguous(), torch.logit(b, 1e-9).float()
    for splits in ([1500], [1, 63, 64, 65, 1, 1, 1305], [700, 800]):
        states, out, at = torch.zeros(2, HEADS, DIM, DIM), [], 0
        for n in splits:
            part = Batch(torch.zeros(n, dtype=torch.int64), torch.tensor([0, n], dtype=torch.int32),
                         torch.tensor([at], dtype=torch.int32))
            part.slots = torch.tensor([1], dtype=torch.int32)
            with torch.no_grad():
                out.append(module.kda(*(x[at : at + n].contiguous() for x in (qkv, g32, logit)), part, states))
            at += n
        assert relative(torch.cat(out), o64) < 1e-4 and relative(states[1], s64) < 1e-4, splits


@pytest.mark.parametrize("rule", [delta.recurrent, delta.chunkwise])
@pytest.mark.parametrize("decay", ["gentle", "K3 range", "mixed"])
def test_gradients(rule, decay):
    leaves = [x[:9, :1, :3] if x.dim() == 3 and x.shape[0] == 9 else x[:9, :1] for x in inputs(9, decay, torch.float64)[:5]]
    state = torch.randn(1, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert torch.autograd.gradcheck(rule, [x.clone().requires_grad_() for x in (*leaves, state)])


def test_gradients_across_chunks():
    """Over more than a chunk, both forms have the same gradient."""
    grads = []
    for rule in (delta.recurrent, delta.chunkwise):
        leaves = [x.clone().requires_grad_() for x in inputs(150, "K3 range", torch.float64)]
        o, s = rule(*leaves)
        (o.square().sum() + s.sum()).backward()
        grads.append([x.grad for x in leaves])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("decay", ["K3 range", "violent", "mixed"])
def test_the_published_head_width_holds_the_same_bound(decay, monkeypatch):
    monkeypatch.setitem(globals(), "HEADS", 1)
    monkeypatch.setitem(globals(), "DIM", 128)
    wide = inputs(1024, decay, torch.float64, seed=5)
    o64, s64 = delta.recurrent(*wide)
    for rule in (delta.recurrent, delta.chunkwise):
        o, s = rule(*(x.float() for x in wide))
        assert relative(o, o64) < 1e-4 and relative(s, s64) < 1e-4, rule.__name__


def operation(module, tokens, decay, dtype, seed=11):
    """The whole operation with its normalisation and sigmoid: outputs, and gradients of raw q, k, v, of g and beta."""
    rng = torch.Generator().manual_seed(seed)
    qkv = torch.randn(tokens, 3, HEADS, DIM, generator=rng, dtype=torch.float64)
    beta = torch.randn(tokens, HEADS, generator=rng, dtype=torch.float64)
    leaves = [x.to(dtype).contiguous().requires_grad_() for x in (qkv, inputs(tokens, decay, torch.float64, seed)[3], beta)]
    o = module.kda(*leaves, sequences([tokens]), None)
    (o * torch.linspace(-1, 1, o.numel(), dtype=dtype).view_as(o)).sum().backward()
    return o.detach(), [x.grad for x in leaves]


def sequences(lengths, start=0):
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    batch = Batch(torch.zeros(int(cu[-1]), dtype=torch.int64), cu, torch.full((len(lengths),), start, dtype=torch.int32))
    batch.slots = torch.arange(len(lengths), dtype=torch.int32)
    return batch


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("module", [pytest.param(native, marks=pytest.mark.skipif(library() is None, reason="no compiler")), reference])
def test_gradients_in_fp32_are_those_of_float64_at_every_decay(module, decay):
    o64, g64 = operation(reference, 200, decay, torch.float64)
    o, g = operation(module, 200, decay, torch.float32)
    assert relative(o, o64) < 1e-5
    for mine, wanted in zip(g, g64):
        assert relative(mine, wanted) < 1e-4 or wanted.norm() < 1e-8 * g64[0].norm()


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 90), min_size=1, max_size=6), st.sampled_from(sorted(DECAYS)))
def test_a_state_carried_over_any_split_is_the_state_of_the_whole(splits, decay):
    q, k, v, g, b, state = inputs(sum(splits), decay, torch.float64, seed=len(splits))
    o64, s64 = delta.recurrent(q, k, v, g, b, state)
    for rule in (delta.recurrent, delta.chunkwise):
        out, carried, at = [], state, 0
        for n in splits:
            o, carried = rule(q[at : at + n], k[at : at + n], v[at : at + n], g[at : at + n], b[at : at + n], carried)
            out.append(o)
            at += n
        assert relative(torch.cat(out), o64) < 1e-10 and relative(carried, s64) < 1e-10


@pytest.mark.parametrize("lower", [-5.0, None])
def test_gradients_of_the_whole_layer_s_arithmetic(lower):
    """gradcheck from raw projections to output: convolution, both gates, normalisation, write strength, recurrence."""
    rng = torch.Generator().manual_seed(3)
    raw, z, beta, w, dt, a = (torch.randn(*s, generator=rng, dtype=torch.float64, requires_grad=True)
                              for s in ((6, 12), (6, 4), (6, 2), (12, 4), (4,), (2,)))  # fmt: skip
    batch = sequences([4, 2])

    def layer(raw, z, beta, w, dt, a):
        qkv = reference.short_conv(raw, w, batch, None).view(6, 3, 2, 2)
        return reference.kda(qkv, reference.kda_gate(z, dt, a, lower), beta, batch, None)

    assert torch.autograd.gradcheck(layer, (raw, z, beta, w, dt, a))
