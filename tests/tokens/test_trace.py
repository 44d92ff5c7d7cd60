"""The trace and its journal: nothing lost, nothing doubled, whatever byte the process died at."""

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidelock.tokens.errors import UserError
from tidelock.tokens.journal import Journal, read_journal
from tidelock.tokens.message import Message, ToolCall, ToolSpec
from tidelock.tokens.policy import Chunk, drawn_from
from tidelock.tokens.template import get_template
from tidelock.tokens.tokenizer import ByteTokenizer
from tidelock.tokens.trace import Node, Outcome, Trace, TraceStore

TEMPLATE = get_template("xtml", ByteTokenizer())


def node(parent=None, text="hello", scope="key/session", ids=(1, 2, 3), **rest):
    return Node.of(parent, Message("user", text), ids, scope=scope, **rest)


def test_a_node_is_named_by_what_it_is_and_where_it_hangs():
    assert node().id == node().id
    assert len({node().id, node(parent="x").id, node(scope="b").id, node(ids=(1, 2)).id, node(text="z").id}) == 5


def test_what_was_drawn_from_is_told_for_every_sampled_id_or_for_none():
    told = {"sampled": 2, "logprobs": (-1.0, -1.0), "weights_versions": ((0, 2),)}
    with pytest.raises(ValueError):
        node(**told, kept=((1, 2),))
    chunks = [Chunk((1,), (-1.0,), 0), Chunk((2,), (-2.0,), 0, sampled_logprobs=(-0.5,), kept=((2, 4),)), Chunk((), (), 0, "stop")]
    assert drawn_from(chunks) == ((-1.0, -0.5), (None, (2, 4))) and drawn_from(chunks[:1]) == ((), ())


def test_adding_twice_adds_once_also_over_a_restart(tmp_path):
    store = TraceStore(tmp_path / "t.jsonl", TEMPLATE)
    assert store.add(node()) and not store.add(node())
    assert store.add_outcome(Outcome(node().id, True, 1.0, "v")) and not store.add_outcome(Outcome(node().id, True, 1.0, "v"))
    store.close()
    store = TraceStore(tmp_path / "t.jsonl", TEMPLATE)
    assert not store.add(node()) and store.add_many([node(), node(text="b"), node(text="b")]) == 1
    store.close()
    assert len(read_journal(tmp_path / "t.jsonl")) == 3


def test_a_reopened_store_knows_everything_the_old_one_knew(tmp_path):
    store = TraceStore(tmp_path / "t.jsonl", TEMPLATE)
    tools = (ToolSpec("f", "d", {"type": "object"}),)
    root = Node.of(None, Message("system", "s", tools=tools), [1], scope="a")
    turn = Node.of(root.id, Message("assistant", "x", "r", (ToolCall("functions.f:0", "f", {"k": [1, None, "é"]}),), verbatim=(7,)),
                   [2, 3, 5], scope="a", sampled=3, logprobs=(-0.25,) * 3, weights_versions=((4, 3),), sampling={"seed": 1},
                   sampled_logprobs=(-0.1, 0.0, -0.25), kept=((3, 7), b"\x03\xff", None),
                   template="h", sandbox="landlock-7", consent=True, consent_source="key", redactions=((0, 1),),
                   finish_reason="stop", exact=True, created=1.5)  # fmt: skip
    store.add_many([root, turn])
    store.add_outcome(Outcome(turn.id, False, 0.5, "v", turn.id, (root.id, turn.id)))
    store.withdraw("a")
    store.close()
    again = Trace.read(tmp_path / "t.jsonl")
    assert again.nodes == store.nodes and again.withdrawn == {"a"}
    assert again.outcomes(turn.id) == [Outcome(turn.id, False, 0.5, "v", turn.id, (root.id, turn.id))]
    assert again.ids(turn.id) == [1, 2, 3, 5] and [n.id for n in again.leaves()] == [turn.id]


def test_match_finds_the_longest_known_beginning_and_never_crosses_scopes(tmp_path):
    store = TraceStore(tmp_path / "t.jsonl", TEMPLATE)
    a = node(text="a", template=TEMPLATE.hash)
    b = node(parent=a.id, text="b", template=TEMPLATE.hash)
    store.add_many([a, b])
    said = [Message("user", t) for t in "abc"]
    found, n = store.match("key/session", said)
    assert (found, n) == (b, 2)
    assert store.match("key/other", said) == (None, 0)
    assert store.match("key/session", said[1:]) == (None, 0)
    store.close()


def test_a_verdict_on_nothing_is_refused(tmp_path):
    store = TraceStore(tmp_path / "t.jsonl", TEMPLATE)
    with pytest.raises(KeyError):
        store.add_outcome(Outcome("nothing", True, 1.0, "v"))
    store.close()


