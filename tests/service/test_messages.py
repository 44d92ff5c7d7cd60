"""The Messages API as the official `anthropic` client sees it, at both of its versions."""

from __future__ import annotations

import json

import anthropic
import httpx2 as httpx
import pytest

from tidelock.tokens.message import Message, ToolCall

TOOL = {"name": "lookup", "description": "Look up.", "input_schema": {"type": "object", "properties": {"key": {"type": "string"}}}}
ASK = {"model": "tide", "max_tokens": 500, "messages": [{"role": "user", "content": "hi"}]}
CALL = ToolCall("functions.lookup:0", "lookup", {"key": 'a "b"', "n": [1, {"x": None}]})
TURN = Message("assistant", "looking", reasoning="let me see", tool_calls=(CALL,))


def client(service, secret: str | None = None, path: str = "", **options) -> anthropic.Anthropic:
    url = service.running.base_url.removesuffix("/v1") + path
    return anthropic.Anthropic(base_url=url, api_key=secret or service.key(), _strict_response_validation=True, **options)


def raw(service, body: dict, path: str = "/v1/messages", **headers) -> httpx.Response:
    headers = {"x-api-key": service.key(), **headers}
    return httpx.post(service.running.base_url.removesuffix("/v1") + path, json=body, headers=headers)


@pytest.mark.parametrize("path", ["", "/anthropic"])
def test_an_answer_has_typed_blocks_and_a_usage_that_adds_up(service, path):
    service.policy.turns, service.policy.cached_tokens = [TURN], 7
    answer = client(service, path=path).messages.create(**ASK, tools=[TOOL], system="be brief")
    thought, text, call = answer.content
    assert (thought.type, thought.thinking) == ("thinking", "let me see") and thought.signature
    assert (text.type, text.text) == ("text", "looking")
    assert (call.name, call.input, call.id) == ("lookup", CALL.arguments, "toolu_lookup_0")
    assert answer.stop_reason == "tool_use" and answer.stop_sequence is None
    usage = answer.usage
    prompt = usage.input_tokens + usage.cache_read_input_tokens + usage.cache_creation_input_tokens
    assert prompt == len(service.policy.prompts[0]) and usage.cache_read_input_tokens == 7
    assert usage.output_tokens == len(service.policy.sampled[0])
    assert 0 < usage.output_tokens_details.thinking_tokens < usage.output_tokens
    spent = 1_000_000_000 - service.state.ledger.balance("ann")
    assert usage.cost_nano_usd == spent == (prompt - 7) * 300 + 7 * 30 + usage.output_tokens * 1500


@pytest.mark.parametrize("template", ["xtml", "chatml"], indirect=True)
def test_a_stream_accumulates_to_the_whole_answer(service):
    service.policy.turns, service.policy.cached_tokens = [TURN], 5
    api = client(service)
    whole = api.messages.create(**ASK, tools=[TOOL])
    with api.messages.stream(**ASK, tools=[TOOL]) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    assert [b.model_dump(exclude={"parsed_output"}) for b in final.content] == [
        b.model_dump(exclude={"parsed_output"}) for b in whole.content
    ]
    assert (final.stop_reason, final.usage.output_tokens) == (whole.stop_reason, whole.usage.output_tokens)
    assert final.usage.input_tokens == whole.usage.input_tokens and final.usage.cache_read_input_tokens == 5
    assert kinds[0] == "message_start" and kinds[-1] == "message_stop"
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 3


def test_events_come_in_the_order_of_the_api(service):
    service.policy.turns = [TURN]
    answer = raw(service, {**ASK, "stream": True})
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: ")]
    names = [line[7:] for line in answer.text.splitlines() if line.startswith("event: ")]
    assert names == [event["type"] for event in events]
    assert names[0] == "message_start" and names[-2:] == ["message_delta", "message_stop"]
    block = -1
    open_block = False
    for event in events[1:-2]:
        if event["type"] == "content_block_start":
            assert not open_block and event["index"] == block + 1
            block, open_block = block + 1, True
        elif event["type"] == "content_block_stop":
            assert open_block and event["index"] == block
            open_block = False
        else:
            assert event["type"] == "content_block_delta" and open_block and event["index"] == block
    assert "[DONE]" not in answer.text


def test_a_tool_round_trip_extends_the_ids_that_were_sampled(service):
    service.policy.turns = [TURN, Message("assistant", "42")]
    api = client(service)
    first = api.messages.create(**ASK, tools=[TOOL])
    result = {"type": "tool_result", "tool_use_id": first.content[-1].id, "content": [{"type": "text", "text": "42"}]}
    history = [
        *ASK["messages"],
        {"role": "assistant", "content": [b.model_dump(exclude_none=True, exclude={"parsed_output"}) for b in first.content]},
        {"role": "user", "content": [result, {"type": "text", "text": "and?"}]},
    ]
    second = api.messages.create(**{**ASK, "messages": history}, tools=[TOOL])
    assert second.content[-1].text == "42" and second.stop_reason == "end_turn"
    stored = (*service.policy.prompts[0], *service.policy.sampled[0])
    assert service.policy.prompts[1][: len(stored)] == stored
    path = service.state.traces.path(second.trace["node"])
    assert [n.message.role for n in path] == ["system", "user", "assistant", "tool", "user", "assistant"]


