"""The dataset builder: nothing without consent, every token as stored, reasons for everything left out."""

import pytest
from msgspec.structs import asdict

from tidelock.loop.dataset import ConsentError, advantages, balanced, build, successes, to_sample
from tidelock.tokens.directives import tool_choice
from tidelock.tokens.message import Message, ToolCall
from tidelock.tokens.policy import SamplingParams
from tidelock.tokens.template import canonical, get_template
from tidelock.tokens.tokenizer import ByteTokenizer
from tidelock.tokens.trace import Node, Outcome, TraceStore

TEMPLATE = get_template("xtml", ByteTokenizer())


@pytest.fixture
def store(tmp_path):
    store = TraceStore(tmp_path / "trace.jsonl", TEMPLATE)
    yield store
    store.close()


def conversation(store, messages, scope, **node_options):
    """Store a conversation the way the service does; returns the last node's id."""
    parent, ids = None, []
    options = {"consent": True, "sandbox": "landlock-7+seccomp", "template": TEMPLATE.hash, "exact": True, **node_options}
    for i, message in enumerate(canonical(messages)):
        whole = TEMPLATE.extend(ids, canonical(messages)[:i], [message])
        added, ids = whole[len(ids) :], whole
        rest = dict(options)
        if message.role == "assistant":
            n = len(added) - len(TEMPLATE.generation_prompt())
            rest |= {"sampled": n, "logprobs": (-0.5,) * n, "weights_versions": ((1, n),), "finish_reason": "stop"}
        node = Node.of(parent, message, added, scope=scope, **rest)
        store.add(node)
        parent = node.id
    return parent


def ask(text, *calls, answer):
    work = [m for c, r in calls for m in (Message("assistant", tool_calls=(c,)), Message("tool", r, name=c.name))]
    return [Message("system", "s"), Message("user", text), *work, Message("assistant", answer)]


def test_what_is_trained_is_what_was_stored_and_only_what_was_sampled(store):
    call = ToolCall("", "get", {"key": "k"})
    last = conversation(store, ask("q", (call, "7"), answer="7"), "a")
    store.add_outcome(Outcome(last, True, 1.0, "v"))
    (sample,) = build(store).samples
    assert sample.ids == store.ids(last)
    trained = [i for i, g in zip(sample.ids, sample.sampled) if g]
    assert trained == [i for n in store.path(last) if n.sampled for i in n.ids[len(n.ids) - n.sampled :]]


@pytest.mark.parametrize("options,reason", [
    ({"consent": False}, "no consent"),
    ({"sandbox": "none"}, "tools ran with less confinement than required"),
])  # fmt: skip
def test_what_may_not_be_used_is_left_out_and_counted(store, options, reason):
    last = conversation(store, ask("q", answer="a"), "a", **options)
    store.add_outcome(Outcome(last, True, 1.0, "v"))
    conversation(store, ask("q", answer="b"), "b")
    data = build(store, require_sandbox="landlock")
    assert data.samples == [] and data.excluded == {reason: 1, "no verified outcome": 1}


def test_consent_taken_back_removes_what_was_usable(store):
    last = conversation(store, ask("q", answer="a"), "a")
    outcome = Outcome(last, True, 1.0, "v")
    store.add_outcome(outcome)
    assert len(build(store).samples) == 1
    store.withdraw("a")
    assert build(store).excluded == {"no consent": 1}
    with pytest.raises(ConsentError):
        to_sample(store, store.path(last), outcome)


def test_redacted_ids_stay_in_place_and_carry_no_weight(store):
    last = conversation(store, ask("q", answer="secret"), "a")
    node = store.get(last)
    redacted = Node.of(node.parent, node.message, node.ids, scope="b", **{
        **{k: getattr(node, k) for k in ("sampled", "logprobs", "weights_versions", "finish_reason", "consent", "exact", "template")},
        "redactions": ((len(node.ids) - 5, len(node.ids)),)})  # fmt: skip
    store.add(redacted)
    store.add_outcome(Outcome(redacted.id, True, 1.0, "v"))
    (sample,) = successes(build(store))["v"]
    assert sample.ids[-5:] == list(node.ids[-5:]) and sample.weights[-5:] == [0.0] * 5 and sum(sample.weights) > 0


