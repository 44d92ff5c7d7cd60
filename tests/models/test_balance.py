"""Router balancing: the bias evens out the load, never enters the weights, and needs no more than a histogram."""

import pytest
import torch

from tidelock.models import TransformerLM, balance, preset
from tidelock.models.ops import reference


def skewed(tokens=4096, experts=32, seed=0, spread=2.0):
    """Scores of a router that loves a few experts."""
    rng = torch.Generator().manual_seed(seed)
    return torch.sigmoid(torch.randn(tokens, experts, generator=rng) + spread * torch.randn(experts, generator=rng))


def imbalance(scores, bias, k):
    load = torch.bincount((scores + bias).topk(k).indices.flatten(), minlength=scores.shape[1]).float()
    return float(load.max() / load.mean())


@pytest.mark.parametrize("k", [2, 8])
def test_quantile_balancing_evens_out_skewed_scores_within_50_steps(k):
    bias = torch.zeros(32)
    assert imbalance(skewed(), bias, k) > 2
    for step in range(50):
        bias = balance.quantile_bias(skewed(seed=0), bias, k)
    assert imbalance(skewed(), bias, k) < 1.15


@pytest.mark.parametrize("spread", [1.0, 2.0])
@pytest.mark.parametrize("k", [2, 8])
def test_histogram_and_exact_quantile_agree_and_micro_batches_add_up(k, spread):
    scores, bias, apart = skewed(spread=spread), torch.zeros(32), []
    for step in range(50):
        counts = balance.quantile_histogram(scores, bias, k)
        estimated = balance.bias_from_histogram(counts, bias, k)
        if step % 7 == 0:
            assert torch.equal(counts, sum(balance.quantile_histogram(part, bias, k) for part in scores.chunk(7)))
            apart.append(float((balance.quantile_bias(scores, bias, k) - estimated).abs().max()))
        bias = estimated
    assert apart[0] < 0.02 and apart[-1] < 5e-4  # the bins tighten around the quantile
    assert imbalance(scores, bias, k) < 1.15


@pytest.mark.parametrize("k", [2, 8])
def test_uniform_bins_are_the_report_s_and_agree_to_their_width(k):
    scores, bias = skewed(spread=1.0), torch.zeros(32)
    for step in range(20):
        counts = balance.quantile_histogram(scores, bias, k, uniform=True)
        low, width = float(bias.min()) - 1, float(bias.max() - bias.min() + 2) / 1000
        r = balance.thresholds(scores, bias, k)[:, None] - scores
        spelled_out = torch.stack([torch.histc(r[:, j], 1000, low, low + 1000 * width) for j in range(32)])
        assert (counts - spelled_out).abs().sum() < 0.001 * counts.sum()  # a score on an edge may round either way
        exact, estimated = balance.quantile_bias(scores, bias, k), balance.bias_from_histogram(counts, bias, k, uniform=True)
        assert (exact - estimated).abs().max() < 2 * width
        bias = estimated
    assert imbalance(scores, bias, k) < 1.15


def test_quantile_is_the_library_s():
    x = torch.randn(301, 5)
    for q in (0.0, 0.13, 0.5, 0.9, 1.0):
        torch.testing.assert_close(balance.quantile(x, q), torch.quantile(x, q, dim=0))


@pytest.mark.parametrize("method,steps", [("quantile", 50), ("sign", 400)])
def test_a_layer_balances_itself_and_its_bias_never_enters_the_weights(method, steps):
    moe = TransformerLM(preset("nano-k3", 64), seed=0).train().layers[1].mlp
    with torch.no_grad():
        moe.gate.weight[0] += 0.3 * torch.sign(torch.randn(128, generator=torch.Generator().manual_seed(0)))
    x = torch.randn(2000, 128, generator=torch.Generator().manual_seed(1))

    def load():
        moe(x)
        return float(moe.load.max() / moe.load.float().mean())

    before = load()
    for _ in range(steps):
        moe.balance(method, 0.002)
        after = load()
    assert after < (1.15 if method == "quantile" else 1.25) < before
    logits = moe.gate(x)
    idx, p = reference.route(logits, moe.e_score_correction_bias, 2, 1.0)
    s = torch.sigmoid(logits).gather(1, idx)
    torch.testing.assert_close(p, s / s.sum(1, keepdim=True))
