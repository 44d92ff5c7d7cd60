"""What an answer is held to, the model is told: the prompt that is counted is the prompt that is billed, traced and trained,
and a conversation whose requests are told different things never has a token made twice."""

from __future__ import annotations

import json
import random

import anthropic
import httpx2 as httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tidelock.loop.dataset import advantages, build, successes
from tidelock.loop.rundir import knows_directives
from tidelock.service.ask import Ask
from tidelock.service.forcing import told
from tidelock.tokens.directives import response_format, tool_choice
from tidelock.tokens.message import Message, ToolCall, ToolSpec
from tidelock.tokens.policy import SamplingParams
from tidelock.tokens.trace import Outcome

SCHEMA = {"type": "object", "properties": {"n": {"type": "number"}}, "required": ["n"], "additionalProperties": False}
CALLS = Message("assistant", "", "let me", (ToolCall("functions.look_up:0", "look_up", {"key": "k"}),))
SAYS = Message("assistant", '{"n": 1}', "hm")
KEYED = {"type": "object", "properties": {"key": {"type": "string"}}}
FUNCTION = {"name": "look_up", "description": "d", "parameters": KEYED}
LENIENT = {"x-tidelock-profile": "lenient"}

choices = st.sampled_from([None, "auto", "none", "required", "look_up"])
forms = st.sampled_from([None, "object", "schema"])
requests = st.fixed_dictionaries({"choice": choices, "form": forms, "cut": st.none() | st.integers(1, 60)})


def ask(choice="auto", schema=None, tools=("look_up",)):
    declared = tuple(ToolSpec(name, "", {}) for name in tools)
    system = (Message("system", tools=declared),) if declared else ()
    return Ask("m", (*system, Message("user", "q")), SamplingParams(), tool_choice=choice, schema=schema)


@pytest.mark.parametrize("asked,said", [
    (ask(), ()),
    (ask("none", tools=()), ()),
    (ask("none"), (tool_choice("none"),)),
    (ask("required"), (tool_choice("required"),)),
    (ask("look_up"), (tool_choice("look_up"),)),
    (ask(schema={"type": "object"}, tools=()), (response_format(),)),
    (ask(schema=SCHEMA, tools=()), (response_format(SCHEMA),)),
    (ask(schema=SCHEMA), (tool_choice("none"), response_format(SCHEMA))),  # held to an answer, so to no call
    (ask("required", SCHEMA), (tool_choice("required"),)),  # held to a call, so to no answer
])  # fmt: skip
def test_the_model_is_told_what_it_is_held_to_and_nothing_else(asked, said):
    assert told(asked) == said


def test_a_model_that_does_not_know_directives_is_held_and_not_told(service, tmp_path):
    http = httpx.Client(base_url=service.running.base_url, headers={"Authorization": f"Bearer {service.key()}", **LENIENT})
    bodies = [spoken("chat", [{"role": "user", "content": "hi"}], {"choice": choice, "form": form, "think": True})
              for choice, form in ((None, None), ("required", None), ("none", "schema"))]  # fmt: skip
    service.state.tells = False
    counts = [http.post(COUNTS["chat"], json=body).json()["data"]["total_tokens"] for body in bodies]
    for body in bodies:
        assert http.post("/chat/completions", json=body).status_code == 200
    assert len(set(service.policy.prompts)) == len(set(counts)) == 1
    assert [params.constraint is None for params in service.policy.params] == [True, False, False]
    knows = {name: {"model": {}, "extra": extra} for name, extra in (("ours", {"stage": "rl"}), ("foreign", {}),
             ("taught", {"stage": "sft", "directives": True}))}  # fmt: skip
    for name, config in knows.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    assert [knows_directives(tmp_path / name) for name in knows] == [False, True, True]


