"""Kimi's contract: what must be a 400, said the same whether the answer would have been streamed or not."""

from __future__ import annotations

import httpx2 as httpx
import pytest

from tidelock.tokens.message import Message

USER = {"role": "user", "content": "hi"}


def tool(name: str = "look_up", **function) -> dict:
    parameters = {"type": "object", "properties": {"key": {"type": "string"}}}
    return {"type": "function", "function": {"name": name, "parameters": parameters, **function}}


def system(*tools, content: str = "") -> dict:
    return {"role": "system", "content": content, "tools": list(tools)}


def json_schema(**inner) -> dict:
    return {"response_format": {"type": "json_schema", "json_schema": inner}}


def without(entry: dict, *path: str) -> dict:
    *outer, last = path
    copy = {key: dict(value) if isinstance(value, dict) else value for key, value in entry.items()}
    at = copy
    for step in outer:
        at = at[step]
    del at[last]
    return copy


CALL = {"id": "c1", "type": "function", "function": {"name": "look_up", "arguments": "{}"}}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
OBJECT = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}

MUST_BE_400 = {
    # sampling that the K series fixes
    "temperature above": {"temperature": 1.1},
    "temperature far above": {"temperature": 2.0},
    "temperature below": {"temperature": -0.1},
    "temperature between": {"temperature": 0.3},
    "top_p": {"top_p": 0.8},
    "top_p zero": {"top_p": 0},
    "presence_penalty": {"presence_penalty": 0.5},
    "frequency_penalty": {"frequency_penalty": 0.5},
    "n": {"n": 2},
    "n zero": {"n": 0},
    # limits
    "max_tokens zero": {"max_tokens": 0},
    "max_completion_tokens zero": {"max_completion_tokens": 0},
    "max_tokens negative": {"max_tokens": -1},
    "max_tokens beyond the context": {"max_tokens": 5000},
    "prompt beyond the context": {"messages": [{"role": "user", "content": "x" * 5000}]},
    "stop: six": {"stop": list("abcdef")},
    "stop: 33 bytes": {"stop": "x" * 33},
    "stop: 33 bytes in fewer characters": {"stop": ["é" * 17]},
    "stop: empty": {"stop": [""]},
    "tools: 129": {"tools": [tool(f"tool_{n}") for n in range(129)]},
    "top_logprobs without logprobs": {"top_logprobs": 3},
    "top_logprobs: 21": {"logprobs": True, "top_logprobs": 21},
    "logit_bias: no token": {"logit_bias": {"hello": 1}},
    "logit_bias: too much": {"logit_bias": {"5": 101}},
    # messages
    "no messages": {"messages": []},
    "messages: null": {"messages": None},
    "unknown role": {"messages": [{"role": "wizard", "content": "x"}]},
    "empty user message": {"messages": [{"role": "user", "content": ""}]},
    "user message without content": {"messages": [{"role": "user"}]},
    "empty system message": {"messages": [{"role": "system", "content": ""}, USER]},
    "empty assistant message": {"messages": [USER, {"role": "assistant", "content": ""}, USER]},
    "an image": {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]},
    "unknown part": {"messages": [{"role": "user", "content": [{"type": "smell", "text": "x"}]}]},
    "last is the assistant's": {"messages": [USER, {"role": "assistant", "content": "x"}]},
    "partial in the middle": {"messages": [USER, {"role": "assistant", "content": "x", "partial": True}, USER]},
    "partial user": {"messages": [{**USER, "partial": True}]},
    "partial with calls": {"messages": [USER, {**CALLED, "partial": True}]},
    "tool without tool_call_id": {"messages": [{"role": "tool", "content": "x"}, USER]},
    "tool answers nothing": {"messages": [USER, {"role": "tool", "content": "x", "tool_call_id": "c9"}]},
    "call without a result": {"messages": [USER, CALLED, USER]},
    "call ids repeat": {"messages": [USER, {**CALLED, "tool_calls": [CALL, CALL]}, USER]},
    "arguments are no JSON": {"messages": [USER, {**CALLED, "tool_calls": [
        {**CALL, "function": {"name": "look_up", "arguments": "{"}}]}, {"role": "tool", "content": "", "tool_call_id": "c1"}]},
    # response_format
    "format: unknown": {"response_format": {"type": "bogus"}},
    "format: no type": {"response_format": {}},
    "format: no json_schema": {"response_format": {"type": "json_schema"}},
    "format: no name": json_schema(schema=OBJECT),
    "format: no schema": json_schema(name="x"),
    "format: strict is no boolean": json_schema(name="x", schema=OBJECT, strict="yes"),
    "format: schema is no object": json_schema(name="x", schema="x"),
    "format: not MFJS": json_schema(name="x", schema={"type": "object", "oneOf": [OBJECT]}),
    "format: not MFJS, strictly": json_schema(name="x", schema={"type": "object", "not": OBJECT}, strict=True),
    # tools
    "tool: no type": {"tools": [without(tool(), "type")]},
    "tool: no function": {"tools": [without(tool(), "function")]},
    "tool: no name": {"tools": [without(tool(), "function", "name")]},
    "tool: bogus type": {"tools": [{"type": "bogus", "function": {"name": "xxx"}}]},
    "tool: a digit first": {"tools": [tool("1tool")]},
    "tool: a character": {"tools": [tool("bad@name")]},
    "tool: no characters": {"tools": [tool("")]},
    "tool: two characters": {"tools": [tool("ab")]},
    "tool: 65 characters": {"tools": [tool("a" * 65)]},
    "tool: 257 characters": {"tools": [tool("a" * 257)]},
    "tool: twice": {"tools": [tool(), tool()]},
    "tool: strict is no boolean": {"tools": [tool(strict="yes")]},
    "tool: parameters are no object": {"tools": [tool(parameters="x")]},
    "tool: strictly not MFJS": {"tools": [tool(strict=True, parameters={"type": "object", "allOf": [OBJECT]})]},
    "builtin without $": {"tools": [{"type": "builtin_function", "function": {"name": "web_search"}}]},
    "tool_choice: required without tools": {"tool_choice": "required"},
    "tool_choice: required with none": {"tools": [], "tool_choice": "required"},
    "tool_choice: unknown": {"tools": [tool()], "tool_choice": "bogus"},
    "tool_choice: unknown object": {"tools": [tool()], "tool_choice": {"type": "bogus"}},
    # tools in messages
    "dynamic: user": {"messages": [{**USER, "tools": [tool()]}, USER]},
    "dynamic: assistant": {"messages": [USER, {"role": "assistant", "content": "x", "tools": [tool()]}, USER]},
    "dynamic: with content": {"messages": [system(tool(), content="not empty"), USER]},
    "dynamic: no type": {"messages": [system(without(tool(), "type")), USER]},
    "dynamic: no function": {"messages": [system(without(tool(), "function")), USER]},
    "dynamic: no name": {"messages": [system(without(tool(), "function", "name")), USER]},
    "dynamic: a digit first": {"messages": [system(tool("1bad_name")), USER]},
    "dynamic: bogus beside good": {"messages": [system(tool(), {"type": "bogus", "function": {"name": "xxx"}}), USER]},
    "dynamic: no array": {"messages": [{**system(), "tools": {"type": "function"}}, USER]},
    "dynamic: null": {"messages": [{**system(), "tools": [None]}, USER]},
    "dynamic: twice in one": {"messages": [system(tool(), tool()), USER]},
    "dynamic: twice across": {"messages": [system(tool()), system(tool()), USER]},
    "dynamic: and global": {"tools": [tool()], "messages": [system(tool()), USER]},
    # thinking
    "thinking: unknown type": {"thinking": {"type": "sometimes"}},
    "thinking: no object": {"thinking": "enabled"},
    "thinking: keep": {"thinking": {"type": "enabled", "keep": "none"}},
    # types
    "stream is no boolean": {"stream": "yes"},
    "metadata is no object": {"metadata": "x"},
    "consent is neither": {"metadata": {"training_consent": "perhaps"}},
    "seed is no integer": {"seed": "x"},
}

