"""What holds for the streaming parsers, whatever was sampled and however it was cut into chunks."""

import json

import pytest
from conversations import DIRECT, assistants, chunked, every_template, exactly, law, template, tools, turns
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from tidelock.tokens import chatml, xtml
from tidelock.tokens.message import Message, ToolCall, ToolSpec


def streamed(parser, chunks):
    """(text by (kind, call), message) of one turn, the deltas of its closing included."""
    deltas = [d for chunk in chunks for d in parser.feed(chunk)]
    message = parser.finish()
    deltas += parser.feed(())
    joined = {}
    for d in deltas:
        joined[d.kind, d.call_index] = joined.get((d.kind, d.call_index), "") + d.text
    return joined, message


@every_template
@law
@given(data=st.data())
def test_chunks_do_not_matter(t, data):
    ids, declared = data.draw(turns(t)), data.draw(tools)
    joined, message = streamed(t.parser(3, declared), [ids])
    for chunks in (data.draw(chunked(ids)), [[i] for i in ids]):
        again, same = streamed(t.parser(3, declared), chunks)
        assert again == joined and exactly([same]) == exactly([message])


@every_template
@law
@given(data=st.data())
def test_what_was_streamed_is_what_the_message_says(t, data):
    joined, message = streamed(t.parser(0, data.draw(tools)), [data.draw(turns(t))])
    assert joined.get(("reasoning", 0), "") == message.reasoning
    assert joined.get(("content", 0), "") == message.content
    for i, call in enumerate(message.tool_calls):
        assert joined["tool_name", i] == call.name
        assert json.dumps(json.loads(joined["tool_arguments", i])) == json.dumps(call.arguments)


@every_template
@law
@given(message=assistants)
def test_a_well_formed_turn_reads_back_and_needs_no_verbatim(t, message):
    _, parsed = streamed(t.parser(), [t.sampled(message)])
    assert exactly([parsed]) == exactly([replace(message, reasoning="") if t in DIRECT else message])


@every_template
@law
@given(data=st.data())
def test_calls_are_numbered_on_from_those_before(t, data):
    _, message = streamed(t.parser(5), [data.draw(turns(t))])
    calls = message.tool_calls
    assert [c.id for c in calls] == [f"functions.{c.name}:{n}" for n, c in enumerate(calls, 5)]


@pytest.mark.parametrize("name", ["xtml", "chatml"])
def test_a_turn_cut_inside_a_character_leaves_its_bytes_to_verbatim(name):
    t = template(name, "bytes")
    ids = t.tokenizer.encode("ab🙂")[:-1]
    joined, message = streamed(t.parser(), [[i] for i in ids])
    assert message.reasoning == joined["reasoning", 0] == "ab"
    assert message.verbatim == tuple(ids)


@every_template
def test_after_the_stop_id_nothing_is_heard(t):
    ids = t.sampled(Message("assistant", "done"))
    joined, message = streamed(t.parser(), [[*ids, *t.tokenizer.encode("more")]])
    assert message.content == joined["content", 0] == "done"


def xtml_ids(*parts):
    """'<tag' opens, '/tag' closes, '.' ends the turn, anything else is text."""
    t = template("xtml")
    ids = []
    for part in parts:
        if part == ".":
            ids.append(t.END)
        elif part[0] in "</":
            ids += [t.OPEN if part[0] == "<" else t.CLOSE, *t.tokenizer.encode(part[1:]), t.SEP]
        else:
            ids += t.tokenizer.encode(part)
    return ids


CALL = '<call tool="f" index="1"'
NUMBER = '<argument key="n" type="number"'
STRING = '<argument key="s" type="string"'
XTML = {
    "response opens while think is open": (("hm", "<response", "hi", "."), "hm", "hi", []),
    "tools open while think is open": (("hm", "<tools", CALL, "."), "hm", "", [("f", {})]),
    "call without tools": (("/think", CALL, STRING, "v", "."), "", "", [("f", {"s": "v"})]),
    "call opens inside a call": (("<tools", CALL, STRING, "v", CALL, "."), "", "", [("f", {"s": "v"}), ("f", {})]),
    "argument inside an argument": (("<tools", CALL, STRING, "v", NUMBER, "1"), "", "", [("f", {"s": "v", "n": 1})]),
    "argument outside a call": (("<tools", STRING, "v", "/argument", "."), "", "", []),
    "bad number stays text": (("<tools", CALL, NUMBER, "twelve", "/argument", "."), "", "", [("f", {"n": "twelve"})]),
    "NaN is no JSON": (("<tools", CALL, NUMBER, "NaN", "."), "", "", [("f", {"n": "NaN"})]),
    "infinity is no JSON": (("<tools", CALL, NUMBER, "1e999", "."), "", "", [("f", {"n": "1e999"})]),
    "half a surrogate pair": (("<tools", CALL, NUMBER, '"\\ud800"', "."), "", "", [("f", {"n": '"\\ud800"'})]),
    "bottomless nesting": (("<tools", CALL, NUMBER, "[" * 1200, "."), "", "", [("f", {"n": "[" * 1200})]),
    "number written another way": (("<tools", CALL, NUMBER, "1.50", "."), "", "", [("f", {"n": 1.5})]),
    "string closed by the end of tools": (("<tools", CALL, STRING, "v", "/tools", "."), "", "", [("f", {"s": "v"})]),
    "amp and quot": (("<tools", '<call tool="&amp;quot;&quot;"', "."), "", "", [('&quot;"', {})]),
    "unknown elements are skipped": (("a", "<mood", "b", "/mood", "c", "."), "abc", "", []),
    "another message ends the turn": (("/think", "<response", "hi", '<message role="user"', "no"), "", "hi", []),
    "text between channels is nobody's": (("hm", "/think", "noise", "<response", "hi", "."), "hm", "hi", []),
    "closing what is not open": (("a", "/call", "/response", "b", "."), "ab", "", []),
    "cut": (("hm", "/think", "<response", "hi"), "hm", "hi", []),
}


