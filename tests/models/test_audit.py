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


def test_per_layer_figures_of_k3():
    rows = {r["name"]: r for r in audit(preset("k3"))["components"]}
    assert digits(rows["MLA"]["total"] / 24, 1e6, 1) == 232.2
    assert digits(rows["KDA"]["total"] / 69, 1e6, 1) == 443.7
    assert digits(rows["dense FFN"]["total"], 1e6, 1) == 726.7
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