def test_the_two_versions_differ_in_sampling_parameters(service):
    sampled = {"temperature": 0.3, "top_p": 0.9, "top_k": 5}
    for field, value in sampled.items():
        body = {**ASK, field: value}
        assert raw(service, body, **{"anthropic-version": "2023-06-01"}).status_code == 200
        refused = raw(service, body, **{"anthropic-version": "2026-10-21"})
        assert refused.status_code == 400 and field in refused.json()["error"]["message"]
    assert [p.temperature for p in service.policy.params] == [0.3, 1.0, 1.0]
    assert service.policy.params[2].top_k == 5
    for version in ("2023-06-01", "2026-10-21"):
        assert raw(service, ASK, **{"anthropic-version": version}).status_code == 200
    assert raw(service, ASK, **{"anthropic-version": "1999-01-01"}).status_code == 400


@pytest.mark.parametrize("header", ["x-api-key", "authorization"])
def test_both_auth_headers_open_the_door(service, header):
    secret = service.key()
    value = secret if header == "x-api-key" else f"Bearer {secret}"
    url = service.running.base_url + "/messages"
    assert httpx.post(url, json=ASK, headers={header: value}).status_code == 200
    assert httpx.post(url, json=ASK, headers={header: value + "x"}).status_code == 401


def test_a_prefill_is_continued_and_stop_sequences_end_the_answer(service):
    service.policy.turns = [Message("assistant", "one, two, three")]
    answer = client(service).messages.create(**ASK, stop_sequences=["zzz", ", th"])
    assert answer.content[-1].text == "one, two"
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", ", th")
    node = service.state.traces.get(answer.trace["node"])
    assert node.message.content == "one, two" and node.message.verbatim is not None
    assert answer.usage.output_tokens == node.sampled < len(service.policy.template.sampled(service.policy.turns[0]))
    prefilled = {**ASK, "messages": [*ASK["messages"], {"role": "assistant", "content": "The answer is"}]}
    client(service).messages.create(**prefilled)
    assert service.policy.template.tokenizer.decode(service.policy.prompts[-1]).endswith("The answer is")


def test_tokens_are_counted_as_they_are_billed(service):
    body = {"model": "tide", "messages": ASK["messages"], "system": "be brief", "tools": [TOOL]}
    count = client(service).messages.count_tokens(**body)
    answer = client(service).messages.create(**body, max_tokens=5)
    assert count.input_tokens == answer.usage.input_tokens == len(service.policy.prompts[0])


def test_models_come_in_the_shape_of_who_asks(service):
    api = client(service)
    (model,) = api.models.list().data
    assert (model.id, model.max_input_tokens, model.capabilities.thinking.supported) == ("tide", 4096, True)
    assert api.models.retrieve("tide").id == "tide"
    with pytest.raises(anthropic.NotFoundError):
        api.models.retrieve("other")