@pytest.mark.parametrize("case", XTML)
def test_malformed_xtml_reads_as_well_as_it_can(case):
    check(template("xtml"), xtml_ids(*XTML[case][0]), *XTML[case][1:])


def chatml_ids(*parts, t=template("chatml")):
    """Parts that are markers become them, anything else is text."""
    marks = {mark for row in chatml.TABLE.values() for mark in row}
    return [i for p in parts for i in ([t.tokenizer.special(p)] if p in marks else t.tokenizer.encode(p))]


S, S_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
C, A, C_END, END = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>", "<|im_end|>"
BAD = chatml.UNREADABLE
CHATML = {
    "section opens while think is open": (("hm", S, C, "functions.f:0", A, "{}", C_END, S_END, END), "hm", [("f", {})]),
    "counter restarts": (("", S, C, "functions.f:7", A, "{}", C_END, S_END, END), "", [("f", {})]),
    "spaces": (("", S, C, " functions.f:0 ", A, ' {"a": 1} ', C_END, S_END, END), "", [("f", {"a": 1})]),
    "name with dash and dot": (("", S, C, "a-b.c:0", A, "{}", C_END, S_END, END), "", [("a-b.c", {})]),
    "no counter": (("", S, C, "functions.f", A, "{}", C_END, END), "", [("f", {})]),
    "call ends missing": (("", S, C, "f:0", A, '{"a":1}', C, "g:1", A, "{}", END), "", [("f", {"a": 1}), ("g", {})]),
    "bad JSON is left to the tool": (("", S, C, "f:0", A, '{"a":', C_END, S_END, END), "", [("f", {BAD: '{"a":'})]),
    "JSON that is no object": (("", C, "f:0", A, "[1]", C_END, END), "", [("f", {BAD: "[1]"})]),
    "NaN": (("", C, "f:0", A, '{"a":NaN}', C_END, END), "", [("f", {BAD: '{"a":NaN}'})]),
    "no arguments at all": (("", S, C, "f:0", C_END, S_END, END), "", [("f", {})]),
    "another message ends the turn": (("hm", "<|im_user|>", "no"), "hm", []),
}


@pytest.mark.parametrize("case", CHATML)
def test_malformed_chatml_reads_as_well_as_it_can(case):
    parts, reasoning, calls = CHATML[case]
    check(template("chatml"), chatml_ids(*parts), reasoning, "", calls)


DIALECTS = {
    ("k2", "markers of thinking are nobody's"): (("<think>", "Hi", END), "", "Hi", []),
    ("k2-thinking", "does not think"): (("Hi", END), "", "Hi", []),
    ("k2-thinking", "thinks late"): (("a", "<think>", "b", "</think>", "c", END), "b", "ac", []),
    ("k2-thinking", "calls while thinking"): (("<think>", "hm", S, C, "f:0", A, "{}", C_END, S_END, END), "hm", "", [("f", {})]),
    ("k2-thinking", "cut"): (("<think>", "hm"), "hm", "", []),
    ("k2.5", "calls while thinking"): (("hm", S, C, "f:0", A, "{}", C_END, S_END, END), "hm", "", [("f", {})]),
    ("k2.5", "two turns in one"): (("hm", "</think>", "a", END, "b", END), "hm", "a", []),
}  # fmt: skip


@pytest.mark.parametrize(("name", "case"), DIALECTS)
def test_each_dialect_reads_its_turns_as_well_as_it_can(name, case):
    t = template(name, "kimi")
    parts, *expected = DIALECTS[name, case]
    check(t, chatml_ids(*parts, t=t), *expected)


