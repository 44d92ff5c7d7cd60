"""Speculation: whatever is drafted, the output is that of plain decoding, every figure with ==; only steps are saved."""

import asyncio
import dataclasses
import random

import pytest
import torch

from tidelock.engine import Engine, Limits
from tidelock.engine.lookup import RUN, Lookup, Text
from tidelock.engine.mtp import MTPDrafts
from tidelock.engine.speculation import Clock, Speculation
from tidelock.models import Batch, TransformerLM, ops, preset
from tidelock.tokens.policy import Constraint, SamplingParams
from tidelock.tokens.template import get_template
from tidelock.tokens.tokenizer import ByteTokenizer
from tidelock.train.loop import Recipe, train
from tidelock.train.objectives import cross_entropy
from tidelock.train.packing import Sample, make_pack

TEMPLATE, VOCAB, END = get_template("xtml", ByteTokenizer()), 280, 260
exact = pytest.mark.skipif(not ops.exact(), reason="bitwise only with the compiled kernels")
each_preset = pytest.mark.parametrize("name", ["nano-k3", "nano-k2"])
OPTIONS = [
    {"temperature": 0.0},
    {},
    {"temperature": 0.7, "top_p": 0.9, "top_logprobs": 2},
    {"frequency_penalty": 1.5, "repetition_penalty": 1.1, "temperature": 0.3},
    {"stop": ("q", "zx"), "temperature": 1.2},
    {"constraint": Constraint("regex", "[a-d]{3,30}(x|y[a-d]*)")},
    {"stop_ids": tuple(range(0, VOCAB, 9)), "max_tokens": 60},
]


def make(name):
    model = TransformerLM(preset(name, VOCAB), seed=0)
    for p in model.parameters():
        p.data.mul_(2.5)  # random weights with opinions
    return model.eval()


async def ask(engine, prompt, **params):
    chunks = [c async for c in engine.generate(prompt, SamplingParams(**{"max_tokens": 30, "seed": 7, **params}))]
    fields = ("ids", "logprobs", "sampled_logprobs", "top_logprobs", "kept")
    return [[x for c in chunks for x in getattr(c, f)] for f in fields], chunks[-1].finish_reason, chunks[-1].stop


def with_engine(work, model, weights=None, **limits):
    async def inside():
        limited = Limits(**{"n_pages": 400, "n_slots": 64, "draft_tokens": 0, **limits})
        engine = Engine(model, 1, limits=limited, boundary_id=END, template=TEMPLATE, weights=weights)
        try:
            out = await work(engine)
            scheduler = engine._scheduler
            assert not scheduler.running
            scheduler.tree.clear()
            assert (scheduler.memory.pages.free, scheduler.memory.slots.free) == (engine.limits.n_pages, engine.limits.n_slots)
            return out, engine.stats
        finally:
            engine.close()

    return asyncio.run(asyncio.wait_for(inside(), 120))


def prompts(n, seed=0):
    rng = random.Random(seed)
    return [[rng.randrange(256) for _ in range(rng.randint(1, 30))] for _ in range(n)]


async def conversations(engine):
    """Every option, together; then a second turn of each on what the first one left in the cache."""
    first = await asyncio.gather(*(ask(engine, p, seed=i, **o) for i, (p, o) in enumerate(zip(prompts(7), OPTIONS))))
    second = [p + answer[0][0] + [END, 5, 6] for p, answer in zip(prompts(7), first)]
    return first, await asyncio.gather(*(ask(engine, p, seed=i, max_tokens=9) for i, p in enumerate(second)))


@exact
@each_preset
@pytest.mark.parametrize("seed", range(3))
def test_whatever_is_drafted_the_output_is_plain_decodings(name, seed, monkeypatch):
    """Drafts of the true continuation, cut and corrupted at random places."""
    model, truth, rng = make(name), {}, random.Random(seed)
    plain, _ = with_engine(conversations, model)
    for asked, answers in zip((prompts(7), None), plain):
        for i, (prompt, answer) in enumerate(zip(asked or [p + a[0][0] + [END, 5, 6] for p, a in zip(prompts(7), plain[0])], answers)):
            truth[tuple(prompt), i] = answer[0][0]

    def draft(self, track, room, stop_ids):
        n = max(0, min(room, rng.randint(0, 6)))
        ids = track.text.ids
        known = [t for (p, _), t in truth.items() if list(p) == ids[: len(p)] and t[: len(ids) - len(p)] == ids[len(p) :]]
        at = len(ids) - next((len(p) for (p, _), t in truth.items() if t in known[:1] and list(p) == ids[: len(p)]), 0)
        out = known[0][at : at + n] if known else [rng.randrange(VOCAB) for _ in range(n)]
        out = [token if rng.random() < 0.85 else rng.randrange(VOCAB) for token in out]
        return out[: next((i for i, token in enumerate(out) if token in stop_ids), n)]

    monkeypatch.setattr(Speculation, "draft", draft)
    drafted, stats = with_engine(conversations, model, draft_tokens=6)
    assert drafted == plain
    assert 20 < stats.accepted < stats.drafted
    drafted, _ = with_engine(conversations, model, draft_tokens=6, step_tokens=9, max_batch=3, n_slots=5, n_pages=40)
    assert drafted == plain


@exact
@each_preset
def test_lookup_saves_steps_where_text_repeats_and_changes_nothing(name, monkeypatch):
    monkeypatch.setattr(Clock, "share", lambda self, rows: 0.2)  # what pays is a matter of time; the test is not
    model = make(name)
    refrain = Constraint("regex", "((hello|hi), (you|me)! ){12,}")  # random weights never repeat themselves

    async def work(engine):
        return await asyncio.gather(*(ask(engine, p, constraint=refrain, max_tokens=120) for p in prompts(3)))

    plain, before = with_engine(work, model)
    drafted, after = with_engine(work, model, draft_tokens=8)
    assert drafted == plain
    assert after.accepted > 50 and after.steps < 0.8 * before.steps


