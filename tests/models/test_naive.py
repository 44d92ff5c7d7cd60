"""Kimi Linear and K3 from published files to logits, against `naive`: NumPy in float64, written from the reports alone."""

import dataclasses

import numpy as np
import pytest
import torch
from naive import Naive
from shapes import K3, LINEAR, batch, decoded, lively

from tidelock.models import TransformerLM
from tidelock.models.hf import load_hf, save_hf
from tidelock.models.presets import first_dense, hybrid

DEEP = dataclasses.replace(K3, mixers=hybrid(9, (4, 8, 9)), ffns=first_dense(9), num_experts_per_tok=3)
SHAPES = {
    "Kimi Linear": LINEAR,
    "Kimi Linear, deeper": dataclasses.replace(LINEAR, mixers=hybrid(6, (4, 6)), ffns=first_dense(6), num_experts_per_tok=3),
    "K3": K3,
    "K3, blocks of 4 that end inside": dataclasses.replace(DEEP, attn_res_block_size=4),
    "K3, blocks of 1, no query rank": dataclasses.replace(DEEP, attn_res_block_size=1, q_lora_rank=None),
    "K3, one block": dataclasses.replace(DEEP, attn_res_block_size=12),
    "K3, other constants": dataclasses.replace(
        K3, rms_norm_eps=3e-3, activation_situ_beta=1.5, activation_situ_linear_beta=2.0, routed_scaling_factor=2.5,
        gate_lower_bound=-2.0, latent_moe_use_norm=False, short_conv_kernel_size=3, n_shared_experts=1),
    "K3 without latent experts, plain residuals, low-rank gate": dataclasses.replace(
        K3, attn_res_block_size=None, routed_expert_hidden_size=None, latent_moe_use_norm=False, kda_gate_rank=16),
}  # fmt: skip




@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("weights", ["lively", "initial"])
def test_logits_from_published_files_equal_the_reports_spelled_out(tmp_path, config, weights):
    """In float64 to rounding. In fp32 to 1e-5 as initialised; random gains make nine layers so ill-conditioned that plain
    PyTorch in fp32 is 4e-5 of the largest logit away too."""
    model = lively(config) if weights == "lively" else TransformerLM(config, seed=1)
    naive, b = Naive(save_hf(model, tmp_path / "m")), batch(70)
    wanted = naive(b.ids.tolist())
    # The first sub-layer has one source, the embedding, and some expert may never be chosen.
    idle = {n for n in naive.w if ".layers.0.self_attention_res_" in n or ".experts." in n}
    assert naive.read | idle == naive.w.keys()  # every other tensor of the checkpoint had its part

    def off(logits):
        return np.abs(logits.detach().numpy() - wanted).max() / max(1.0, np.abs(wanted).max())

    ours = load_hf(tmp_path / "m").eval()
    bound = 1e-5 if weights == "initial" else 2e-4
    assert off(decoded(ours, b.ids, [33, 1, 1, 35])) <= bound
    assert off(ours.logits(ours(b))) <= bound
    assert off(ours.double().logits(ours(b))) <= 1e-12


def test_full_attention_residuals_equal_the_report_spelled_out(tmp_path):
    """No published layout holds the full form, so the naive model is told by hand."""
    blocks = dataclasses.replace(DEEP, attn_res_block_size=1)
    source = lively(blocks)
    naive, b = Naive(save_hf(source, tmp_path / "m")), batch(20)
    naive.c["attn_res_block_size"] = 0
    ours = TransformerLM(dataclasses.replace(blocks, attn_res_block_size=0))
    ours.load_state_dict(source.state_dict())
    got = ours.double().logits(ours(b)).detach().numpy()
    assert np.abs(got - naive(b.ids.tolist())).max() <= 1e-10
    assert np.abs(got - source.logits(source(b)).detach().numpy()).max() > 1e-2


@pytest.mark.parametrize("config", [K3, LINEAR], ids=["K3", "Kimi Linear"])
def test_initial_values_are_the_reports(config):
    """K3: N(0, 0.006), A_log 0, AttnRes w 0; Kimi Linear: A_log log U(1, 16); both: dt_bias softplus^-1 of logU[1e-3, 0.1]."""
    config = dataclasses.replace(config, hidden_size=256, vocab_size=4096, kda_num_heads=64, kda_head_dim=64, kda_gate_rank=64
                                 if config.kda_gate_rank else None, initializer_range=0.006)  # fmt: skip
    model = TransformerLM(config, seed=0)
    tensors = {n: p.detach() for n, p in model.named_parameters()}
    assert tensors["embed_tokens.weight"].std() == pytest.approx(0.006, rel=0.01)
    assert tensors["layers.1.mlp.w_in"].std() == pytest.approx(0.006, rel=0.05)
    a = tensors["layers.0.self_attn.A_log"]
    if config.gate_lower_bound is None:
        assert 0 <= a.min() < 1 and 2.5 < a.max() <= np.log(16)
    else:
        assert not a.any() and not tensors["layers.1.mlp_res.proj.weight"].any() and not tensors["output_res.proj.weight"].any()
    dt = torch.nn.functional.softplus(tensors["layers.0.self_attn.dt_bias"])
    assert 1e-3 <= dt.min() < 1.1e-3 and 0.09 < dt.max() <= 0.1 + 1e-6
    assert dt.log().mean() == pytest.approx(np.log(1e-2), abs=0.1)
    assert all(p.eq(1).all() for n, p in tensors.items() if "norm.weight" in n)
    assert not model.layers[1].mlp.e_score_correction_bias.any()