@pytest.mark.parametrize("temperature,replayed", [(1.0, True), (0.5, False)])
def test_attempts_under_cutoffs_train_the_distribution_they_were_drawn_from(store, temperature, replayed):
    """Production traffic is sampled with top-p; its raw log-probabilities are not what the tokens were drawn with."""
    sampling = asdict(SamplingParams(top_p=0.9, temperature=temperature))
    for text, reward in (("good", 1.0), ("bad", 0.0)):
        last = conversation(store, ask("q", answer=text), text)
        node = store.get(last)
        options = {name: getattr(node, name) for name in ("sampled", "logprobs", "weights_versions", "finish_reason",
                                                          "consent", "exact", "template", "sandbox")}  # fmt: skip
        cut = Node.of(node.parent, node.message, node.ids, scope=text + "'", sampling=sampling, **options,
                      sampled_logprobs=(-0.1,) * node.sampled, kept=(tuple(node.ids),) * node.sampled)  # fmt: skip
        store.add(cut)
        store.add_outcome(Outcome(cut.id, reward > 0, reward, "v"))
    samples = advantages(build(store))
    assert len(samples) == 2
    for sample in samples:
        given, drawn = sample.weights.index(1.0), -0.1 if replayed else -0.5
        assert sample.extras["old_logp"] == [0.0] * given + [drawn] * (len(sample.ids) - given)
        assert (sample.kept is not None) == replayed
        if replayed:
            assert sample.kept[:given] == [None] * given and set(sample.ids[given:]) <= set(sample.kept[-1])


def test_a_request_solved_in_steps_becomes_the_conversation_it_should_have_been(store):
    first, second = ToolCall("", "get", {"key": "k"}), ToolCall("", "convert", {"value": "7"})
    failed = conversation(store, ask("look up k and convert it", answer="?"), "a")
    step1 = conversation(store, ask("look up k", (first, "7"), answer="7"), "b")
    step2 = conversation(store, ask("convert 7", (second, "700"), answer="700"), "c")
    store.add_outcome(Outcome(step2, True, 1.0, "v", request=failed, steps=(step1, step2)))
    (sample,) = build(store).samples
    should = ask("look up k and convert it", (first, "7"), (second, "700"), answer="700")
    assert sample.ids == TEMPLATE.render(canonical(should))
    assert not sample.exact and advantages(build(store)) == []  # other contexts: never RL


def test_what_a_step_alone_was_held_to_is_not_in_what_should_have_been(store):
    call = ToolCall("", "get", {"key": "k"})
    failed = conversation(store, ask("look up k", answer="?"), "a")
    held = [Message("system", "s"), Message("user", "get k"), tool_choice("get"), Message("assistant", tool_calls=(call,)),
            Message("tool", "7", name="get"), tool_choice("none"), Message("assistant", "7")]  # fmt: skip
    step = conversation(store, held, "b")
    store.add_outcome(Outcome(step, True, 1.0, "v", request=failed, steps=(step,)))
    (sample,) = build(store).samples
    assert sample.ids == TEMPLATE.render(canonical(ask("look up k", (call, "7"), answer="7")))


def test_steps_need_everybodys_consent(store):
    failed = conversation(store, ask("both", answer="?"), "a", consent=False)
    step = conversation(store, ask("one", answer="1"), "b")
    store.add_outcome(Outcome(step, True, 1.0, "v", request=failed, steps=(step,)))
    assert build(store).samples == []


def test_advantages_are_centred_within_a_task_and_groups_without_contrast_are_dropped(store):
    for i, (question, reward) in enumerate([("q", 1.0), ("q", 0.0), ("q", 0.0), ("other", 1.0), ("other", 1.0)]):
        last = conversation(store, ask(question, answer="a"), f"s{i}")
        store.add_outcome(Outcome(last, reward > 0, reward, "v"))
    got = sorted(max(s.extras["advantage"], key=abs) for s in advantages(build(store)))
    assert got == pytest.approx([-1 / 3, -1 / 3, 2 / 3])


def test_balancing_gives_rare_demand_its_share_and_passes_over_all_of_it():
    from itertools import islice

    from tidelock.train.packing import Sample

    few, many = [Sample([1], [0.0])], [Sample([2 + i], [0.0]) for i in range(50)]
    chosen = [s.ids[0] for s in islice(balanced([few, many, []], seed=0), 200)]
    assert chosen.count(1) == 100
    assert sorted(i for i in chosen if i > 1) == sorted(2 * list(range(2, 52)))
    assert not list(balanced([[], []], seed=0))
