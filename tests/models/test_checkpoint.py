"""Models and checkpoints: every preset builds, saves and comes back; damage is named by file and tensor."""

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from shapes import any_configs, decoded, lively

from tidelock.models import PRESETS, Batch, ModelConfig, TransformerLM, load_checkpoint, preset, save_checkpoint
from tidelock.models.hf import convert
from tidelock.tokens.errors import UserError


def batch_of(*lengths, vocab=64):
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return Batch(torch.arange(int(cu[-1])) % vocab, cu, torch.zeros(len(lengths), dtype=torch.int32))


@pytest.mark.parametrize("name", [n for n in PRESETS if n.startswith("nano-")])
def test_nano_presets_have_half_to_three_million_active_parameters(name):
    _, active = TransformerLM(preset(name, 1024)).parameter_counts()
    assert 0.5e6 <= active <= 3e6


@settings(max_examples=25, deadline=None)
@given(any_configs(), st.sampled_from([None, "int4", "mxfp4"]), st.integers(0, 99))
def test_any_configuration_runs_learns_saves_and_comes_back(tmp_path_factory, config, format, seed):
    config = dataclasses.replace(config, expert_format=format)
    model, b = lively(config, seed), batch_of(7, 3, vocab=96)
    hidden = model(b)
    loss = model.logits(hidden).logsumexp(-1).sum()
    for state in model.mtp_hidden(hidden, b.ids.roll(-1), b):
        loss = loss + model.logits(state).logsumexp(-1).sum()
    loss.backward()
    idle = {n for n, p in model.named_parameters() if p.grad is None}
    assert idle <= {f"layers.0.self_attention_res.{part}.weight" for part in ("norm", "proj")}  # it has one source
    assert all(torch.isfinite(p.grad).all() for n, p in model.named_parameters() if n not in idle)
    again = load_checkpoint(save_checkpoint(tmp_path_factory.mktemp("c") / "m", model)).eval()
    assert again.config == config
    with torch.no_grad():
        whole, cached = model.eval()(b), decoded(again, b.ids[:7], [4, 1, 2])
        assert torch.equal(again(b), whole)
        torch.testing.assert_close(cached, model.logits(whole[:7]), rtol=1e-4, atol=1e-4)


@pytest.fixture
def saved(tmp_path):
    return save_checkpoint(tmp_path / "m", TransformerLM(preset("nano-k3", 64), seed=1), {"note": 1})


def rewrite(path, change):
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def test_saving_again_replaces_whole_and_leaves_nothing_behind(saved):
    other = TransformerLM(preset("nano-k3", 64), seed=2)
    save_checkpoint(saved, other)
    assert torch.equal(load_checkpoint(saved).lm_head.weight, other.lm_head.weight)
    assert sorted(p.name for p in saved.parent.iterdir()) == ["m"]
    assert json.loads((saved / "config.json").read_text())["model"]["name"] == "nano-k3"


def test_a_missing_tensor_and_a_wrong_shape_are_named(saved):
    rewrite(saved, lambda t: t.pop("layers.2.mlp.w_in"))
    with pytest.raises(UserError, match="model.safetensors lacks tensor 'layers.2.mlp.w_in'"):
        load_checkpoint(saved)
    with pytest.raises(UserError, match="model.safetensors lacks tensor 'layers.2.mlp.w_in'"):
        convert(saved, saved.parent / "out")
    rewrite(saved, lambda t: t.update({"layers.2.mlp.w_in": torch.zeros(2, 2)}))
    for read in (load_checkpoint, lambda path: convert(path, path.parent / "out")):
        with pytest.raises(UserError, match=r"model.safetensors: 'layers.2.mlp.w_in' is \[2, 2\]"):
            read(saved)
    assert [p.name for p in saved.parent.iterdir()] == ["m"]


@pytest.mark.parametrize("change,words", [({"mixers": ["mla", "rnn"]}, "ffns"), ({"hidden_size": 100}, "multiples of 8"),
                                          ({"intermediate_size": 50}, "multiples of 8"), ({"qk_rope_head_dim": 9}, "even"),
                                          ({"mixers": ["rnn"] * 4}, "rnn")])  # fmt: skip
def test_impossible_configurations_say_what_is_impossible(change, words):
    with pytest.raises(UserError, match=words):
        ModelConfig.from_dict({**preset("nano-k3", 64).to_dict(), **change})