ACCEPTED = {
    "nothing": {},
    "defaults with thinking": {"temperature": 1.0, "top_p": 0.95, "n": 1, "presence_penalty": 0, "frequency_penalty": 0},
    "defaults without": {"temperature": 0.6, "thinking": {"type": "disabled", "keep": "none", "effort": "high"}},
    "greedy": {"temperature": 0},
    "efforts": {"thinking": {"type": "enabled", "keep": "all", "effort": "low"}, "reasoning_effort": "max"},
    "an unknown effort": {"reasoning_effort": "enormous"},
    "an unknown field": {"frobnicate": [1, {}]},
    "null fields": {"temperature": None, "tools": None, "stop": None, "response_format": None},
    "tool_choice none without tools": {"tool_choice": "none"},
    "tool_choice auto without tools": {"tool_choice": "auto"},
    "a named tool_choice": {"tools": [tool()], "tool_choice": {"type": "function", "function": {"name": "nobody"}}},
    "128 tools": {"tools": [tool(f"f_{n}", parameters={}) for n in range(128)], "max_tokens": 1},
    "a tool that is not strict": {"tools": [tool(strict=False, parameters={"type": "object", "oneOf": []})]},
    "builtin": {"tools": [{"type": "builtin_function", "function": {"name": "$web_search"}}]},
    "dynamic tools anywhere": {"messages": [USER, system(tool("one")), USER, system(tool("two"))]},
    "stop": {"stop": ["a" * 32, "b", "c", "d", "e"]},
    "text parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]},
    "metadata": {"metadata": {"training_consent": "false"}, "safety_identifier": "x", "prompt_cache_key": "y"},
    "text": {"response_format": {"type": "text"}},
}