BAD = [
    ("max_tokens", 0), ("max_tokens", None), ("messages", []), ("messages", [{"role": "wizard", "content": "x"}]),
    ("messages", [{"role": "user", "content": [{"type": "image", "source": {}}]}]),
    ("messages", [{"role": "user", "content": [{"type": "tool_use", "id": "x", "name": "y", "input": {}}]}]),
    ("messages", [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x", "content": "y"}]}]),
    ("tools", [{"name": "bad name", "input_schema": {}}]), ("tools", [{"name": "x"}]), ("tools", [TOOL, TOOL]),
    ("tools", [{"name": "search", "type": "web_search_20250305"}]),
    ("tool_choice", {"type": "any"}), ("tool_choice", {"type": "tool", "name": "x"}), ("tool_choice", {"type": "bogus"}),
    ("thinking", {"type": "enabled", "budget_tokens": 10}), ("thinking", {"type": "bogus"}),
    ("stop_sequences", ["x" * 33]), ("system", 5), ("metadata", {"training_consent": "perhaps"}),
]  # fmt: skip


def test_what_is_wrong_is_a_400_in_the_api_s_own_shape_streamed_and_not(service):
    for field, value in BAD:
        for stream in (False, True):
            answer = raw(service, {**ASK, field: value, "stream": stream})
            body = answer.json()
            assert answer.status_code == 400, (field, value, answer.text)
            assert body["type"] == "error" and body["error"]["type"] == "invalid_request_error" and body["error"]["message"]
            assert body["request_id"] == answer.headers["request-id"]
    assert service.policy.prompts == []


def test_errors_raise_the_client_s_own_classes(service):
    with pytest.raises(anthropic.AuthenticationError) as wrong:
        client(service, "sk-wrong").messages.create(**ASK)
    assert wrong.value.response.json()["error"]["type"] == "authentication_error"
    with pytest.raises(anthropic.NotFoundError):
        client(service).messages.create(**{**ASK, "model": "other"})
    with pytest.raises(anthropic.RateLimitError) as poor:
        client(service, service.key("poor", nano_usd=0)).messages.create(**ASK)
    assert poor.value.response.headers["x-should-retry"] == "false"
    service.policy.fail_after = 0
    with pytest.raises(anthropic.APIStatusError) as full:
        client(service, max_retries=0).messages.create(**ASK)
    assert full.value.status_code == 529 and full.value.response.json()["error"]["type"] == "overloaded_error"


def test_a_failure_mid_stream_is_an_error_event_and_no_end(service):
    service.policy.fail_after = 2
    answer = raw(service, {**ASK, "stream": True})
    assert answer.status_code == 200 and "message_stop" not in answer.text
    assert answer.text.rstrip().splitlines()[-2] == "event: error"
    assert json.loads(answer.text.rstrip().splitlines()[-1][6:])["error"]["type"] == "overloaded_error"
    with pytest.raises(anthropic.APIStatusError):
        with client(service).messages.stream(**ASK) as stream:
            list(stream)


def test_consent_and_session_travel_in_metadata(service):
    secret = service.key(training_consent=True)
    answer = raw(service, {**ASK, "metadata": {"user_id": "u", "session_id": "s7"}}, **{"x-api-key": secret}).json()
    node = service.state.traces.get(answer["trace"]["node"])
    assert node.consent and node.consent_source == "key" and node.scope.endswith("/s7")
    answer = raw(service, {**ASK, "metadata": {"training_consent": "false"}}, **{"x-api-key": secret}).json()
    node = service.state.traces.get(answer["trace"]["node"])
    assert not node.consent and node.consent_source == "request"


def test_a_lenient_server_thinks_when_it_is_asked_to_as_anthropic_s_clients_expect(service):
    """Who does not speak of thinking reads the first block as the answer."""
    service.policy.turns = [Message("assistant", "hello", "")]
    api = anthropic.Anthropic(base_url=service.running.base_url.removesuffix("/v1"), api_key=service.key(profile="lenient"))
    common = {"model": "any", "max_tokens": 2000, "messages": [{"role": "user", "content": "hi"}]}
    opened = {}
    for kind, more in (("silent", {}), ("off", {"thinking": {"type": "disabled"}}),
                       ("on", {"thinking": {"type": "enabled", "budget_tokens": 1024}}), ("adaptive", {"thinking": {"type": "adaptive"}})):
        api.messages.create(**common, **more)  # fmt: skip
        opened[kind] = service.policy.prompts[-1]
    assert opened["silent"] == opened["off"] != opened["on"] == opened["adaptive"]
    strict = anthropic.Anthropic(base_url=service.running.base_url.removesuffix("/v1"), api_key=service.key("bob"))
    strict.messages.create(**{**common, "model": "tide"})
    assert service.policy.prompts[-1] == opened["on"]


def test_another_model_s_redacted_thought_is_left_out(service):
    said = [{"type": "redacted_thinking", "data": "EmwKAhgB"}, {"type": "text", "text": "so it is"}]
    messages = [*ASK["messages"], {"role": "assistant", "content": said}, *ASK["messages"]]
    assert raw(service, {**ASK, "messages": messages}).status_code == 200
    plain = [*ASK["messages"], {"role": "assistant", "content": said[1:]}, *ASK["messages"]]
    raw(service, {**ASK, "messages": plain})
    assert service.policy.prompts[-1] == service.policy.prompts[-2]


def test_a_message_has_what_anthropic_s_document_requires_in_a_form_that_the_ai_sdk_takes(service):
    """There `citations` must be present, here it must be no null: a list is both."""
    service.policy.turns = [TURN]
    answer = raw(service, {**ASK, "tools": [TOOL]}).json()
    assert {"container", "stop_details"} <= answer.keys() and {"inference_geo", "server_tool_use"} <= answer["usage"].keys()
    _, text, call = answer["content"]
    assert text["citations"] == [] and call["caller"] == {"type": "direct"}
    lines = raw(service, {**ASK, "tools": [TOOL], "stream": True}).text.splitlines()
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
    blocks = [event["content_block"] for event in events if event["type"] == "content_block_start"]
    assert blocks[1]["citations"] == [] and blocks[2]["caller"] == {"type": "direct"}
    (delta,) = [event["delta"] for event in events if event["type"] == "message_delta"]
    assert {"container", "stop_details"} <= delta.keys()
