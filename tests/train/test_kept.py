"""Sampling-mask replay: training under cut-offs sees the probabilities that were drawn from."""

import asyncio

import pytest
import torch

from tidelock.agent import Episode
from tidelock.engine import Engine, Limits
from tidelock.envs.run import Scored
from tidelock.models import TransformerLM, preset
from tidelock.tokens.policy import Constraint, SamplingParams
from tidelock.tokens.template import get_template
from tidelock.tokens.tokenizer import ByteTokenizer
from tidelock.train.loop import token_logprobs
from tidelock.train.packing import make_pack
from tidelock.train.rl import replayable, rl_sample

CUT = SamplingParams(max_tokens=30, seed=3, top_p=0.6, top_k=50)


def episode(model, params):
    async def work():
        engine = Engine(model, limits=Limits(n_pages=64, n_slots=8), template=get_template("xtml", ByteTokenizer()))
        try:
            e = Episode()
            e.append_input([1, 2, 3])
            async for chunk in engine.generate(e.ids, params):
                e.append_sampled(chunk)
            return e
        finally:
            engine.close()

    return asyncio.run(work())


@pytest.mark.parametrize("params", [CUT, SamplingParams(max_tokens=30, seed=3, constraint=Constraint("regex", "[a-z]{50}"))])
def test_the_trainer_recomputes_the_logprobs_that_were_drawn_from(params):
    model = TransformerLM(preset("nano-k3", 280), seed=0).eval()
    played = episode(model, params)
    whole, replayed = (make_pack([rl_sample(Scored(None, played, True), 1.0, replay)] * 2) for replay in (False, True))
    with torch.no_grad():
        for pack, recorded in ((whole, played.logprobs), (replayed, played.sampled_logprobs)):
            logp, rows = token_logprobs(model, pack)
            assert logp.tolist() == pytest.approx(recorded[3:] * 2, abs=1e-5)
            assert pack.extras["old_logp"][rows].tolist() == pytest.approx(recorded[3:] * 2)
    assert all(b > a + 0.1 for a, b in zip(played.logprobs[3:], played.sampled_logprobs[3:]))


def test_only_what_a_kept_set_tells_is_replayed():
    assert replayable(CUT) and replayable(SamplingParams(min_p=0.1))
    for params in (SamplingParams(), SamplingParams(temperature=0.5, top_p=0.5), SamplingParams(top_k=5, presence_penalty=1.0)):
        assert not replayable(params)
