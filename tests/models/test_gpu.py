"""The GPU path as far as a CPU can tell: which implementation is chosen, and that what it prepares means the same."""

from types import SimpleNamespace

import pytest
import torch

from tidelock.models import Batch, Cache, CacheView, TransformerLM, ops, preset
from tidelock.models.ops import delta, gpu, reference


def test_the_device_and_the_dtype_choose():
    half, single = torch.zeros(1, dtype=torch.bfloat16), torch.zeros(1)
    assert ops.backend(half) is reference and ops.backend(single.double()) is reference
    assert ops.backend(single) is (ops.native if ops.exact() else reference)
    assert ops.backend(torch.zeros(1, device="meta")) is reference
    on_gpu = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32, itemsize=4)
    assert ops.backend(on_gpu) is gpu
    assert gpu.route is reference.route and gpu.kda is not reference.kda


def chunk_kda(q, k, v, g, beta, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False, cu_seqlens=None):
    """flash-linear-attention's contract on a CPU: [1, T, H, ...], one state [H, K, V] per sequence, scale K^-1/2."""
    assert q.shape[0] == 1 and use_qk_l2norm_in_kernel and cu_seqlens.dtype == torch.int64
    assert all(x.is_contiguous() for x in (q, k, v, g, beta)) and g.dtype == torch.float32
    q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q[0], k[0]))
    out, last = [], []
    for s, (a, b) in enumerate(zip(cu_seqlens, cu_seqlens[1:])):
        state = q.new_zeros(q.shape[1], q.shape[2], q.shape[2]) if initial_state is None else initial_state[s]
        o, state = delta.recurrent(q[a:b] * q.shape[-1] ** -0.5, k[a:b], v[0, a:b], g[0, a:b], beta[0, a:b], state)
        out.append(o)
        last.append(state)
    return torch.cat(out)[None], torch.stack(last) if output_final_state else None


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Every operation of a model through `gpu`, with FLA's contract kept by the function above."""
    monkeypatch.setattr(ops, "backend", lambda x: gpu)
    monkeypatch.setattr(gpu, "fla", lambda: SimpleNamespace(chunk_kda=chunk_kda, fused_recurrent_kda=chunk_kda))


def run(name, calls):
    """Logits of calls [(lengths)] on two sequences that go on, in one cache."""
    model, config = TransformerLM(preset(name, 96), seed=3).eval(), preset(name, 96)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2.0)
    cache, at, out = Cache(config, n_pages=20, page_size=8, n_slots=4), [0, 0], []
    for layer in (*cache.states, *cache.tails):
        if layer is not None:
            layer.fill_(7.0)  # left by somebody else
    ids = torch.randint(0, 96, (2, 64), generator=torch.Generator().manual_seed(1))
    view = CacheView(torch.randperm(20, generator=torch.Generator().manual_seed(2), dtype=torch.int32).view(2, 10),
                     torch.tensor([3, 1], dtype=torch.int32))  # fmt: skip
    for lengths in calls:
        rows = torch.cat([ids[s, at[s] : at[s] + n] for s, n in enumerate(lengths)])
        part = Batch(rows, torch.tensor([0, *lengths]).cumsum(0).to(torch.int32), torch.tensor(at, dtype=torch.int32))
        with torch.no_grad():
            out.append(model.logits(model(part, cache, view)))
        at = [a + n for a, n in zip(at, lengths)]
    batch = Batch(ids.flatten(), torch.tensor([0, 64, 128], dtype=torch.int32), torch.zeros(2, dtype=torch.int32))
    model.logits(model(batch)).square().mean().backward()
    out += [p.grad for p in model.parameters() if p.grad is not None]
    return out + [m.max_logit for m in model.modules() if getattr(m, "max_logit", None) is not None]


@pytest.mark.parametrize("name", ["nano-k3", "nano-k2"])
def test_prefill_decode_and_training_mean_the_same(name, as_on_a_gpu, monkeypatch):
    calls = [(9, 1), (1, 1), (2, 17), (1, 1), (1, 1), (3, 4)]
    there = run(name, calls)
    monkeypatch.setattr(ops, "backend", lambda x: reference)
    here = run(name, calls)
    assert len(here) == len(there) > len(calls)
    for a, b in zip(there, here):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-5)


def test_without_the_library_kda_is_the_plain_one(monkeypatch):
    monkeypatch.setenv("TIDELOCK_FLA", "0")
    gpu.fla.cache_clear()
    assert gpu.fla() is None
    monkeypatch.setattr(ops, "backend", lambda x: gpu)
    without = run("nano-k3", [(9, 1), (1, 1)])
    monkeypatch.setattr(ops, "backend", lambda x: reference)
    for a, b in zip(without, run("nano-k3", [(9, 1), (1, 1)])):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-5)
    gpu.fla.cache_clear()


@pytest.mark.parametrize("name", ["nano-k3", "nano-k2"])
@pytest.mark.parametrize("path", [reference, gpu])
def test_half_precision_keeps_its_fp32_islands_and_its_meaning(name, path, monkeypatch):
    monkeypatch.setattr(ops, "backend", lambda x: path)
    model = TransformerLM(preset(name, 96), seed=3).eval()
    ids = torch.randint(0, 96, (100,), generator=torch.Generator().manual_seed(1))
    batch = Batch(ids, torch.tensor([0, 60, 100], dtype=torch.int32), torch.zeros(2, dtype=torch.int32))
    with torch.no_grad():
        exact = model.logits(model(batch))
        model.cast(torch.bfloat16)
        got = model.logits(model(batch))
    dtypes = {n: p.dtype for n, p in model.state_dict().items()}
    for island in ("A_log", "dt_bias", ".conv", "o_norm.weight", "e_score_correction_bias", "mlp.gate.weight"):
        assert all(d == torch.float32 for n, d in dtypes.items() if n.endswith(island)), island
    assert dtypes["layers.0.self_attn.o_proj.weight"] == got.dtype == torch.bfloat16
    assert (got.float() - exact).norm() < 0.1 * exact.norm()  # some token's second expert may be another one
