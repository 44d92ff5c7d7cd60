"""Templates: parse undoes render, longer conversations start with the ids of shorter ones, nothing sampled is lost."""

import json
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidelock.tokens.message import Message, ToolCall, ToolSpec
from tidelock.tokens.template import canonical, get_template
from tidelock.tokens.tokenizer import BPETokenizer, ByteTokenizer

MARKERS = ["<|open|>", "<|close|>message<|sep|>", "<|end_of_msg|>", "<think>", "</think>", "<|im_end|>", "&quot;", '"',
           "<|tool_calls_section_begin|>", "## Return of functions.a:0\n", "\n", " ", "\x00", "é🙂", "&amp;"]  # fmt: skip
BPE = BPETokenizer.train(['message role="assistant" the quick brown fox "key" 123\n'] * 50, 400)
TEMPLATES = [get_template(name, tok) for name in ("xtml", "chatml") for tok in (ByteTokenizer(), BPE)]
every_template = pytest.mark.parametrize("template", TEMPLATES, ids=["xtml-bytes", "xtml-bpe", "chatml-bytes", "chatml-bpe"])

text = st.lists(st.one_of(st.sampled_from(MARKERS), st.text(st.characters(exclude_categories=["Cs"]), max_size=8)),
                max_size=4).map("".join)  # fmt: skip
name = st.from_regex(r"[a-z_][a-z0-9_.\-]{0,8}", fullmatch=True).filter(lambda s: s not in ("system", "tool_declare"))
value = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(10**30), 10**30), st.floats(allow_nan=False, allow_infinity=False), text),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(text, inner, max_size=3)), max_leaves=5,
)  # fmt: skip
arguments = st.dictionaries(text.filter(bool), value, max_size=3)


@st.composite
def conversations(draw):
    tools = tuple(ToolSpec(n, draw(text), {"type": "object", "properties": {}}) for n in draw(st.lists(name, max_size=2)))
    out = [Message("system", draw(text), tools=tools)] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        out.append(Message("user", draw(text)))
        for _ in range(draw(st.integers(0, 2))):
            calls = tuple(ToolCall("", draw(name), draw(arguments)) for _ in range(draw(st.integers(0, 3))))
            out.append(Message("assistant", draw(text), draw(text), calls))
            out += [Message("tool", draw(text), name=c.name) for c in calls]
    return canonical(out)


@every_template
@settings(max_examples=100, deadline=None)
@given(messages=conversations())
def test_parse_undoes_render(template, messages):
    assert template.parse(template.render(messages)) == messages


@every_template
@settings(max_examples=60, deadline=None)
@given(messages=conversations())
def test_the_rendering_of_a_beginning_is_the_beginning_of_the_rendering(template, messages):
    whole = template.render(messages)
    for k in range(len(messages) + 1):
        part = template.render(messages[:k])
        assert whole[: len(part)] == part
        assert template.extend(part, messages[:k], messages[k:]) == whole


def joined(deltas):
    out = defaultdict(str)
    for d in deltas:
        out[d.kind, d.call_index] += d.text
    return dict(out)


@every_template
@settings(max_examples=80, deadline=None)
@given(messages=conversations(), cuts=st.lists(st.integers(0, 400), max_size=6))
def test_any_chunking_streams_the_same_message(template, messages, cuts):
    for m in messages:
        if m.role != "assistant":
            continue
        sampled = template.sampled(m)
        edges = sorted({0, len(sampled), *(c % (len(sampled) + 1) for c in cuts)})
        whole, chunked, single = template.parser(), template.parser(), template.parser()
        expected = joined(whole.feed(sampled))
        assert joined(d for a, b in zip(edges, edges[1:]) for d in chunked.feed(sampled[a:b])) == expected
        assert joined(d for t in sampled for d in single.feed([t])) == expected
        assert whole.finish() == chunked.finish() == single.finish()
        assert expected.get(("reasoning", 0), "") == m.reasoning and expected.get(("content", 0), "") == m.content
        for i, call in enumerate(m.tool_calls):
            assert json.loads(expected["tool_arguments", i]) == call.arguments
            assert expected["tool_name", i] == call.name


@every_template
@settings(max_examples=120, deadline=None)
@given(messages=conversations(), cut=st.integers(0, 10_000), noise=st.lists(st.integers(0, 399), max_size=12))
def test_whatever_was_sampled_renders_back_to_its_ids(template, messages, cut, noise):
    """Cut or garbled turns too: the ids are kept, also when the conversation goes on."""
    vocabulary = template.tokenizer.vocab_size
    turns = [m for m in messages if m.role == "assistant"] or [Message("assistant", "x")]
    sampled = template.sampled(turns[0])
    for ids in (sampled[: cut % (len(sampled) + 1)], [i % vocabulary for i in noise], sampled + [i % vocabulary for i in noise]):
        parser = template.parser()
        parser.feed(ids)
        message = parser.finish()
        history = [Message("user", "q"), message]
        rendered = template.render(history)
        assert rendered == template.render(history[:1], generation_prompt=True) + ids
        assert template.extend(rendered, history, [Message("user", "go on")])[: len(rendered)] == rendered


def test_a_character_split_over_tokens_is_never_shown_broken():
    template = TEMPLATES[0]
    parser, shown = template.parser(), ""
    for token in template.sampled(Message("assistant", "naïve 🙂 汉字")):
        for delta in parser.feed([token]):
            assert "\ufffd" not in delta.text
            shown += delta.text
    assert shown == "naïve 🙂 汉字"


def test_opening_a_later_channel_ends_an_unclosed_one():
    t = TEMPLATES[0]
    parser = t.parser()
    parser.feed([*t.tokenizer.encode("hm"), *t._open("response"), *t.tokenizer.encode("yes"), t.END])
    message = parser.finish()
    assert (message.reasoning, message.content) == ("hm", "yes") and message.verbatim is not None


@every_template
@settings(max_examples=60, deadline=None)
@given(messages=conversations())
def test_canonical_ids_follow_from_position_alone(template, messages):
    assert canonical(messages) == messages
    foreign = [Message(m.role, m.content, m.reasoning, tuple(ToolCall(f"call_{i}{j}", c.name, c.arguments)
               for j, c in enumerate(m.tool_calls)), None, m.name, m.tools) for i, m in enumerate(messages)]  # fmt: skip
    assert canonical(foreign) == messages


@every_template
def test_the_hash_names_format_and_tokenizer(template):
    assert len({t.hash for t in TEMPLATES}) == len(TEMPLATES)
    assert get_template(template.name, template.tokenizer).hash == template.hash
