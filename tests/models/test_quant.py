"""INT4 and MXFP4: the bits, checked by a decoder written from the format's description; the laws; the checkpoints."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shapes import K2_SHAPES, K3, batch, decoded, lively

from tidelock.models import ops, preset, quant
from tidelock.models.hf import convert, load_hf, save_hf
from tidelock.models.hf.shards import Shards
from tidelock.tokens.errors import UserError
from tidelock.train.loop import Recipe, Trainer
from tidelock.train.objectives import cross_entropy
from tidelock.train.packing import Sample, make_pack

FORMATS = ["int4", "mxfp4"]
CODES = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def weights(seed, scale, shape=(5, 96)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def naive(p):
    """Nibble by nibble, in Python."""
    per_word, rows = (8, p.packed.numpy().view(np.uint32)) if p.format == "int4" else (2, p.packed.numpy())
    out = np.zeros(p.shape, dtype=np.float32)
    for r in range(out.shape[0]):
        for i in range(out.shape[1]):
            nibble = int(rows[r, i // per_word]) >> 4 * (i % per_word) & 15
            scale = p.scale[r, i // 32]
            if p.format == "int4":
                out[r, i] = (nibble - 8) * float(scale)
            else:
                out[r, i] = (-1 if nibble & 8 else 1) * CODES[nibble & 7] * 2.0 ** (int(scale) - 127)
    return torch.from_numpy(out)


@pytest.mark.parametrize("format", FORMATS)
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), scale=st.sampled_from([0.0, 1e-38, 1e-6, 0.02, 1.0, 7e3, 1e30]))
def test_bits_are_the_format_s_and_packing_what_was_unpacked_changes_none(format, seed, scale):
    p = quant.pack(weights(seed, scale), format)
    values = quant.unpack(p)
    assert torch.equal(values, naive(p))
    again = quant.pack(values, format)
    assert torch.equal(quant.unpack(again), values)
    if format == "int4" and scale > 1e-3 or format == "mxfp4":
        live = values.unflatten(-1, (-1, 32)).abs().amax(-1) > 0
        assert torch.equal(again.packed, p.packed) and torch.equal(again.scale[live], p.scale[live])


@pytest.mark.parametrize("format,bound", [("int4", 0.5 / 7 * 1.01), ("mxfp4", 1 / 6 + 1e-3)])
def test_error_is_at_most_half_a_step_of_the_group(format, bound):
    w = weights(1, 0.02, (64, 256))
    error = (quant.unpack(quant.pack(w, format)) - w).unflatten(-1, (-1, 32)).abs().amax(-1)
    assert (error <= bound * w.unflatten(-1, (-1, 32)).abs().amax(-1)).all() if format == "int4" else True
    assert (error / w.unflatten(-1, (-1, 32)).abs().amax(-1)).max() < 0.26


def test_mxfp4_rounds_to_nearest_even():
    row = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, -0.25, -2.5, 0.26, 4.9, *[0.0] * 20])
    got = quant.unpack(quant.pack(row[None], "mxfp4"))[0]
    assert got[:12].tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0, 0.0, -2.0, 0.5, 4.0]


@pytest.mark.parametrize("format", FORMATS)
def test_training_sees_the_served_weights_and_a_straight_gradient(format):
    w = weights(2, 0.05).requires_grad_()
    y = quant.fake_quant(w, format)
    assert torch.equal(y, quant.unpack(quant.pack(w.detach(), format)))
    g = torch.randn_like(w)
    y.backward(g)
    assert torch.equal(w.grad, g)


@pytest.mark.parametrize("format,config", [("int4", K2_SHAPES["plain"]), ("mxfp4", K3)], ids=FORMATS)
def test_checkpoints_hold_packed_experts_and_give_the_served_numbers(tmp_path, format, config):
    model = lively(config)
    save_hf(model, tmp_path / "q", quantize=format)
    shards = Shards(tmp_path / "q")
    packed = [n for n in shards.entries if n.endswith("_packed")]
    moe = sum(f == "moe" for f in config.ffns)
    assert len(packed) == 3 * moe * config.n_routed_experts and all(".experts." in n for n in packed)
    again = load_hf(tmp_path / "q")
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values()):
        routed = name.endswith(("w_in", "w_out"))
        wanted = quant.unpack(quant.pack(a.transpose(1, 2), format)).transpose(1, 2) if routed else a
        assert torch.equal(wanted, b), name
    convert(tmp_path / "q", tmp_path / "q2", quantize=format)
    for name in shards.entries:
        assert torch.equal(shards.read(name), Shards(tmp_path / "q2").read(name)), name


def test_bad_input_is_refused_in_one_line():
    with pytest.raises(UserError, match="multiples of 32"):
        quant.pack(torch.zeros(2, 40), "int4")
    with pytest.raises(UserError, match="unknown quantisation 'int3'"):
        quant.pack(torch.zeros(2, 64), "int3")
    with pytest.raises(UserError, match="do not fit"):
        quant.from_tensors("int4", torch.zeros(2, 8, dtype=torch.int32), torch.zeros(2, 3))


@pytest.mark.parametrize("format", FORMATS)
def test_one_switch_trains_what_is_served(format):
    """Training computes with the rounded experts, evaluation with the very same bits; the master weights underneath stay
    unrounded and learn."""
    model, b = lively(K3), batch(40)
    plain = model.logits(model(b)).detach()
    before = model.layers[1].mlp.w_in.detach().clone()
    trainer = Trainer(model, Recipe(lr=0.01, steps=4, warmup=1, expert_format=format))
    sample = Sample(b.ids.tolist(), [0.0] + [1.0] * 39)
    losses = [trainer.step(make_pack([sample]), lambda logp, weights: cross_entropy(logp, weights))["loss"] for _ in range(4)]
    assert losses[-1] < losses[0] and not torch.equal(model.layers[1].mlp.w_in, before)
    assert not torch.equal(quant.served(model.layers[1].mlp.w_in, format, dim=1), model.layers[1].mlp.w_in)
    trained = model.logits(model(b)).detach()
    with torch.no_grad():
        served = model.eval().logits(model(b))
        assert torch.equal(served, trained)
        assert torch.equal(decoded(model, b.ids, [21, 1, 1, 17]), trained) or not ops.exact()
        assert not torch.allclose(served, plain, atol=1e-2)


@pytest.mark.parametrize("format,config", [("int4", K2_SHAPES["plain"]), ("mxfp4", K3)], ids=FORMATS)
def test_a_quantised_checkpoint_says_so_and_serves_the_numbers_it_was_trained_for(tmp_path, format, config):
    model, b = lively(config), batch(20)
    model.set_expert_format(format)
    with torch.no_grad():
        wanted = model.eval().logits(model(b))
        again = load_hf(save_hf(model, tmp_path / "q")).eval()
        assert again.config.expert_format == format
        assert torch.equal(again.logits(again(b)), wanted)
        convert(tmp_path / "q", tmp_path / "ours", to="tidelock")
        convert(tmp_path / "ours", tmp_path / "back")  # packed again, for the shape says so
        for name in Shards(tmp_path / "q").entries:
            assert torch.equal(Shards(tmp_path / "back").read(name), Shards(tmp_path / "q").read(name)), name
        assert not any("_packed" in n for n in Shards(save_hf(model, tmp_path / "plain", quantize="none")).entries)


def test_a_preset_says_how_it_was_published():
    assert (preset("k3").expert_format, preset("k2-thinking").expert_format, preset("k2").expert_format) == ("mxfp4", "int4", None)
    with pytest.raises(UserError, match="multiples of 32"):
        dataclasses.replace(preset("k3"), moe_intermediate_size=3080)