def post(service, secret: str, changes: dict, **headers) -> httpx.Response:
    body = {"model": "tide", "messages": [USER], **changes}
    headers = {"authorization": f"Bearer {secret}", **headers}
    return httpx.post(service.running.base_url + "/chat/completions", json=body, headers=headers)


def test_what_must_be_refused_is_refused_streamed_and_not_before_anything_is_sampled(service):
    secret = service.key()
    for name, changes in MUST_BE_400.items():
        answers = [post(service, secret, {"stream": stream, **changes}) for stream in (False, True)]
        for answer in answers:
            assert answer.status_code == 400, (name, answer.status_code, answer.text)
            error = answer.json()["error"]
            assert error["type"] == "invalid_request_error" and error["message"], name
        assert answers[0].json() == answers[1].json(), name
    assert service.policy.prompts == [] and service.state.ledger.balance("ann") == 1_000_000_000


def test_what_kimi_takes_is_taken_streamed_and_not(service):
    service.state.context_length = 40_000
    secret = service.key()
    for name, changes in ACCEPTED.items():
        for stream in (False, True):
            answer = post(service, secret, {"stream": stream, **changes})
            assert answer.status_code == 200, (name, answer.text)


LENIENT = {
    "temperature": {"temperature": 1.7}, "top_p": {"top_p": 0.5}, "penalties": {"presence_penalty": 1, "frequency_penalty": -1},
    "n": {"n": 3}, "a model of another vendor": {"model": "gpt-0"}, "max_tokens 0": {"max_tokens": 0},
    "short tool names": {"tools": [tool("ls")]}, "empty content": {"messages": [{"role": "user", "content": ""}]},
}  # fmt: skip


@pytest.mark.parametrize("by", ["server", "request"])
def test_a_lenient_profile_honours_what_kimi_refuses(service, by):
    secret = service.key()
    for name, changes in LENIENT.items():
        assert post(service, secret, changes).status_code in (400, 404), name
    service.state.lenient = by == "server"
    headers = {} if by == "server" else {"x-tidelock-profile": "lenient"}
    for name, changes in LENIENT.items():
        answer = post(service, secret, changes, **headers)
        assert answer.status_code == 200, (name, answer.text)
        if name == "n":
            assert [choice["index"] for choice in answer.json()["choices"]] == [0, 1, 2]
    assert {p.temperature for p in service.policy.params} == {1.0, 1.7}
    assert {p.top_p for p in service.policy.params} == {1.0, 0.5}
    assert {p.frequency_penalty for p in service.policy.params} == {0.0, -1.0}


