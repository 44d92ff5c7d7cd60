"""The Responses API as the official `openai` client sees it: typed, in order, stored and continued."""

from __future__ import annotations

import json

import httpx2 as httpx
import openai
import pytest

from tidelock.tokens.message import Message, ToolCall

TOOL = {"type": "function", "name": "lookup", "description": "Look up.", "strict": False,
        "parameters": {"type": "object", "properties": {"key": {"type": "string"}}}}  # fmt: skip
CALL = ToolCall("functions.lookup:0", "lookup", {"key": 'a "b"', "n": [1, {"x": None}]})
TURN = Message("assistant", "looking", reasoning="let me see", tool_calls=(CALL,))
# what every response says, whatever its state (OpenResponses)
ALWAYS = {
    "id", "object", "created_at", "completed_at", "status", "incomplete_details", "model", "previous_response_id",
    "instructions", "output", "error", "tools", "tool_choice", "truncation", "parallel_tool_calls", "text", "top_p",
    "presence_penalty", "frequency_penalty", "top_logprobs", "temperature", "reasoning", "usage", "max_output_tokens",
    "max_tool_calls", "store", "background", "service_tier", "metadata", "safety_identifier", "prompt_cache_key",
}  # fmt: skip


def client(service, secret: str | None = None, **options) -> openai.OpenAI:
    return service.client(secret, _strict_response_validation=True, **options)


def raw(service, body: dict, secret: str | None = None, **headers) -> httpx.Response:
    headers = {"authorization": f"Bearer {secret or service.key()}", **headers}
    return httpx.post(service.running.base_url + "/responses", json={"model": "tide", "input": "hi", **body}, headers=headers)


def test_an_answer_is_items_and_a_usage_that_adds_up(service):
    service.policy.turns, service.policy.cached_tokens = [TURN], 7
    answer = client(service).responses.create(model="tide", input="hi", tools=[TOOL], instructions="be brief")
    thought, message, call = answer.output
    assert [part.text for part in thought.summary] == ["let me see"]
    assert answer.output_text == "looking" and message.status == "completed"
    assert (call.name, json.loads(call.arguments), call.call_id) == ("lookup", CALL.arguments, CALL.id)
    usage = answer.usage
    assert usage.input_tokens == len(service.policy.prompts[0]) and usage.input_tokens_details.cached_tokens == 7
    assert usage.output_tokens == len(service.policy.sampled[0]) == usage.total_tokens - usage.input_tokens
    assert 0 < usage.output_tokens_details.reasoning_tokens < usage.output_tokens
    assert answer.status == "completed" and answer.instructions == "be brief"
    assert ALWAYS <= answer.model_dump().keys() | raw(service, {}).json().keys()


def test_an_answer_cut_at_the_limit_is_incomplete(service):
    answer = client(service).responses.create(model="tide", input="hi", max_output_tokens=8)
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    events = list(client(service).responses.create(model="tide", input="hi", max_output_tokens=8, stream=True))
    assert events[-1].type == "response.incomplete"


@pytest.mark.parametrize("template", ["xtml", "chatml"], indirect=True)
def test_events_are_numbered_in_order_and_join_to_the_whole(service):
    service.policy.turns = [TURN]
    api = client(service)
    whole = api.responses.create(model="tide", input="hi", tools=[TOOL])
    events = list(api.responses.create(model="tide", input="hi", tools=[TOOL], stream=True))
    kinds = [event.type for event in events]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert kinds[:2] == ["response.created", "response.in_progress"] and kinds[-1] == "response.completed"
    items: dict[int, list] = {}
    for event in events[2:-1]:
        items.setdefault(event.output_index, []).append(event)
    assert list(items) == [0, 1, 2]
    for (index, own), done in zip(items.items(), whole.output, strict=True):
        assert own[0].type == "response.output_item.added" and own[-1].type == "response.output_item.done"
        text = "".join(event.delta for event in own if event.type.endswith(".delta"))
        (end,) = [e for e in own if e.type.endswith(("text.done", "arguments.done"))]
        assert text == (getattr(end, "text", None) or end.arguments)
        if index == 2:
            assert json.loads(text) == json.loads(done.arguments)
        assert all(event.item_id == own[0].item.id for event in own[1:-1])
    assert events[-1].response.output_text == whole.output_text == "looking"
    said = raw(service, {"stream": True}).text
    assert said.rstrip().endswith("data: [DONE]")
    assert [line[7:] for line in said.splitlines() if line.startswith("event: ")][0] == "response.created"