def spoken(surface, conversation, request):
    """The body of a request in the words of each API."""
    choice, form, tools = request["choice"], request["form"], [{"type": "function", "function": FUNCTION}]
    named = choice not in (None, "auto", "none", "required")
    if surface == "chat":
        formats = {None: None, "object": {"type": "json_object"},
                   "schema": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}}  # fmt: skip
        return {"model": "tide", "messages": conversation, "tools": tools, "response_format": formats[form],
                "tool_choice": {"type": "function", "function": {"name": choice}} if named else choice,
                "thinking": {"type": "enabled" if request["think"] else "disabled"}}  # fmt: skip
    formats = {None: None, "object": {"format": {"type": "json_object"}},
               "schema": {"format": {"type": "json_schema", "name": "a", "schema": SCHEMA}}}  # fmt: skip
    items = []
    for message in conversation:
        if message["role"] == "tool":
            items.append({"type": "function_call_output", "call_id": message["tool_call_id"], "output": message["content"]})
            continue
        if message.get("reasoning_content"):
            items.append({"type": "reasoning", "summary": [{"type": "summary_text", "text": message["reasoning_content"]}]})
        if message["content"] or not message.get("tool_calls"):
            items.append({"role": message["role"], "content": message["content"]})
        items += [{"type": "function_call", "call_id": c["id"], **c["function"]} for c in message.get("tool_calls", ())]
    return {"model": "tide", "input": items, "tools": [{"type": "function", **FUNCTION}], "text": formats[form],
            "tool_choice": {"type": "function", "name": choice} if named else choice,
            "reasoning": None if request["think"] else {"effort": "none"}}  # fmt: skip


COUNTS = {"chat": "/tokenizers/estimate-token-count", "responses": "/responses/input_tokens"}
ANSWERS = {"chat": ("/chat/completions", "max_tokens"), "responses": ("/responses", "max_output_tokens")}


@pytest.mark.parametrize("template", ["xtml", "chatml"], indirect=True)
def test_counted_is_billed_and_every_request_has_one_exact_path(service, template):
    secret = service.key()
    http = httpx.Client(base_url=service.running.base_url, headers={"Authorization": f"Bearer {secret}", **LENIENT})
    sessions = iter(range(10**6))

    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(["chat", "responses"]), st.booleans(), st.lists(requests, min_size=1, max_size=5))
    def law(surface, think, turns):
        metadata = {"session_id": f"s{next(sessions)}"}
        conversation, so_far = [{"role": "user", "content": "hi"}], []
        for request in turns:
            forced = request["choice"] in ("required", "look_up")
            service.policy.turns = [CALLS if forced else SAYS]
            body = spoken(surface, conversation, {**request, "think": think}) | {"metadata": metadata}
            counted = http.post(COUNTS[surface], json=body).json()
            path, limit = ANSWERS[surface]
            given = http.post(path, json=body | {limit: request["cut"]}).json()
            used, prompt = given["usage"], service.policy.prompts[-1]
            count = counted["data"]["total_tokens"] if surface == "chat" else counted["input_tokens"]
            assert count == used.get("prompt_tokens", used.get("input_tokens")) == len(prompt), (counted, given)
            # one path, token for token what the policy was given and gave
            node = service.state.traces.get(given["trace"]["node"])
            whole = service.state.traces.ids(node.id)
            assert whole == [*prompt, *service.policy.sampled[-1]] and node.sampled == len(service.policy.sampled[-1])
            # all that was said before is in it with its own ids, and none of what was only of those requests
            assert list(prompt[: len(so_far)]) == so_far
            told_of = [n for n in service.state.traces.path(node.id) if n.message.name in ("tool-choice", "response-format")]
            formed = bool(request["form"]) and not forced
            assert len(told_of) == (forced or formed or request["choice"] == "none") + formed
            outside = sum(len(n.ids) for n in told_of)
            at = len(whole) - len(node.ids)
            so_far = [*whole[: at - outside], *node.ids]
            message = service.state.traces.path(node.id)[-1].message
            conversation = [*conversation, said(message)]
            conversation += [{"role": "tool", "tool_call_id": c.id, "content": "7"} for c in message.tool_calls]
            conversation += [] if message.tool_calls else [{"role": "user", "content": "go on"}]

    law()


