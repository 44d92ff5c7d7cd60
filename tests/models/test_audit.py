"""Shapes at full size: the published totals, and the command that prints them."""

import json
from xml.etree import ElementTree

import pytest

from tidelock.cli.main import main
from tidelock.models import PRESETS, TransformerLM, preset, save_checkpoint
from tidelock.models.audit import audit
from tidelock.models.drawing import human


def digits(n, unit, places):
    return round(n / unit, places)


def test_published_totals_to_the_digits_they_are_given_in():
    """The model reference, sections 1.1, 4.4 and 6.1."""
    k2, k3, linear, moonlight = (audit(preset(n)) for n in ("k2", "k3", "kimi-linear-48b", "moonlight-16b"))
    assert digits(k2["total_params"], 1e12, 4) == 1.0264
    assert digits(k2["active_params_without_embedding"], 1e9, 2) == 31.69
    assert digits(k2["active_params"], 1e9, 2) == 32.86
    assert k2["cache_bytes_per_token"] == 70_272 and k2["state_bytes_per_sequence"] == 0
    assert digits(k3["total_params"], 1e12, 4) == 2.7795
    assert digits(k3["active_params_without_embedding"], 1e9, 2) == 104.19
    assert digits(k3["weight_bytes"], 1e9, 0) == 1560  # 1,446 GB of MXFP4 and 113.5 GB of bf16
    assert k3["cache_bytes_per_token"] == 27_648 and digits(k3["state_bytes_per_sequence"], 1e6, 0) == 434
    assert digits(linear["total_params"], 1e9, 1) == 49.1 and digits(linear["active_params_without_embedding"], 1e9, 1) == 3.1
    assert digits(moonlight["total_params"], 1e9, 0) == 16 and digits(moonlight["active_params"], 1e9, 0) == 3
    with_mtp = audit(preset("k2").__class__(**{**preset("k2").__dict__, "num_mtp_layers": 1}))
    assert digits(with_mtp["total_params"] + with_mtp["mtp_params"], 1e12, 4) == pytest.approx(1.0436, abs=2e-4)


RATIOS = {  # model reference, section 10
    "heads": lambda c: c.num_attention_heads * c.v_head_dim / c.hidden_size,
    "KDA heads": lambda c: c.kda_num_heads * c.kda_head_dim / c.hidden_size,
    "expert": lambda c: c.moe_intermediate_size / c.hidden_size,
    "latent": lambda c: (c.routed_expert_hidden_size or 0) / c.hidden_size,
    "dense": lambda c: c.intermediate_size / c.hidden_size,
    "shared": lambda c: c.n_shared_experts * c.moe_intermediate_size / c.hidden_size,
    "query rank": lambda c: (c.q_lora_rank or 0) / c.hidden_size,
    "sparsity": lambda c: c.n_routed_experts / c.num_experts_per_tok,
}