def test_a_previous_response_is_continued_by_its_ids(service):
    service.policy.turns = [TURN, Message("assistant", "42"), Message("assistant", "bye")]
    api = client(service)
    first = api.responses.create(model="tide", input="hi", tools=[TOOL], instructions="be brief")
    output = {"type": "function_call_output", "call_id": first.output[-1].call_id, "output": "42"}
    second = api.responses.create(
        model="tide", input=[output], tools=[TOOL], instructions="be brief", previous_response_id=first.id
    )
    stored = (*service.policy.prompts[0], *service.policy.sampled[0])
    assert service.policy.prompts[1][: len(stored)] == stored and second.output_text == "42"
    third = api.responses.create(model="tide", input="thanks", previous_response_id=second.id)  # other instructions: none
    roles = [node.message.role for node in service.state.traces.path(third.trace["node"])]
    assert roles == ["user", "assistant", "tool", "assistant", "user", "assistant"]
    answer_ids = service.policy.sampled[0]
    at = len(service.policy.template.render([Message("user", "hi")], generation_prompt=True))
    assert list(service.policy.prompts[2][at : at + len(answer_ids)]) == answer_ids


def test_items_sent_back_are_the_same_conversation(service):
    service.policy.turns = [TURN, Message("assistant", "42")]
    api = client(service)
    first = api.responses.create(model="tide", input="hi", tools=[TOOL], store=False)
    items = [{"role": "user", "content": "hi"}, *(item.model_dump(exclude_none=True) for item in first.output)]
    items.append({"type": "function_call_output", "call_id": first.output[-1].call_id, "output": "42"})
    second = api.responses.create(model="tide", input=items, tools=[TOOL])
    stored = (*service.policy.prompts[0], *service.policy.sampled[0])
    assert service.policy.prompts[1][: len(stored)] == stored and second.output_text == "42"


def test_a_response_is_kept_until_deleted_unless_told_not_to(service):
    api = client(service)
    answer = api.responses.create(model="tide", input="hi", metadata={"a": "b"})
    assert api.responses.retrieve(answer.id).model_dump() == answer.model_dump()
    (item,) = api.responses.input_items.list(answer.id).data
    assert item.content[0].text == "hi"
    with pytest.raises(openai.BadRequestError):
        api.responses.cancel(answer.id)
    api.responses.delete(answer.id)
    for gone in (answer.id, api.responses.create(model="tide", input="hi", store=False).id):
        with pytest.raises(openai.NotFoundError):
            api.responses.retrieve(gone)
    with pytest.raises(openai.BadRequestError) as lost:
        api.responses.create(model="tide", input="hi", previous_response_id=answer.id)
    assert lost.value.code == "previous_response_not_found"


def test_input_tokens_are_counted_as_billed(service):
    api = client(service)
    count = api.responses.input_tokens.count(model="tide", input="hi", tools=[TOOL], instructions="x")
    answer = api.responses.create(model="tide", input="hi", tools=[TOOL], instructions="x")
    assert count.input_tokens == answer.usage.input_tokens


BAD = [
    ("input", None), ("input", []), ("input", [{"type": "smell"}]), ("input", [{"role": "wizard", "content": "x"}]),
    ("input", [{"role": "user", "content": [{"type": "input_image", "image_url": "data:,"}]}]),
    ("input", [{"type": "function_call_output", "call_id": "x", "output": "y"}]),
    ("input", [{"type": "function_call", "call_id": "x", "name": "f", "arguments": "{"}]),
    ("temperature", 3), ("top_p", 0), ("top_logprobs", 21), ("max_output_tokens", 0), ("max_output_tokens", 5000),
    ("tools", [{"type": "function"}] * 2), ("tool_choice", "required"), ("tool_choice", "bogus"),
    ("text", {"format": {"type": "bogus"}}), ("text", {"format": {"type": "json_schema"}}),
    ("metadata", {"training_consent": "perhaps"}), ("stream", "yes"), ("model", None),
]  # fmt: skip


def test_what_is_wrong_is_a_400_streamed_and_not(service):
    for field, value in BAD:
        for stream in (False, True):
            answer = raw(service, {"stream": stream, field: value})
            assert answer.status_code == 400, (field, value, answer.text)
            assert answer.json()["error"]["type"] == "invalid_request_error"
    assert service.policy.prompts == []


def test_a_failure_mid_stream_ends_with_the_failed_response_and_raises(service):
    service.policy.fail_after = 2
    answer = raw(service, {"stream": True})
    kinds = [line[7:] for line in answer.text.splitlines() if line.startswith("event: ")]
    assert kinds[-1] == "response.failed" and "response.completed" not in kinds and "[DONE]" not in answer.text
    with pytest.raises(openai.APIError):
        list(client(service).responses.create(model="tide", input="hi", stream=True))


def test_hosted_tools_are_left_out_and_tool_choice_may_name_a_function(service):
    assert raw(service, {"tools": [TOOL, {"type": "web_search"}]}).json()["tools"][0]["name"] == "lookup"
    answer = raw(service, {"tools": [TOOL], "tool_choice": {"type": "function", "name": "lookup"}})
    assert answer.status_code == 200
