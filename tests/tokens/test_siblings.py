"""Several journals in one directory are one trace: a conversation goes on at any worker with the ids it has."""

from __future__ import annotations

import random

import pytest

from tidelock.tokens.message import Message
from tidelock.tokens.siblings import journal_of, journals
from tidelock.tokens.template import get_template
from tidelock.tokens.tokenizer import ByteTokenizer
from tidelock.tokens.trace import Node, Outcome, Trace, TraceStore

TEMPLATE = get_template("xtml", ByteTokenizer())


@pytest.fixture
def stores(tmp_path):
    stores = [TraceStore(journal_of(tmp_path, worker), TEMPLATE) for worker in range(3)]
    yield stores
    for store in stores:
        store.close()


def turn(store: TraceStore, scope: str, messages: list[Message], said: str) -> tuple[int, list[Message]]:
    """Answers at `store` as the service does; (how many messages it had to render, the longer conversation). The answer's
    ids are its own, not those that its text would be rendered as."""
    parent, known = store.match(scope, messages)
    at, ids, seen = (parent.id if parent else None), (store.ids(parent.id) if parent else []), list(messages[:known])
    for message in messages[known:]:
        longer = TEMPLATE.extend(ids, seen, [message])
        node = Node.of(at, message, longer[len(ids) :], scope=scope, template=TEMPLATE.hash)
        store.add(node)
        at, ids, seen = node.id, longer, [*seen, message]
    answer = Message("assistant", said)
    sampled = [*TEMPLATE.sampled(answer)[:-1], 7, TEMPLATE.stop_ids[0]]  # with an id that its text does not have
    store.add(Node.of(at, answer, sampled, scope=scope, sampled=len(sampled), logprobs=(0.0,) * len(sampled),
                      weights_versions=((1, len(sampled)),), template=TEMPLATE.hash))  # fmt: skip
    return len(messages) - known, [*messages, answer]


@pytest.mark.parametrize("seed", range(5))
def test_conversations_that_hop_between_workers_are_never_rendered_again(stores, tmp_path, seed):
    rng = random.Random(seed)
    talks = {f'key/"é {n}': [] for n in range(4)}  # a scope is the client's own words
    for step in range(40):
        scope = rng.choice(list(talks))
        asked = [*talks[scope], Message("user", f"question {step}")]
        new, talks[scope] = turn(rng.choice(stores), scope, asked, f"answer {step}")
        assert new == 1
    whole = Trace.read(tmp_path / "trace.jsonl")
    for scope, talk in talks.items():
        (leaf,) = [n for n in whole.leaves() if n.scope == scope] or [None]
        assert whole.messages(leaf.id) == talk if talk else leaf is None
    assert len(journals(tmp_path / "trace-1.jsonl")) == 3


def test_feedback_finds_an_answer_wherever_it_was_given_and_counts_once(stores, tmp_path):
    turn(stores[1], "k/s", [Message("user", "hi")], "hello")
    (leaf,) = stores[1].leaves()
    verdict = Outcome(leaf.id, True, 1.0, "test")
    assert stores[0].add_outcome(verdict)
    assert not stores[2].add_outcome(verdict) and not stores[1].add_outcome(verdict)
    assert stores[2].get("nothing") is None
    assert Trace.read(tmp_path / "trace.jsonl").outcomes() == [verdict]


def test_a_line_that_is_still_being_written_is_looked_at_when_it_is_whole(stores, tmp_path):
    talk = turn(stores[1], "k/s", [Message("user", "hi")], "hello")[1]
    path = journal_of(tmp_path, 1)
    whole = path.read_bytes()
    stores[0].follow()
    turn(stores[1], "k/t", [Message("user", "ho")], "there")
    more = path.read_bytes()[len(whole) :]
    path.write_bytes(whole + more[:-5])  # as a follower may find it
    stores[0].follow()
    path.write_bytes(whole + more)
    assert stores[0].match("k/t", [Message("user", "ho"), Message("assistant", "there")])[1] == 2
    assert stores[0].match("k/s", talk)[1] == 2


def test_a_directory_of_one_worker_is_what_it_was(tmp_path):
    with_one = TraceStore(tmp_path / "trace.jsonl", TEMPLATE)
    turn(with_one, "k/s", [Message("user", "hi")], "hello")
    with_one.close()
    assert journals(tmp_path / "trace.jsonl") == [tmp_path / "trace.jsonl"]
    assert journals(tmp_path / "elsewhere.jsonl") == [tmp_path / "elsewhere.jsonl"]
    again = TraceStore(tmp_path / "trace.jsonl", TEMPLATE)
    assert again.match("k/s", [Message("user", "hi"), Message("assistant", "hello")])[1] == 2
    again.close()