@pytest.mark.parametrize("family", ["k2", "k3"])
def test_small_shapes_keep_the_proportions_of_the_large_and_nano_shapes_those_of_widths(family):
    large, small, nano = (preset(f"{size}{family}") for size in ("", "small-", "nano-"))
    for name, ratio in RATIOS.items():
        assert ratio(small) == pytest.approx(ratio(large), rel=0.05), name
        if name not in ("query rank", "sparsity"):
            assert 0.5 * ratio(large) <= ratio(nano) <= 2 * ratio(large), name
    assert 50e6 <= audit(small)["active_params_without_embedding"] <= 150e6
    if family == "k3":
        for c in (large, small):
            assert 7 <= -(-c.num_layers // c.attn_res_block_size) <= 8
            assert c.mixers.count("kda") / c.num_layers == pytest.approx(0.75, abs=0.06) and c.mixers[-2:] == ("mla", "mla")


def test_every_number_of_the_published_presets():
    """The model reference, sections 1.1, 2, 4.4 and 6.1, in its own words."""
    k2, thinking, linear, k3 = (preset(n) for n in ("k2", "k2-thinking", "kimi-linear-48b", "k3"))
    mla = dict(hidden_size=7168, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
               vocab_size=163840)  # fmt: skip
    yarn = dict(original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=1.0, beta_slow=1.0, beta_fast=1.0)
    for c, factor, eps, length in ((k2, 32, 1e-6, 131072), (thinking, 64, 1e-5, 262144)):
        holds(c, **mla, num_layers=61, intermediate_size=18432, num_attention_heads=64, n_routed_experts=384, num_experts_per_tok=8,
              n_shared_experts=1, moe_intermediate_size=2048, routed_scaling_factor=2.827, hidden_act="silu", rms_norm_eps=eps,
              rope_theta=50000.0, max_position_embeddings=length, num_mtp_layers=0, mla_use_nope=False, attn_res_block_size=None)
        holds(c.rope_scaling, factor=factor, **yarn)
    holds(linear, hidden_size=2304, num_layers=27, num_attention_heads=32, kda_num_heads=32, kda_head_dim=128, intermediate_size=9216,
          moe_intermediate_size=1024, kv_lora_rank=512, q_lora_rank=None, routed_scaling_factor=2.446, vocab_size=163840,
          n_routed_experts=256, num_experts_per_tok=8, n_shared_experts=1, mla_use_nope=True, gate_lower_bound=None, kda_gate_rank=128)
    assert [i for i, m in enumerate(linear.mixers, 1) if m == "mla"] == [4, 8, 12, 16, 20, 24, 27]
    holds(k3, **mla, num_layers=93, intermediate_size=33792, num_attention_heads=96, kda_num_heads=96, kda_head_dim=128,
          short_conv_kernel_size=4, gate_lower_bound=-5.0, kda_gate_rank=None, mla_use_nope=True, mla_use_output_gate=True,
          n_routed_experts=896, num_experts_per_tok=16, n_shared_experts=2, moe_intermediate_size=3072, routed_expert_hidden_size=3584,
          latent_moe_use_norm=True, routed_scaling_factor=1.0, hidden_act="situ", activation_situ_beta=4.0,
          activation_situ_linear_beta=25.0, attn_res_block_size=12, rms_norm_eps=1e-5, initializer_range=0.006,
          max_position_embeddings=1048576, num_mtp_layers=0)  # fmt: skip
    assert [i for i, m in enumerate(k3.mixers, 1) if m == "mla"] == [*range(4, 93, 4), 93]
    assert all(c.ffns == ("dense",) + ("moe",) * (c.num_layers - 1) for c in (k2, thinking, linear, k3))


def holds(thing, **numbers):
    assert {n: getattr(thing, n) for n in numbers} == numbers


def test_per_layer_figures_of_k3():
    rows = {r["name"]: r for r in audit(preset("k3"))["components"]}
    assert digits(rows["MLA"]["total"] / 24, 1e6, 1) == 232.2
    assert digits(rows["KDA"]["total"] / 69, 1e6, 1) == 443.7
    assert digits(rows["dense FFN"]["total"], 1e6, 1) == 726.7
    assert digits(rows["router"]["total"] / 92, 1e6, 2) == 6.42
    assert digits(rows["latent projections"]["total"] / 92, 1e6, 1) == 51.4
    assert digits(rows["shared experts"]["total"] / 92, 1e6, 1) == 132.1
    assert digits(rows["routed experts"]["total"] / rows["routed experts"]["count"], 1e6, 2) == 33.03


@pytest.mark.parametrize("name", ["nano-k2", "nano-k3"])
def test_the_audit_counts_what_a_built_model_has(name):
    total, active = TransformerLM(preset(name)).parameter_counts()
    figures = audit(preset(name))
    assert (figures["total_params"], figures["active_params_without_embedding"]) == (total, active)


def test_longer_context_costs_attention_only():
    near, far = audit(preset("k3"), 1000), audit(preset("k3"), 2000)
    grew = {a["name"] for a, b in zip(near["components"], far["components"]) if a["flops_decode"] != b["flops_decode"]}
    assert grew == {"MLA"}


@pytest.mark.parametrize("name", PRESETS)
def test_every_family_has_a_picture(tmp_path, capsys, name):
    assert main(["models", "show", name, "--svg", str(tmp_path / "a.svg"), "--json", "-"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert {"total_params", "active_params", "active_params_without_embedding", "cache_bytes_per_token",
            "state_bytes_per_sequence", "flops_per_token"} <= printed.keys()  # fmt: skip
    assert set(printed["flops_per_token"]) == {"train", "decode"}
    root, c = ElementTree.parse(tmp_path / "a.svg").getroot(), preset(name)
    titles = [t.text for t in root.findall(".//{*}title")]
    for i, (mixer, ffn) in enumerate(zip(c.mixers, c.ffns), 1):
        assert {f"layer {i}: {mixer.upper()}", f"layer {i}: {'dense FFN' if ffn == 'dense' else 'routed experts'}"} <= set(titles)
    blocks = 0 if c.attn_res_block_size is None else -(-c.num_layers // c.attn_res_block_size)
    assert sum("residual block" in t for t in titles) == blocks
    words = " ".join(t.text for t in root.findall(".//{*}text"))
    assert all(human(r["total"]) in words for r in printed["components"])
    width, height = (float(x) for x in root.get("viewBox").split()[2:])
    for box in root.findall(".//{*}rect"):
        assert float(box.get("x", 0)) + float(box.get("width")) <= width and float(box.get("y", 0)) + float(box.get("height")) <= height


def test_convert_round_trip_from_the_command_line(tmp_path, capsys):
    model = TransformerLM(preset("nano-k3", 64), seed=1)
    save_checkpoint(tmp_path / "m", model)
    assert main(["models", "convert", str(tmp_path / "m"), str(tmp_path / "hf")]) == 0
    assert main(["models", "show", str(tmp_path / "hf")]) == 0
    assert main(["models", "convert", str(tmp_path / "hf"), str(tmp_path / "back"), "--to", "tidelock"]) == 0
    assert (tmp_path / "m" / "model.safetensors").stat().st_size == pytest.approx(
        (tmp_path / "back" / "model.safetensors").stat().st_size, rel=0.01)
    capsys.readouterr()
    assert main(["models", "convert", str(tmp_path / "m"), str(tmp_path / "hf")]) == 2
    assert "exists" in capsys.readouterr().err
    assert main(["models", "show", "k9"]) == 2
    assert "unknown preset 'k9'" in capsys.readouterr().err