TOOLS = (
    ToolSpec("read", "", {"properties": {"path": {}, "lines": {}}, "required": ["path"]}),
    ToolSpec("write", "", {"properties": {"path": {}, "text": {}}, "required": ["path", "text"]}),
    ToolSpec("copy", "", {"properties": {"old": {}, "new": {}}}),
    ToolSpec("move", "", {"properties": {"old": {}, "new": {}}}),
    ToolSpec("odd", "", {"properties": [{}], "required": {}}),
    ToolSpec("odder", "", {"properties": {"path": {}, "old": {}}, "required": [[], {}]}),
    ToolSpec("oddest", "", []),
)


@pytest.mark.parametrize("bare", ["3", ":3", " functions.3 "])
@pytest.mark.parametrize(("arguments", "name"), [
    ('{"path":"a","lines":2}', "read"), ('{"path":"a","text":""}', "write"), ('{"path":"a"}', "read"),
])  # fmt: skip
def test_a_bare_counter_is_understood_by_its_arguments(bare, arguments, name):
    """As models call tools once an engine has shown them ids of its own making."""
    t = template("k2", "kimi")
    ids = chatml_ids(S, C, bare, A, arguments, C_END, S_END, END, t=t)
    for size in range(1, len(ids) + 1):
        joined, message = streamed(t.parser(4, TOOLS), [ids[i : i + size] for i in range(0, len(ids), size)])
        (call,) = message.tool_calls
        assert call.name == joined["tool_name", 0] == name and call.id == f"functions.{name}:4"
        assert json.loads(joined["tool_arguments", 0]) == call.arguments == json.loads(arguments)
        assert message.verbatim == tuple(ids)


@pytest.mark.parametrize("arguments", ['{"nobody":1}', "not json", '{"path":"a","text":"","lines":1}', '{"old":"a","new":"b"}', "{}"])
def test_a_bare_counter_that_fits_no_tool_or_more_than_one_stays_one(arguments):
    t = template("k2", "kimi")
    _, message = streamed(t.parser(0, TOOLS), [chatml_ids(S, C, "3", A, arguments, C_END, S_END, END, t=t)])
    assert [c.name for c in message.tool_calls] == ["3"]


LONG = "x\n" * 8000
FIXTURE = Message("assistant", "So: <|tool_call_begin|> and </think>", "first <|open|>think", (
    ToolCall("functions.a-b.c:0", "a-b.c", {"text": "<|tool_call_end|><|close|>argument<|sep|>\n", "n": [1, None]}),
    ToolCall("functions.list:1", "list", {}),
    ToolCall("functions.a-b.c:2", "a-b.c", {"text": "é🙂"}),
))  # fmt: skip


@every_template
def test_a_turn_reads_the_same_in_one_piece_and_cut_at_every_place(t):
    """Parallel calls, names with dashes and dots, markers as text: nothing of them leaks, nothing is taken for a marker."""
    expected = replace(FIXTURE, reasoning="") if t in DIRECT else FIXTURE
    ids = t.sampled(expected)
    whole = streamed(t.parser(), [ids])
    assert whole[1] == expected
    for cut in range(1, len(ids)):
        assert streamed(t.parser(), [ids[:cut], ids[cut:]]) == whole
    assert streamed(t.parser(), [[i] for i in ids]) == whole


@every_template
def test_arguments_have_no_longest_length(t):
    message = Message("assistant", "", "", (ToolCall("functions.write:0", "write", {"text": LONG}),))
    assert streamed(t.parser(), [t.sampled(message)])[1] == message


def check(t, ids, reasoning, content, calls):
    for size in range(1, min(len(ids), 20) + 1):
        _, message = streamed(t.parser(), [ids[i : i + size] for i in range(0, len(ids), size)])
        assert (message.reasoning, message.content) == (reasoning, content)
        assert [(c.name, c.arguments) for c in message.tool_calls] == calls
        assert message.verbatim == tuple(ids)


def test_string_arguments_stream_while_they_are_sampled():
    t = template("xtml", "bytes")
    parser, seen = t.parser(), ""
    ids = t.sampled(Message("assistant", tool_calls=(ToolCall("", "write", {"text": "one two"}),)))
    for token in ids[: len(ids) - ids[::-1].index(ord("e"))]:
        seen += "".join(d.text for d in parser.feed([token]) if d.kind == "tool_arguments")
    assert seen.startswith('{"text": "one')


@pytest.mark.parametrize("machine", [xtml, chatml], ids=["xtml", "chatml"])
def test_every_transition_leads_to_a_state_of_the_table(machine):
    assert set(machine.TABLE) == set(machine.NESTING)
    assert {to for row in machine.TABLE.values() for to in row.values()} <= set(machine.TABLE)
