"""The same ids give the same log-probabilities, with ==, however they come to be run; and the self-test knows."""

import asyncio
import copy

import numpy as np
import pytest
import torch

from benchmarks.schedules import END, VOCAB
from tests.engine.driving import Driver
from tidelock.engine import Engine, selftest
from tidelock.engine.selftest import self_test
from tidelock.models import Batch, TransformerLM, layers, ops, preset
from tidelock.models.serving import serving_copy
from tidelock.tokens.errors import UserError

exact = pytest.mark.skipif(not ops.exact(), reason="bitwise only with the compiled kernels")
each_model = pytest.mark.parametrize("name", ["nano-k3", "nano-k2"])


def make(name, seed=0):
    model = TransformerLM(preset(name, VOCAB), seed=seed)
    for p in model.parameters():
        p.data.mul_(2.5)
    return model.eval()


MODELS = {name: make(name) for name in ("nano-k3", "nano-k2")}
rng = np.random.default_rng(0)
PROMPTS = [[1, 2, 3, END, *rng.integers(0, VOCAB, int(n)).tolist()] for n in rng.integers(1, 60, 32)]


def together(d):
    got = [d.submit(p, seed=i) for i, p in enumerate(PROMPTS)]
    d.drain()
    return [g.answer for g in got]


def one_by_one(d):
    return [d.ask(p, seed=i).answer for i, p in enumerate(PROMPTS)]


@exact
@each_model
def test_company_chunks_cache_eviction_and_threads_change_no_bit(name):
    model = MODELS[name]
    expected = one_by_one(Driver(model, reuse=False))
    for chunk in (7, 64, 2048):
        assert together(Driver(model, max_batch=32, step_tokens=chunk, n_pages=2048)) == expected, f"chunks of {chunk}"
    warm = Driver(model, n_pages=2048, n_slots=512)
    assert one_by_one(warm) == expected, "shared beginning"
    assert one_by_one(warm) == expected, "warm"
    assert one_by_one(warm) == expected, "warmer"
    assert warm.stats.prefilled < 2 * sum(map(len, PROMPTS)) + len(PROMPTS)  # nothing but last tokens the third time
    warm.scheduler.eviction.make_room(1500, 400)
    assert one_by_one(warm) == expected, "after eviction"
    threads = torch.get_num_threads()
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            assert together(Driver(model, max_batch=32, n_pages=2048)) == expected, f"{n} threads"
    finally:
        torch.set_num_threads(threads)


@exact
@each_model
def test_served_is_trained(name):
    model = MODELS[name]
    for prompt, (ids, logprobs) in zip(PROMPTS, together(Driver(model, max_batch=32, n_pages=2048))):
        whole = torch.tensor([*prompt, *ids])
        batch = Batch(whole, torch.tensor([0, len(whole)], dtype=torch.int32), torch.zeros(1, dtype=torch.int32))
        trained = torch.log_softmax(model.logits(model(batch)), -1)[len(prompt) - 1 : -1]  # with autograd's bookkeeping
        assert trained.gather(1, whole[len(prompt) :, None])[:, 0].tolist() == logprobs


@each_model
def test_the_self_test_finds_what_is_there(name, monkeypatch):
    model = MODELS[name]
    if ops.exact():
        assert self_test(model, model) == selftest.Exactness("exact", 0.0)
    monkeypatch.setattr(layers.ops, "backend", lambda x: ops.reference)  # plain PyTorch on both sides
    plain = self_test(model, model)
    assert plain.numerics == "corrected" and 0 < plain.max_abs_dlogp < 1e-3
    other = self_test(model, make(name, seed=1))
    assert other.numerics == "corrected" and other.max_abs_dlogp > 0.1


@each_model
def test_the_self_test_tells_other_experts_from_other_numbers(name):
    model, other = MODELS[name], copy.deepcopy(MODELS[name])
    for key, bias in other.named_buffers():  # decides who is chosen, never with what weight
        bias.add_(torch.linspace(-0.02, 0.02, bias.numel()))
    found = self_test(model, other)
    assert 0 < found.rerouted < 1 and found.max_abs_dlogp > 0.1
    assert found.max_abs_dlogp_same_experts < 1e-3
    if ops.exact():
        assert found.max_abs_dlogp_served_weights == 0
    assert all(layer.mlp.replayed is None for layer in model.layers[1:])


@exact
@each_model
@pytest.mark.parametrize("packing", ["bf16", "int8", "int4"])
def test_the_self_test_tells_a_broken_kernel_from_fewer_bits(name, packing):
    model = MODELS[name]
    served = serving_copy(model, packing)
    sound = self_test(model, served)
    assert sound.max_abs_dlogp_served_weights == 0 < sound.max_abs_dlogp_same_experts <= sound.max_abs_dlogp < 20
    served.packed()[-1].w.view(-1)[0] ^= 1 << 5  # one bit of the head
    assert self_test(model, served).max_abs_dlogp_served_weights > 0


def test_the_self_test_says_so_when_there_are_no_numbers():
    broken = make("nano-k3")
    broken.norm.weight.data.fill_(float("nan"))
    found = self_test(broken, broken)
    assert found.numerics == "corrected" and found.max_abs_dlogp != found.max_abs_dlogp


@each_model
@pytest.mark.parametrize("packing", ["fp32", "bf16", "int8"])
def test_a_packed_copy_serves_its_own_numbers_and_says_how_far_they_are(name, packing):
    engine = Engine(MODELS[name], weights=packing)
    try:
        if packing == "fp32" and ops.exact():
            assert engine.exactness == selftest.Exactness("exact", 0.0)
        else:
            assert engine.exactness.numerics == "corrected" and 0 < engine.exactness.max_abs_dlogp < 20
        asyncio.run(engine.adopt(make(name, seed=1), 2))
        assert engine.version == 2
    finally:
        engine.close()


def test_an_unknown_packing_is_named():
    with pytest.raises(UserError, match="fp7"):
        Engine(MODELS["nano-k2"], weights="fp7")