def said(message):
    out = {"role": "assistant", "content": message.content, "reasoning_content": message.reasoning}
    if message.tool_calls:
        calls = [{"name": c.name, "arguments": json.dumps(c.arguments)} for c in message.tool_calls]
        out["tool_calls"] = [{"id": c.id, "type": "function", "function": f} for c, f in zip(message.tool_calls, calls)]
    return out


def test_anthropic_s_count_and_bill_agree_too(service):
    client = anthropic.Anthropic(base_url=service.running.base_url.removesuffix("/v1"), api_key=service.key(), max_retries=0)
    tools = [{"name": "look_up", "input_schema": {"type": "object", "properties": {}}}]
    asked = {"model": "tide", "messages": [{"role": "user", "content": "hi"}], "tools": tools}
    seen = set()
    for more in ({}, {"tool_choice": {"type": "any"}}, {"tool_choice": {"type": "none"}},
                 {"tool_choice": {"type": "tool", "name": "look_up"}},
                 {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
                 {"extra_body": {"output_format": {"type": "json_schema", "schema": SCHEMA}}}):  # fmt: skip
        count = client.messages.count_tokens(**asked, **more).input_tokens
        usage = client.messages.create(**asked, **more, max_tokens=50).usage
        assert count == usage.input_tokens + (usage.cache_read_input_tokens or 0) == len(service.policy.prompts[-1])
        seen.add(count)
    assert len(seen) == 5  # all are told something else, but for the two names of the format


def test_answers_to_requests_with_directives_are_trained_where_they_were_sampled_and_once(service):
    """Two attempts of three turns, two of them forced: each sampled token has a weight in one sample, in its own context."""
    secret = service.key(training_consent=True)
    http = httpx.Client(base_url=service.running.base_url, headers={"Authorization": f"Bearer {secret}", **LENIENT})
    rng = random.Random(0)
    for attempt, reward in (("a", 1.0), ("b", 0.0)):
        conversation = [{"role": "user", "content": "hi"}]
        for choice in ("required", "auto", "required", "none"):
            call = ToolCall("functions.look_up:0", "look_up", {"key": f"k{rng.random()}"})
            calls, done = Message("assistant", "", "let me", (call,)), Message("assistant", f"done {attempt}", "hm")
            service.policy.turns = [done if choice == "none" else calls]
            body = spoken("chat", conversation, {"choice": choice, "form": None, "think": True})
            body["metadata"] = {"session_id": attempt, "sandbox_level": "x"}
            given = http.post("/chat/completions", json=body).json()
            message = {k: v for k, v in given["choices"][0]["message"].items() if k != "refusal"}
            calls = message.get("tool_calls") or ()
            conversation += [message, *({"role": "tool", "tool_call_id": c["id"], "content": "7"} for c in calls)]
        service.state.traces.add_outcome(Outcome(given["trace"]["node"], reward > 0, reward, "v"))
    data = build(service.state.traces)
    assert data.excluded == {}
    # "done" under "none", its own path; the two forced calls, each in its own
    assert len(data.samples) == 2 * 3
    sampled = sorted(ids for ids in map(tuple, service.policy.sampled))
    learned = []
    for sample in successes(data)["v"] + [s for s in advantages(data) if s.extras["advantage"][-1] < 0]:
        runs, inside = [], False
        for i, w in zip(sample.ids, sample.weights):
            if w:
                runs = runs if inside else [*runs, []]
                runs[-1].append(i)
            inside = bool(w)
        learned += map(tuple, runs)
    assert sorted(learned) == sampled
    # an attempt counts once, in however many samples its turns are
    assert {max(s.extras["advantage"], key=abs) for s in advantages(data)} == {0.5, -0.5}
