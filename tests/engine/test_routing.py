"""The experts that ran, told by the engine, are those the router's own equation chooses for the same ids."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tidelock.engine.routing import Routing, noted, routing_for
from tidelock.models import Batch, MoE, TransformerLM, ops, preset
from tidelock.models.serving import serving_copy

MODEL = TransformerLM(preset("nano-k3", 64), seed=0).eval()


def batch(*lengths, seed=0):
    ids = torch.randint(0, 64, (sum(lengths),), generator=torch.Generator().manual_seed(seed))
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return Batch(ids, cu, torch.zeros(len(lengths), dtype=torch.int32))


def by_hand(b):
    """[N, layers, k] from the gate's logits: top k of score + bias."""
    seen = {}

    def hook(index, moe):
        def look(module, inputs):
            scores = moe.gate(inputs[0]).sigmoid() + moe.e_score_correction_bias
            seen[index] = scores.topk(moe.k, dim=-1).indices
        return moe.register_forward_pre_hook(look)

    hooks = [hook(i, layer.mlp) for i, layer in enumerate(MODEL.layers) if isinstance(layer.mlp, MoE)]
    with torch.no_grad():
        MODEL(b)
    for h in hooks:
        h.remove()
    return seen


def test_every_row_of_a_packed_forward_goes_to_its_request():
    b, first, second = batch(5, 7), routing_for(0, MODEL), routing_for(2, MODEL)
    with torch.no_grad(), noted(MODEL, [(first, 0, 5), (second, 0, 7)]):
        MODEL(b)
    assert first.upto(5).shape == (5, MODEL.config.num_layers, 2) and first.upto(5).dtype == np.uint8
    assert second.upto(7).shape[0] == 5
    for layer, idx in by_hand(b).items():
        assert np.array_equal(np.sort(first.upto(5)[:, layer]), np.sort(idx[:5].numpy()))
        assert np.array_equal(np.sort(second.upto(7)[:, layer]), np.sort(idx[7:].numpy()))
    assert not first.upto(5)[:, 0].any()  # the dense layer has no experts
    assert all(not m.note_choices and m.choices is None for m in MODEL.modules() if isinstance(m, MoE))


def test_a_packed_copy_tells_the_same_choices():
    if ops.library() is None:
        pytest.skip("no C compiler: models are served as they are")
    copy, plain, packed = serving_copy(MODEL, "fp32"), routing_for(0, MODEL), routing_for(0, MODEL)
    for model, routing in ((MODEL, plain), (copy, packed)):
        with torch.no_grad(), noted(model, [(routing, 0, 9)]):
            model(batch(9))
    assert packed.known and np.array_equal(plain.upto(9), packed.upto(9))


def test_nobody_asks_nothing_is_kept():
    with torch.no_grad(), noted(MODEL, [(None, 0, 4)]):
        MODEL(batch(4))
        assert all(m.choices is None for m in MODEL.modules() if isinstance(m, MoE))


def test_a_forward_that_leaves_no_choices_makes_the_record_unknown_not_wrong():
    routing = routing_for(0, MODEL)
    with torch.no_grad(), noted(MODEL, [(routing, 0, 4)]):
        pass  # as one that was compiled away from the modules
    assert routing.upto(4) is None


def test_many_experts_need_two_bytes():
    config = dataclasses.replace(preset("k2"), mixers=("mla",), ffns=("moe",))
    fake = type("Fake", (), {"config": config})()
    assert routing_for(0, fake).upto(1).dtype == np.uint16


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 40), st.lists(st.tuples(st.integers(0, 60), st.integers(1, 90)), max_size=8))
def test_a_position_that_runs_again_is_written_again(start, notes):
    routing, expected = Routing(start, 1, 1, 256), {}
    for n, (position, rows) in enumerate(notes, 1):
        routing.note(position, np.full((rows, 1, 1), n))
        expected.update({p: n for p in range(position, position + rows)})
    end = max(expected, default=start) + 1
    got = routing.upto(end)[:, 0, 0].tolist()
    assert got == [expected.get(p, 0) for p in range(start, end)]