@exact
@each_preset
@pytest.mark.parametrize("weights", [None, "bf16", "int4"])
def test_the_mtp_layer_drafts_and_changes_nothing(name, weights, monkeypatch):
    """A layer trained for the purpose is right often; what it guesses is what its training forward predicts."""
    monkeypatch.setattr(Clock, "share", lambda self, rows: 0.2)
    monkeypatch.setattr(Lookup, "find", lambda self, text: None)
    model = TransformerLM(dataclasses.replace(preset(name, VOCAB), num_mtp_layers=1), seed=0)
    ids = [i * 7 % 32 for i in range(200)]  # a language in which every token has one successor
    pack = make_pack([Sample(ids[i : i + 50], [0.0] + [1.0] * 49) for i in (0, 9, 18, 31)])
    train(model, iter(lambda: pack, None), Recipe(lr=0.03, steps=20, warmup=2, mtp_weight=1.0), cross_entropy)

    async def work(engine):
        return await asyncio.gather(*(ask(engine, ids[i : i + 20], seed=i, max_tokens=50, temperature=0.3) for i in (0, 7, 50)))

    plain, before = with_engine(work, model, weights)
    drafted, after = with_engine(work, model, weights, draft_tokens=4)
    assert drafted == plain
    assert after.accepted > 0.6 * after.drafted > 30 and after.steps < 0.75 * before.steps


@exact
def test_the_mtp_cache_gives_what_the_whole_sequence_gives():
    for name in ("nano-k3", "nano-k2"):
        model = TransformerLM(dataclasses.replace(preset(name, VOCAB), num_mtp_layers=1), seed=0).eval()
        for p in model.mtp.parameters():
            p.data.mul_(3)  # so that what came before decides
        ids = torch.tensor(prompts(1)[0] * 3)[:50]
        whole = Batch(ids, torch.tensor([0, 50], dtype=torch.int32), torch.zeros(1, dtype=torch.int32))
        with torch.no_grad():
            hidden = model(whole)
            states = model.mtp_hidden(hidden, ids.roll(-1), whole)[0]
            expected = model.logits(states).argmax(-1).tolist()
            drafts, at = MTPDrafts(model.config, 3), 0
            place, other = drafts.take(), drafts.take()
            for n in (20, 1, 3, 1, 10):
                both = [hidden[at : at + n]] * 2
                (a, b) = drafts.guess(model, [place, other], both, [ids[at + 1 : at + n + 1].tolist()] * 2)
                at += n
                assert a == b == expected[at - 1]


def test_a_run_is_found_where_it_last_occurred_and_only_for_its_tenant():
    lookup = Lookup()
    a, b, c = Text("ann"), Text("ann"), Text("bob")
    lookup.grow(a, [1, 2, 3, 4, 5, 9, 2, 3, 4, 6])
    lookup.grow(b, [7, 2, 3, 4])
    found, at, length = lookup.find(b)
    assert (found, lookup.read(found, at, 3), length) == (a, [6, 6, 6], RUN)
    lookup.grow(c, [7, 2, 3, 4])
    assert lookup.find(c) is None
    lookup.grow(b, [8, 0, 7, 2, 3, 4])
    found, at, length = lookup.find(b)
    assert (found, lookup.read(found, at, 4), length) == (b, [8, 0, 7, 2], 4)


def test_what_is_remembered_is_bounded():
    lookup = Lookup(entries=100)
    for n in range(40):
        text = Text("t")
        lookup.grow(text, [n * 50 + i for i in range(50)])
        assert len(lookup._young) + len(lookup._old) <= 300
    assert lookup.find(_ending([2, 3, 4])) is None and lookup.find(_ending([1997, 1998, 1999 - 1])) is None
    assert lookup.find(_ending([1990, 1991, 1992]))[1:] == (43, RUN)


def _ending(ids):
    text = Text("t")
    text.ids = list(ids)
    return text


def test_drafts_grow_with_their_odds_and_stop_when_they_do_not_pay():
    s = Speculation(most=16)
    track = s.begin("t", [1, 2, 3, 4, 5, 6, 7, 8, 9] * 4, 0)

    def length(share):
        s._share = share
        return len(s.draft(track, 99, ()))

    start = length(0.1)
    for _ in range(40):
        s.judged(track, 4, 4)
    assert length(0.1) == 16 > start > 0 and 0 < length(0.95) < 16
    for _ in range(60):
        s.judged(track, 4, 0)
    assert length(0.2) == 0
    for _ in range(400):
        length(0.3)
    assert length(0.3) >= 1  # it is tried again after a while
    assert s.draft(track, 0, ()) == [] and s.draft(track, 99, (1,)) == []


def test_the_clock_tells_what_grows_with_rows():
    clock = Clock()
    for i in range(200):
        rows = 1 + i % 7
        clock.saw(rows, 0.004 + 0.001 * rows)
    assert clock.share(4) == pytest.approx(0.5, abs=0.01) and clock.share(36) == pytest.approx(0.9, abs=0.01)


def test_a_broken_model_fails_requests_with_drafts_too():
    model = make("nano-k3")

    async def work(engine):
        task = asyncio.create_task(ask(engine, [1, 2, 3] * 5, max_tokens=400, temperature=0.0))
        await asyncio.sleep(0.2)
        with torch.no_grad():
            engine._scheduler.weights.model.lm_head.weight.fill_(float("nan"))
        return (await asyncio.gather(task, return_exceptions=True))[0]

    error, _ = with_engine(work, model, draft_tokens=8)
    assert getattr(error, "status", None) == 500
