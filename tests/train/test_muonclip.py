"""MuonClip: what an update is, and what QK-Clip leaves behind."""

import pytest
import torch

from tidelock.models import Batch, TransformerLM, preset
from tidelock.train.muonclip import MuonClip, newton_schulz, qk_clip, split_parameters


class Matrices(torch.nn.Module):
    def __init__(self, *shapes, blocks=1):
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        self.ps = torch.nn.ParameterList(torch.randn(*s, generator=rng) for s in shapes)
        for p in self.ps:
            p.muon_blocks = blocks


def step(model, grads, **options):
    optimizer = MuonClip(model, lr=0.1, **options)
    for p, g in zip(model.parameters(), grads):
        p.grad = g.clone()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    return [p.detach() - b for p, b in zip(model.parameters(), before)]


@pytest.mark.parametrize("shape", [(8, 8), (6, 20), (20, 6), (3, 8, 16)])
def test_newton_schulz_brings_every_singular_value_near_one(shape):
    m = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    s = torch.linalg.svdvals(newton_schulz(m if m.dim() == 3 else m[None]))
    assert s.min() > 0.3 and s.max() < 1.3


def test_update_has_the_rms_of_adamw():
    """Moonlight's lemma: an orthogonal update scaled by 0.2 sqrt(max(n, m)) has RMS about 0.2."""
    g = torch.randn(32, 96, generator=torch.Generator().manual_seed(2))
    (delta,) = step(Matrices((32, 96)), [g], weight_decay=0.0)
    assert 0.14 < (delta / 0.1).square().mean().sqrt() < 0.26


def test_heads_and_experts_are_orthogonalised_one_by_one():
    g = torch.randn(24, 16, generator=torch.Generator().manual_seed(3))
    (together,) = step(Matrices((24, 16), blocks=3), [g], weight_decay=0.0)
    apart = step(Matrices((8, 16), (8, 16), (8, 16)), list(g.split(8)), weight_decay=0.0)
    torch.testing.assert_close(together, torch.cat(apart))
    (stacked,) = step(Matrices((3, 8, 16)), [g.view(3, 8, 16)], weight_decay=0.0)
    torch.testing.assert_close(stacked.view(24, 16), together)


def test_matrices_batched_by_shape_update_as_if_alone():
    shapes = [(8, 16), (16, 8), (8, 16), (4, 4)]
    grads = [torch.randn(*s, generator=torch.Generator().manual_seed(i)) for i, s in enumerate(shapes)]
    together = step(Matrices(*shapes), grads)
    for shape, grad, delta, start in zip(shapes, grads, together, Matrices(*shapes).ps):
        alone = Matrices(shape)
        with torch.no_grad():
            alone.ps[0].copy_(start)
        torch.testing.assert_close(step(alone, [grad])[0], delta)


def test_weight_decay_is_decoupled_from_the_gradient():
    model = Matrices((8, 8))
    start = model.ps[0].detach().clone()
    (delta,) = step(model, [torch.zeros(8, 8)], weight_decay=0.5)
    torch.testing.assert_close(delta, -0.1 * 0.5 * start)


def test_adamw_half_is_torchs_adamw():
    model, twin = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    twin.load_state_dict(model.state_dict())
    model.weight.optim = "adamw"
    ours = MuonClip(model, lr=0.1, adamw_scale=0.5, weight_decay=0.1)
    theirs = torch.optim.AdamW(
        [{"params": [twin.weight], "weight_decay": 0.1}, {"params": [twin.bias], "weight_decay": 0.0}],
        lr=0.05, betas=(0.9, 0.95), eps=1e-8,
    )  # fmt: skip
    for i in range(5):
        x = torch.randn(7, 4, generator=torch.Generator().manual_seed(i))
        for m, o in ((model, ours), (twin, theirs)):
            m(x).square().sum().backward()
            o.step()
            o.zero_grad()
    torch.testing.assert_close(model.weight, twin.weight)
    torch.testing.assert_close(model.bias, twin.bias)


def test_embeddings_head_and_vectors_are_not_muons():
    model = TransformerLM(preset("nano-k3", 64))
    muon, adamw = split_parameters(model)
    names = {id(p): n for n, p in model.named_parameters()}
    assert {names[id(p)] for p in adamw} >= {"embed_tokens.weight", "lm_head.weight", "norm.weight"}
    assert all(p.dim() >= 2 for p in muon) and len(muon) + len(adamw) == len(names)
    assert any("mlp.gate.weight" in names[id(p)] for p in muon)  # the router stays on Muon (Moonlight Fig. 4)


@pytest.mark.parametrize("name", ["nano-k2", "nano-k3"])
def test_qk_clip_brings_the_largest_logit_down_to_tau_and_touches_no_calm_head(name):
    model = TransformerLM(preset(name, 64), seed=1)
    with torch.no_grad():
        for layer in model.layers:
            if hasattr(layer.self_attn, "clip_qk"):
                layer.self_attn.q_proj.weight *= 40
    batch = Batch(torch.arange(48) % 64, torch.tensor([0, 48], dtype=torch.int32), torch.zeros(1, dtype=torch.int32))
    attention = [layer.self_attn for layer in model.layers if hasattr(layer.self_attn, "clip_qk")]
    first = attention[0]  # its input does not depend on any clipped weight
    model(batch)
    before, tau = first.max_logit.clone(), float(first.max_logit.median())
    calm = before <= tau
    rows = first.q_proj.weight.detach().view(first.latent.heads, -1, 128).clone()
    assert qk_clip(model, tau) >= int((~calm).sum()) > 0
    model(batch)
    torch.testing.assert_close(first.max_logit, before.clamp(max=tau), rtol=1e-3, atol=1e-3)
    assert torch.equal(rows[calm], first.q_proj.weight.detach().view(first.latent.heads, -1, 128)[calm])
