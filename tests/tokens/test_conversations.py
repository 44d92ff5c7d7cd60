"""Rendering and parsing under any names, keys, types and orders, and under anything a model may have sampled."""

import pytest
from conversations import (
    FORGETFUL, OURS, assistants, conversations, every_forgetful_template, every_stable_template, every_template, exactly,
    law, malformed, messages, shown, these, turns,
)
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from tidelock.tokens.errors import NotAnExtension, UserError
from tidelock.tokens.message import Message, ToolCall, ToolSpec
from tidelock.tokens.template import canonical, count_calls, get_template
from tidelock.tokens.tokenizer import ByteTokenizer


@every_template
@law
@given(conversation=conversations)
def test_parse_is_the_inverse_of_render(t, conversation):
    """Up to the reasoning that a model is not shown."""
    assert exactly(t.parse(t.render(conversation))) == exactly(shown(t, conversation))


@every_stable_template
@law
@given(conversation=conversations)
def test_a_longer_conversation_starts_with_the_ids_of_the_shorter_one(t, conversation):
    whole = t.render(conversation)
    for k in range(len(conversation) + 1):
        start = t.render(conversation[:k])
        assert whole[: len(start)] == start
        assert t.extend(start, conversation[:k], conversation[k:]) == whole


@every_forgetful_template
@law
@given(conversation=conversations, called=st.booleans())
def test_a_template_that_forgets_extends_exactly_or_refuses(t, conversation, called):
    if called:  # one task, no answer yet: nothing is forgotten, so nothing is refused
        conversation = [m for m in conversation if m.role != "assistant" or m.tool_calls]
        conversation = canonical(conversation)
    whole = t.render(conversation)
    for k in range(len(conversation) + 1):
        start = t.render(conversation[:k])
        try:
            assert t.extend(start, conversation[:k], conversation[k:]) == whole
        except NotAnExtension:
            assert not called and whole[: len(start)] != start


@every_forgetful_template
@law
@given(conversation=conversations, data=st.data())
def test_before_the_answer_a_turn_stays_as_sampled_and_after_it_only_its_reasoning_is_gone(t, conversation, data):
    prompt = t.render(conversation, generation_prompt=True)
    parser = t.parser(count_calls(conversation))
    parser.feed(data.draw(turns(t)))
    message, user = parser.finish(), Message("user", "next")
    if message.tool_calls:
        sampled = [*prompt, *parser.ids]
        assert t.extend(sampled, [*conversation, message], [user])[: len(sampled)] == sampled
    else:
        after = t.render([*conversation, message, user])
        assert after == t.render([*shown(t, [*conversation, message]), user]) or message.verbatim
        answer = t.render([user, message])[len(t.render([user], generation_prompt=True)) :]
        assert is_subsequence(answer, parser.ids if message.verbatim else t.sampled(message))
        assert not any(m.reasoning for m in t.parse(t.render([user, message])))


def is_subsequence(short, long):
    rest = iter(long)
    return all(i in rest for i in short)


@every_template
@law
@given(message=messages)
def test_no_text_can_add_a_special_id(t, message):
    """Every text of a message replaced by a harmless one: the markers stay exactly what they were."""
    (message,) = canonical([message])
    if message.role == "assistant":
        calls = tuple(ToolCall(c.id, "x", {str(i): 0 for i in range(len(c.arguments))}) for c in message.tool_calls)
        plain = Message("assistant", "x", "x", calls)
    elif message.role == "system":
        plain = Message("system", "x" if message.content else "", tools=(ToolSpec("x", "x", {}),) * len(message.tools))
    else:
        plain = Message(message.role, "x", tool_call_id=message.tool_call_id, name=message.name and "x")
    marks = [[i for i in t.render([m]) if t.tokenizer.is_special(i)] for m in (message, plain)]
    assert marks[0] == marks[1]


@law
@given(conversation=st.lists(messages, max_size=6))
def test_canonical_is_idempotent_and_numbers_calls_through_the_conversation(conversation):
    once = canonical(conversation)
    assert canonical(once) == once
    calls = [c for m in once for c in m.tool_calls]
    assert [c.id for c in calls] == [f"functions.{c.name}:{n}" for n, c in enumerate(calls)]


@every_template
def test_results_come_in_the_order_of_their_calls_whatever_order_they_were_given_in(t):
    earlier, a, b = ToolCall("x", "f", {}), ToolCall("a", "first", {}), ToolCall("b", "second", {})
    conversation = canonical([
        Message("assistant", tool_calls=(earlier,)), Message("tool", "0", tool_call_id="x"),
        Message("assistant", tool_calls=(a, b)),
        Message("tool", "2", tool_call_id="b"), Message("tool", "1", tool_call_id="a"),
    ])  # fmt: skip
    parsed = t.parse(t.render(conversation))
    assert [(m.tool_call_id, m.name, m.content) for m in parsed[3:]] == [
        ("functions.first:1", "first", "1"),
        ("functions.second:2", "second", "2"),
    ]


@every_stable_template
@law
@given(conversation=conversations, data=st.data())
def test_what_was_sampled_stays_as_it_was_in_every_later_rendering(t, conversation, data):
    """Malformed, cut, foreign splits: the ids come back untouched, and `verbatim` is set only where it is needed."""
    sampled = data.draw(turns(t))
    parser = t.parser(count_calls(conversation))
    parser.feed(sampled)
    message = parser.finish()
    whole = t.render([*conversation, message])
    assert whole == t.render(conversation, generation_prompt=True) + sampled
    text_only = t.sampled(Message("assistant", message.content, message.reasoning, message.tool_calls))
    assert (message.verbatim is None) == (text_only == sampled)


@every_template
@law
@given(conversation=conversations, data=st.data())
def test_a_conversation_with_a_cut_turn_parses_to_itself(t, conversation, data):
    turn = t.sampled(data.draw(assistants))
    parser = t.parser(count_calls(conversation))
    parser.feed(turn[: data.draw(st.integers(0, len(turn)))])
    whole = [*conversation, parser.finish(), Message("user", "go on")]
    parsed, expected = t.parse(t.render(whole)), shown(t, whole)
    if t in FORGETFUL:  # what is left of a cut turn without its reasoning may be a whole one
        parsed, expected = ([replace(m, verbatim=None) for m in side] for side in (parsed, expected))
    assert exactly(parsed) == exactly(expected)


@every_template
@law
@given(data=st.data())
def test_parsing_whatever_follows_a_first_message_never_raises(t, data):
    t.parse(t.render([Message("user", "hi")], generation_prompt=True) + data.draw(malformed(t)))


@every_template
def test_ids_that_are_no_conversation_are_refused(t):
    assert t.parse([]) == []
    with pytest.raises(UserError, match=t.name):
        t.parse(t.tokenizer.encode("hello"))


@these(*OURS)
def test_a_declaration_without_text_adds_no_empty_system_prompt(t):
    tools = (ToolSpec("f", "does f", {"type": "object"}),)
    text = t.render([Message("system", "be brief")])
    assert t.render([Message("system", "be brief", tools=tools)]) == t.render([Message("system", tools=tools)]) + text


@pytest.mark.parametrize("name", ["xtml", "chatml"])
def test_text_that_is_not_unicode_is_rendered_all_the_same(name):
    """Tool results may be read from files with `surrogateescape`."""
    t = get_template(name, ByteTokenizer())
    assert t.parse(t.render([Message("user", "a\ud800b")])) == [Message("user", "a\ufffdb")]


def test_an_unknown_template_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match="chatml, k2, k2-thinking, k2.5, k2.6, k2.7, k3, xtml"):
        get_template("jinja", ByteTokenizer())
