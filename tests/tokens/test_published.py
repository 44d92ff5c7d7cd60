"""The published formats to the letter, as the model reference quotes them (sections 1.10, 2 and 6.7).

Texts are compared with the markers spelled out, ids by `test_conversations`.
"""

import json

import pytest
from conversations import arguments, law, names, template
from hypothesis import given
from hypothesis import strategies as st

from tidelock.tokens.directives import (
    as_parameters,
    response_format,
    thinking_effort,
    tool_choice,
)
from tidelock.tokens.errors import NotAnExtension, UserError
from tidelock.tokens.message import Message, ToolCall, ToolSpec

WEATHER = ToolSpec("get_weather", "Weather of a city", {"type": "object", "properties": {"city": {"type": "string"}}})
TYPE_FIRST = (
    '[{"type":"function","function":{"name":"get_weather","description":"Weather of a city",'
    '"parameters":{"type":"object","properties":{"city":{"type":"string"}}}}}]'
)
SORTED = (
    '[{"function":{"description":"Weather of a city","name":"get_weather",'
    '"parameters":{"properties":{"city":{"type":"string"}},"type":"object"}},"type":"function"}]'
)
ASK = [
    Message("system", tools=(WEATHER,)),
    Message("user", "Hi"),
    Message("assistant", "Let me look.", "a city", (ToolCall("functions.get_weather:0", "get_weather", {"city": "Beijing"}),)),
    Message("tool", '{"weather":"Sunny"}', tool_call_id="functions.get_weather:0", name="get_weather"),
]
ANSWERED = [*ASK, Message("assistant", "Sunny.", "easy"), Message("user", "And there?")]


def text(t, messages, prompt=True):
    return t.tokenizer.decode(t.render(messages, prompt))


def k2_line(declaration, system, looks, answers, prompt, user="<|im_user|>user<|im_middle|>{}<|im_end|>"):
    call = (
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
        '{"city":"Beijing"}<|tool_call_end|><|tool_calls_section_end|><|im_end|>'
    )
    header = "<|im_assistant|>assistant<|im_middle|>"
    result = '<|im_system|>get_weather<|im_middle|>## Return of functions.get_weather:0\n{"weather":"Sunny"}<|im_end|>'
    out = f"<|im_system|>tool_declare<|im_middle|>{declaration}<|im_end|>{system}{user.format('Hi')}"
    out += f"{header}{looks}Let me look.{call}{result}"
    if answers is not None:
        out += f"{header}{answers}Sunny.<|im_end|>{user.format('And there?')}"
    return out + header + prompt


KIMI = "<|im_system|>system<|im_middle|>You are Kimi, an AI assistant created by Moonshot AI.<|im_end|>"
NONE, LOOKS, EASY = "<think></think>", "<think>a city</think>", "<think>easy</think>"
EXPECTED = {  # (template, thinking): the prompt before the answer, the prompt after it
    ("k2", None): (k2_line(TYPE_FIRST, KIMI, "", None, ""), k2_line(TYPE_FIRST, KIMI, "", "", "")),
    ("k2-thinking", None): (
        k2_line(TYPE_FIRST, KIMI, LOOKS, None, ""), k2_line(TYPE_FIRST, KIMI, NONE, NONE, "")
    ),
    ("k2.5", None): (k2_line(SORTED, "", LOOKS, None, "<think>"), k2_line(SORTED, "", NONE, NONE, "<think>")),
    ("k2.5", False): (k2_line(SORTED, "", NONE, None, NONE), k2_line(SORTED, "", NONE, NONE, NONE)),
    ("k2.6", None): (k2_line(SORTED, "", LOOKS, None, "<think>"), k2_line(SORTED, "", LOOKS, EASY, "<think>")),
}  # fmt: skip


@pytest.mark.parametrize(("name", "thinking"), EXPECTED)
def test_the_k2_line_to_the_letter(name, thinking):
    t = template(name, "bytes", thinking)
    assert (text(t, ASK), text(t, ANSWERED)) == EXPECTED[name, thinking]


def test_a_system_prompt_replaces_k2s_own_and_k2s_own_reads_as_none():
    t = template("k2", "bytes")
    own = [Message("system", "Be brief."), Message("user", "Hi")]
    assert "Kimi" not in text(t, own) and t.parse(t.render(own)) == own
    assert text(t, own[1:]).startswith(KIMI) and t.parse(t.render(own[1:])) == own[1:]
    assert t.parse(t.render(ASK)) == [*ASK[:2], Message("assistant", ASK[2].content, "", ASK[2].tool_calls), ASK[3]]
    with_tools = [Message("system", "Be brief.", tools=(WEATHER,)), Message("user", "Hi")]
    assert "Kimi" not in text(t, with_tools) and t.parse(t.render(with_tools)) == with_tools


@pytest.mark.parametrize("name", ["k2-thinking", "k2.5"])
def test_a_second_question_is_refused_by_the_ids_of_the_first_where_reasoning_is_forgotten(name):
    t = template(name, "bytes")
    assert not t.prefix_stable
    episode = t.extend([], [], ASK[:2], generation_prompt=True) + t.sampled(ASK[2])
    episode = t.extend(episode, ASK[:3], ASK[3:], generation_prompt=True) + t.sampled(ANSWERED[4])
    with pytest.raises(NotAnExtension, match=name):
        t.extend(episode, ANSWERED[:5], ANSWERED[5:])


