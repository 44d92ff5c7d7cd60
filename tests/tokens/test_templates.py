"""What a template is besides its ids: a name and hash of its own, characters never shown broken."""

import pytest
from conversations import DIRECT, FORGETFUL, OURS, conversations, every_template, law, template
from hypothesis import given

from tidelock.tokens.errors import UserError
from tidelock.tokens.message import Message, ToolCall
from tidelock.tokens.template import canonical, get_template
from tidelock.tokens.tokenizer import ByteTokenizer


@every_template
def test_a_character_split_over_tokens_is_never_shown_broken(t):
    parser, shown = t.parser(), ""
    for token in t.sampled(Message("assistant", "naïve 🙂 汉字")):
        for delta in parser.feed([token]):
            assert "\ufffd" not in delta.text
            shown += delta.text
    assert shown == "naïve 🙂 汉字"


@law
@given(conversation=conversations)
def test_canonical_ids_follow_from_position_alone(conversation):
    """Ids that another engine minted are of no consequence."""
    foreign, given_as = [], {}
    for i, m in enumerate(conversation):
        calls = tuple(ToolCall(f"chatcmpl-tool-{i}{j}", c.name, c.arguments) for j, c in enumerate(m.tool_calls))
        given_as |= {c.id: f.id for c, f in zip(m.tool_calls, calls)}
        foreign.append(Message(m.role, m.content, m.reasoning, calls, given_as.get(m.tool_call_id), m.name, m.tools))
    assert canonical(foreign) == conversation


def test_the_hash_names_format_mode_and_tokenizer():
    templates = [*OURS, *DIRECT, *FORGETFUL]
    assert len({t.hash for t in templates}) == len(templates)
    assert get_template("xtml", ByteTokenizer()).hash == template("xtml", "bytes").hash


def test_a_model_is_another_name_for_its_format():
    for model, name in {"k3": "xtml", "k2.6": "chatml", "k2.7": "chatml"}.items():
        assert template(model).hash == template(name).hash


@pytest.mark.parametrize(("name", "thinking"), [("k2", True), ("k2-thinking", False), ("k2.7", False)])
def test_a_mode_a_model_does_not_have_is_refused(name, thinking):
    with pytest.raises(UserError, match=f"the {name} template has no mode"):
        template(name, "bytes", thinking)