def test_match_follows_every_sibling_that_says_the_same(tmp_path):
    """The same words sampled twice as other ids; the conversation went on from the first."""
    store = TraceStore(tmp_path / "t.jsonl", TEMPLATE)
    first, second = (node(text="a", ids=ids, template=TEMPLATE.hash) for ids in ((1,), (2,)))
    after = node(parent=first.id, text="b", template=TEMPLATE.hash)
    store.add_many([first, second, after])
    said = [Message("user", t) for t in "ab"]
    assert store.match("key/session", said[:1]) == (second, 1)
    assert store.match("key/session", said) == (after, 2)
    store.close()


def test_ids_of_another_template_are_never_extended(tmp_path):
    store = TraceStore(tmp_path / "t.jsonl", TEMPLATE)
    store.add(node(template="another"))
    assert store.match("key/session", [Message("user", "hello")]) == (None, 0)
    store.close()


def test_no_node_without_its_parent_and_no_sampled_id_without_its_logprob_and_version(tmp_path):
    store = TraceStore(tmp_path / "t.jsonl", TEMPLATE)
    with pytest.raises(KeyError):
        store.add(node(parent="nowhere"))
    store.close()
    for wrong in ({"logprobs": ()}, {"weights_versions": ((1, 1),)}, {"sampled": 3}, {"ids": (1,)}):
        rest = {"ids": (1, 2, 3), "sampled": 2, "logprobs": (-1.0, -2.0), "weights_versions": ((1, 2),), **wrong}
        with pytest.raises(ValueError, match="sampled"):
            node(**rest)


records = st.lists(st.dictionaries(st.text(max_size=5), st.one_of(st.integers(), st.text(max_size=10)), max_size=3),
                   min_size=1, max_size=5)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(records=records, data=st.data())
def test_cut_at_any_byte_only_the_cut_record_is_lost(tmp_path_factory, records, data):
    path = tmp_path_factory.mktemp("journal") / "j"
    journal = Journal(path)
    journal.append_many(records)
    journal.close()
    whole = path.read_bytes()
    ends = [i + 1 for i, b in enumerate(whole) if b == 10]
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    kept = records[: sum(e <= cut for e in ends)]
    journal = Journal(path)
    assert journal.records == kept
    journal.append({"next": 1})
    journal.close()
    assert read_journal(path) == [*kept, {"next": 1}]


def test_damage_in_the_middle_is_reported_not_skipped(tmp_path):
    journal = Journal(tmp_path / "j")
    journal.append_many([{"a": 1}, {"b": 2}, {"c": 3}])
    journal.close()
    data = bytearray((tmp_path / "j").read_bytes())
    data[data.index(b'"b"') + 1] ^= 1
    (tmp_path / "j").write_bytes(data)
    with pytest.raises(UserError, match="record 2"):
        Journal(tmp_path / "j")


def test_a_write_that_fails_leaves_nothing_behind(tmp_path):
    """A full disk, played by a file size limit: the next record must not land behind half of the failed one."""
    script = """
import resource, signal, sys
from tidelock.tokens.journal import Journal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
journal = Journal(sys.argv[1])
journal.append({"a": 1})
resource.setrlimit(resource.RLIMIT_FSIZE, (journal.path.stat().st_size + 7, resource.RLIM_INFINITY))
try:
    journal.append_many([{"b": 2}, {"c": 3}])
except OSError:
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    journal.append({"d": 4})
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "j")], check=True)
    assert read_journal(tmp_path / "j") == [{"a": 1}, {"d": 4}]


def test_one_writer_at_a_time(tmp_path):
    first = Journal(tmp_path / "j")
    with pytest.raises(UserError, match="another process"):
        Journal(tmp_path / "j")
    first.close()
    Journal(tmp_path / "j").close()


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf"), 1e-5, -0.5, 5e-324])
def test_a_record_reads_back_as_it_was_whichever_way_it_was_written(tmp_path, odd):
    call = ToolCall("functions.f:0", "f", {"n": 2**70, "x": [1.5, None]})
    message = Message("assistant", 'a "quoted" \ud800 é\n', tool_calls=(call,))
    path = tmp_path / "t.jsonl"
    store = TraceStore(path, TEMPLATE)
    node = Node.of(None, message, (1, 2), scope="k/\ud800", sampled=1, logprobs=(odd,), weights_versions=((3, 1),),
                   kept=(b"\x01\xff",), sampling={"temperature": 1e-05, "constraint": None}, template=TEMPLATE.hash)  # fmt: skip
    store.add(node)
    store.close()
    (read,) = TraceStore(path, TEMPLATE).nodes.values()
    assert repr(read) == repr(node)