@pytest.mark.parametrize(
    ("stated", "effort"),
    [
        ({}, None),
        ({"reasoning_effort": "low"}, "low"),
        ({"thinking": {"type": "enabled", "effort": "low"}, "reasoning_effort": "max"}, "low"),
        ({"thinking": {"type": "enabled"}, "reasoning_effort": "high"}, "high"),
        ({"reasoning_effort": "enormous"}, None),
        ({"thinking": {"type": "enabled", "keep": "all"}}, "max"),  # Kimi's default, for who speaks Kimi's words
        ({"thinking": {"keep": "all"}, "reasoning_effort": "enormous"}, "max"),
        ({"thinking": {"type": "disabled"}}, None),
        ({}, None),
    ],
)
def test_thinking_effort_wins_over_reasoning_effort(service, stated, effort):
    from tidelock.service.surfaces import chat
    from tidelock.service.wire import decode, encode

    body = encode({"model": "tide", "messages": [USER], **stated})
    ask = chat.read(service.state, decode(body, chat._decoder), lenient=False)
    assert ask.effort == effort
    told = [message.content for message in ask.messages if message.name == "thinking-effort"]
    assert bool(told) == bool(effort) and all(f"`thinking_effort={effort}`" in text for text in told)


@pytest.mark.parametrize("template", ["xtml", "chatml"], indirect=True)
def test_without_thinking_the_answer_begins_after_an_empty_thought(service, template):
    post(service, service.key(), {"max_tokens": 3})
    answer = post(service, service.key("bob"), {"thinking": {"type": "disabled"}, "max_tokens": 3}).json()
    thinking, short = service.policy.prompts
    assert short[: len(thinking)] == thinking and len(short) > len(thinking)
    whole = template.render([Message("user", "hi"), Message("assistant", "x")])
    assert whole[: len(short)] == list(short)
    node = service.state.traces.get(answer["trace"]["node"])
    assert node.sampled == 3 and tuple(service.state.traces.ids(node.id)) == (*short, *service.policy.sampled[1])


@pytest.mark.parametrize("template", ["xtml", "chatml"], indirect=True)
def test_a_partial_answer_is_continued_and_only_the_continuation_is_returned(service, template):
    secret = service.key()
    partial = {"role": "assistant", "content": "The answer", "reasoning_content": "hm", "partial": True}
    service.policy.turns = [Message("assistant", " is 42", reasoning="x")]
    ids = template.sampled(Message("assistant", " is 42"))
    empty = template.sampled(Message("assistant"))
    tail = next(n for n in range(1, 40) if empty[-n] != template.sampled(Message("assistant", "x"))[-n]) - 1
    service.policy.literal = template.tokenizer.encode(" is 42") + ids[len(ids) - tail :]
    answer = post(service, secret, {"messages": [USER, partial]}).json()
    assert answer["choices"][0]["message"]["content"] == " is 42"
    assert "reasoning_content" not in answer["choices"][0]["message"]
    node = service.state.traces.get(answer["trace"]["node"])
    assert (node.message.content, node.message.reasoning) == ("The answer is 42", "hm")
    assert node.sampled == len(service.policy.literal) and node.message.verbatim is None
    history = [USER, {"role": "assistant", "content": "The answer is 42", "reasoning_content": "hm"}, USER]
    post(service, secret, {"messages": history})
    stored = (*service.policy.prompts[0], *service.policy.literal)
    assert service.policy.prompts[1][: len(stored)] == stored


FOREIGN = {"type": "object", "not": OBJECT}


@pytest.mark.parametrize(
    ("given", "held"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, {"type": "object"}),
        (json_schema(name="x", schema=OBJECT)["response_format"], OBJECT),
        (json_schema(name="x", schema=OBJECT, strict=False)["response_format"], OBJECT),
        (json_schema(name="x", schema=FOREIGN, strict=False)["response_format"], {"type": "object"}),
    ],
)
def test_an_answer_is_held_to_its_schema_where_it_can_be_and_else_to_an_object(service, given, held):
    from tidelock.service.surfaces import chat
    from tidelock.service.wire import decode, encode

    body = encode({"model": "tide", "messages": [USER], "response_format": given})
    assert chat.read(service.state, decode(body, chat._decoder), lenient=False).schema == held
