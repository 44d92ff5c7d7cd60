"""What the Responses API's clients send back and declare beside plain functions: references, sealed thoughts, custom tools."""

from __future__ import annotations

import json

import openai
import pytest

from tidelock.service.surfaces import custom_tools
from tidelock.tokens.message import Message, ToolCall

NOTE = {"type": "custom", "name": "note", "description": "Takes a note."}
LOOKUP = {"type": "function", "name": "lookup", "parameters": {"type": "object", "properties": {}}, "strict": False}
TEXT = 'a "quoted"\nline \\ of ünïcödé 🌊'
CALL = Message("assistant", "", "so be it", (custom_tools.call("functions.note:0", "note", TEXT),))


def said(service) -> str:
    return service.state.template.tokenizer.decode(service.policy.prompts[-1])


@pytest.mark.parametrize("template", ["xtml", "chatml"], indirect=True)
def test_a_custom_tool_is_called_with_text_whole_and_streamed(service):
    service.policy.turns = [CALL, CALL, Message("assistant", "noted")]
    api = service.client(_strict_response_validation=True)
    whole = api.responses.create(model="tide", input="note it", tools=[NOTE])
    call = whole.output[1]
    assert (call.type, call.name, call.input, call.call_id) == ("custom_tool_call", "note", TEXT, "functions.note:0")
    assert whole.tools[0].type == "custom" and whole.tools[0].format.type == "text"
    events = list(api.responses.create(model="tide", input="note it", tools=[NOTE], stream=True))
    assert events[-1].response.output[1].input == TEXT
    assert "".join(e.delta for e in events if e.type == "response.custom_tool_call_input.delta") == TEXT
    (done,) = [e for e in events if e.type == "response.custom_tool_call_input.done"]
    assert done.input == TEXT and not any("function_call" in e.type for e in events)
    back = [{"role": "user", "content": "note it"}, *(item.model_dump(exclude_none=True) for item in whole.output),
            {"type": "custom_tool_call_output", "call_id": call.call_id, "output": "it is on paper"}]  # fmt: skip
    answer = api.responses.create(model="tide", input=back, tools=[NOTE])
    assert answer.output_text == "noted" and "it is on paper" in said(service)
    assert service.policy.prompts[-1][: len(service.policy.prompts[0])] == service.policy.prompts[0]  # the cache's


@pytest.mark.parametrize("length", range(0, 60, 3))
def test_of_a_custom_call_that_is_cut_the_text_so_far_remains(length):
    arguments = json.dumps({"input": TEXT})
    assert TEXT.startswith(custom_tools.text_of(arguments[:length]))
    assert custom_tools.text_of(arguments) == TEXT


def test_a_grammar_is_held_to_or_refused(service):
    api = service.client()
    lark = {"type": "grammar", "syntax": "lark", "definition": 'start: "a"'}
    with pytest.raises(openai.BadRequestError, match="lark"):
        api.responses.create(model="tide", input="hi", tools=[{**NOTE, "format": lark}])
    lenient = {"x-tidelock-profile": "lenient"}
    answer = api.responses.create(model="tide", input="hi", tools=[{**NOTE, "format": lark}], extra_headers=lenient)
    assert answer.tools[0].format.definition == 'start: "a"' and "lark grammar" in said(service)
    regex = custom_tools.spec("n", "", custom_tools.TextFormat("grammar", "regex", "a+|b"), "", False)
    assert regex.parameters["properties"]["input"]["pattern"] == "^(?:a+|b)$"


def test_an_item_that_is_stored_may_be_referred_to(service):
    call = ToolCall("functions.lookup:0", "lookup", {})
    service.policy.turns = [Message("assistant", "one moment", "let me see", (call,)), Message("assistant", "found")]
    api = service.client()
    first = api.responses.create(model="tide", input="find it", tools=[LOOKUP])
    back = [{"role": "user", "content": "find it"}, *({"type": "item_reference", "id": item.id} for item in first.output),
            {"type": "function_call_output", "call_id": call.id, "output": "here"}]  # fmt: skip
    assert api.responses.create(model="tide", input=back, tools=[LOOKUP]).output_text == "found"
    assert all(words in said(service) for words in ("let me see", "one moment", "here"))
    untyped = [back[0], *({"id": item.id} for item in first.output), back[-1]]
    api.responses.create(model="tide", input=untyped, tools=[LOOKUP])
    assert service.policy.prompts[-1] == service.policy.prompts[-2]
    with pytest.raises(openai.BadRequestError, match="msg_0_0"):
        api.responses.create(model="tide", input=[{"type": "item_reference", "id": "msg_0_0"}])


def test_a_sealed_thought_comes_back_without_its_summary(service):
    service.policy.turns = [Message("assistant", "hello", "what to säy 🌊")]
    api = service.client()
    first = api.responses.create(model="tide", input="hi", store=False, include=["reasoning.encrypted_content"])
    thought, message = (item.model_dump(exclude_none=True) for item in first.output)
    assert "encrypted_content" not in api.responses.create(model="tide", input="hi").output[0].model_fields_set
    for summary in ([], thought["summary"]):
        back = [{"role": "user", "content": "hi"}, {**thought, "summary": summary}, message, {"role": "user", "content": "and?"}]
        api.responses.create(model="tide", input=back)
        assert "what to säy 🌊" in said(service)
    with pytest.raises(openai.BadRequestError, match="not made here"):
        api.responses.create(model="tide", input=[{**thought, "summary": [], "encrypted_content": "!!"}, *back[-1:]])


def test_tools_that_are_not_allowed_are_not_offered(service):
    api = service.client()
    other = {**LOOKUP, "name": "other_tool"}
    choice = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "lookup"}]}
    answer = api.responses.create(model="tide", input="hi", tools=[LOOKUP, other], tool_choice=choice)
    assert "lookup" in said(service) and "other_tool" not in said(service)
    assert [tool.name for tool in answer.tools] == ["lookup", "other_tool"]
    with pytest.raises(openai.BadRequestError):
        api.responses.create(model="tide", input="hi", tools=[LOOKUP], tool_choice={**choice, "mode": "required", "tools": []})


def test_input_items_are_listed_in_pages(service):
    api = service.client()
    items = [{"role": "user", "content": str(n)} for n in range(5)]
    answer = api.responses.create(model="tide", input=items)
    page = api.responses.input_items.list(answer.id, limit=2, order="asc")
    assert page.has_more and [item.content[0].text for item in page.data] == ["0", "1"]
    assert [item.content[0].text for item in api.responses.input_items.list(answer.id, limit=2, order="asc")] == list("01234")


@pytest.mark.parametrize("path", ["/responses", "/responses/compact", "/responses/input_tokens"])
def test_a_lenient_server_too_wants_to_know_the_model_of_what_it_is_given(service, path):
    headers = {"x-tidelock-profile": "lenient"}
    with pytest.raises(openai.BadRequestError, match="model"):
        service.client().post(path, cast_to=object, body={"input": "hi"}, options={"headers": headers})


def test_a_prompt_that_is_kept_elsewhere_is_refused(service):
    with pytest.raises(openai.BadRequestError, match="no prompts are kept here"):
        service.client().responses.create(model="tide", input="hi", prompt={"id": "pmpt_1"})


@pytest.mark.parametrize("fields", [{"truncation": "middle"}, {"text": {"verbosity": "chatty"}}])
def test_what_an_answer_repeats_must_be_a_word_of_the_api(service, fields):
    with pytest.raises(openai.BadRequestError):
        service.client().responses.create(model="tide", input="hi", **fields)