XTML_HEAD = (
    '<|open|>message role="system" type="tool-declare"<|sep|># Tools\nHere are the available tools, described in '
    f"JSONSchema.\n\n```json\n{SORTED}\n```<|close|>message<|sep|><|end_of_msg|>"
    '<|open|>message role="system" type="thinking-effort"<|sep|>`thinking_effort` guides on how much to think in your '
    "thinking channel (not including the response channel), supported values include `low`, `medium`, `high`, and `max`.\n"
    "Now the system is invoked with `thinking_effort=max`.<|close|>message<|sep|><|end_of_msg|>"
    '<|open|>message role="user"<|sep|>Hi<|close|>message<|sep|><|end_of_msg|>'
    '<|open|>message role="assistant"<|sep|>'
)
XTML_TAIL = (
    "<|open|>response<|sep|>Let me look.<|close|>response<|sep|><|open|>tools<|sep|>"
    '<|open|>call tool="get_weather" index="1"<|sep|><|open|>argument key="city" type="string"<|sep|>Beijing'
    "<|close|>argument<|sep|><|close|>call<|sep|><|close|>tools<|sep|><|close|>message<|sep|><|end_of_msg|>"
    '<|open|>message role="tool" tool="get_weather" index="1"<|sep|>{"weather":"Sunny"}<|close|>message<|sep|><|end_of_msg|>'
    '<|open|>message role="assistant"<|sep|>'
)


def test_k3_to_the_letter():
    conversation = [ASK[0], thinking_effort("max"), *ASK[1:]]
    thinks, direct = template("k3", "bytes"), template("k3", "bytes", False)
    think = "<|open|>think<|sep|>a city<|close|>think<|sep|>"
    assert text(thinks, conversation) == XTML_HEAD + think + XTML_TAIL + "<|open|>think<|sep|>"
    assert text(direct, conversation) == XTML_HEAD + XTML_TAIL + "<|open|>response<|sep|>"


def test_k3_values_are_typed_and_attributes_escaped():
    call = ToolCall("functions.f:0", 'f"&', {"a": "1", "b": 1, "c": True, "d": None, "e": {"x": 1}, "f": [1, "y"]})
    said = text(template("k3", "bytes"), [Message("assistant", "", "", (call,))], False)
    assert '<|open|>call tool="f&quot;&amp;" index="1"<|sep|>' in said
    for key, kind, value in (("a", "string", "1"), ("b", "number", "1"), ("c", "boolean", "true"), ("d", "null", "null"),
                             ("e", "object", '{"x":1}'), ("f", "array", '[1,"y"]')):  # fmt: skip
        assert f'<|open|>argument key="{key}" type="{kind}"<|sep|>{value}<|close|>argument<|sep|>' in said


def test_k3_sorts_results_into_call_order_by_opaque_ids():
    calls = (ToolCall("x9", "f", {}), ToolCall("call_b", "g", {}))
    results = [Message("tool", "of g", tool_call_id="call_b"), Message("tool", "of f", tool_call_id="x9")]
    said = text(template("k3", "bytes"), [Message("assistant", tool_calls=calls), *results])
    assert said.index("of f") < said.index("of g") and 'index="2"<|sep|>of g' in said


def test_k3_tools_that_come_later_say_so():
    t = template("k3", "bytes")
    conversation = [ASK[0], ASK[1], Message("system", tools=(ToolSpec("late", "", {}),))]
    said = text(t, conversation)
    assert "## New Tools Available\nThe system dynamically extends the toolset via lazy-loading." in said
    assert t.parse(t.render(conversation)) == conversation


def test_directives_are_named_messages_that_say_what_holds():
    with pytest.raises(UserError, match="'much'; choose one of"):
        thinking_effort("much")
    said = {tool_choice(choice).content for choice in ("required", "none", "look", "looks")}
    assert len(said) == 4 and all("`look`" in text for text in said if "look" in text and "looks" not in text)
    assert '{"properties":{},"type":"object"}' in response_format({"type": "object", "properties": {}}).content
    assert {m.name for m in (tool_choice("none"), response_format())} == {"tool-choice", "response-format"}


@law
@given(st.sampled_from(["required", "none", "a`b", "x` and no other."]) | names.filter(bool), st.none() | arguments)
def test_a_server_that_speaks_text_gets_the_parameters_back(choice, schema):
    said = [thinking_effort("low"), Message("user", "q"), tool_choice(choice), response_format(schema)]
    parameters = as_parameters(said)
    named = {"type": "function", "function": {"name": choice}}
    assert parameters["tool_choice"] == (choice if choice in ("required", "none") else named)
    form = parameters["response_format"]
    assert form["type"] == ("json_object" if schema is None else "json_schema")
    assert schema is None or exactly_json(form["json_schema"]["schema"]) == exactly_json(schema)
    assert as_parameters(said[:2]) == {}


def exactly_json(value):
    return json.dumps(value, sort_keys=True)


def test_a_tokenizer_without_the_markers_is_refused():
    from tidelock.tokens.kimi import KimiTokenizer
    from tidelock.tokens.template import get_template

    bytes_only = KimiTokenizer({bytes([b]): b for b in range(256)})
    get_template("k2-thinking", bytes_only)
    with pytest.raises(UserError, match=r"no special token '<\|open\|>'"):
        get_template("k3", bytes_only)
