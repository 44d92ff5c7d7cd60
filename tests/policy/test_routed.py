"""A gateway in front of a real server over a real engine, by ids and by text: what the engine did is what it says."""

import json
import time

import httpx2 as httpx
import openai
import pytest
from policies import MODEL, TEMPLATE, engine_of, served

from tidelock.models import TransformerLM, preset, save_checkpoint
from tidelock.service.reconciliation.job import reconcile
from tidelock.service.upstreams import read_upstreams

ONE = '[[upstream]]\nname = "{kind}"\nurl = "{url}"\nkind = "{kind}"\nmodel = "{model}"\napi_key_env = "KEY"\n'
ASK = {"model": MODEL, "messages": [{"role": "user", "content": "name three tides"}], "max_tokens": 40, "seed": 3}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    directory = tmp_path_factory.mktemp("routed")
    save_checkpoint(directory / "other", TransformerLM(preset("nano-k3", TEMPLATE.tokenizer.vocab_size + 7), seed=9))
    engine = engine_of()
    with served(directory / "server", engine) as server:
        fronts, open_ = {}, []
        for kind, url in (("tokens", server["url"]), ("chat", server["url"] + "/v1")):
            (directory / f"{kind}.toml").write_text(ONE.format(kind=kind, url=url, model=MODEL))
            front = read_upstreams(directory / f"{kind}.toml", TEMPLATE, {"KEY": server["key"]})
            open_.append(served(directory / kind, front.pool))
            fronts[kind] = open_[-1].__enter__()
        try:
            yield {"engine": engine, "server": server, "other": directory / "other", "path": directory, **fronts}
        finally:
            for gateway in open_:
                gateway.__exit__(None, None, None)
    engine.close()


def client(box, **options):
    return openai.OpenAI(base_url=box["url"] + "/v1", api_key=box["key"], max_retries=0, **options)


def rows(box):
    return box["state"].ledger.db.read("SELECT * FROM usage ORDER BY created", ())


def test_by_ids_the_gateways_trace_is_what_the_engine_sampled_and_both_counts_agree(world):
    direct = client(world["server"]).chat.completions.create(**ASK)
    box = world["tokens"]
    streamed = list(client(box).chat.completions.create(**ASK, stream=True, stream_options={"include_usage": True}))
    node = box["state"].traces.get(next(c.trace for c in streamed if getattr(c, "trace", None))["node"])
    own = world["server"]["state"].traces.get(direct.trace["node"])
    assert node.ids == own.ids and node.logprobs == own.logprobs and node.exact
    assert node.weights_versions == own.weights_versions == ((world["engine"].version, 40),)
    again = client(box).chat.completions.create(**ASK)
    row = rows(box)[-1]
    assert again.usage.completion_tokens == row["completion_tokens"] == row["upstream_completion"] == 40
    assert row["prompt_tokens"] == row["upstream_prompt"] and 0 < row["cached_tokens"] == row["upstream_cached"]
    state = box["state"]
    found, _ = reconcile(state.ledger.db, 0, time.time() + 1, state.traces.journal, inexact=state.inexact)
    assert found.total == 0 and found.upstreams["tokens"]["requests"] == 2


def test_by_text_the_words_are_the_same_and_the_upstreams_bill_is_a_ceiling(world):
    direct = client(world["server"]).chat.completions.create(**ASK)
    box, before = world["chat"], len(rows(world["server"]))
    routed = client(box).chat.completions.create(**ASK)
    assert routed.choices[0].message.content == direct.choices[0].message.content
    assert routed.choices[0].finish_reason == direct.choices[0].finish_reason
    node = box["state"].traces.get(routed.trace["node"])
    assert not node.exact and {v for v, _ in node.weights_versions} == {-1}
    mine, theirs = rows(box)[-1], rows(world["server"])[before]
    assert mine["upstream_completion"] == theirs["completion_tokens"] == 40
    assert mine["upstream_prompt"] == theirs["prompt_tokens"] and mine["upstream_cached"] == theirs["cached_tokens"]
    assert mine["completion_tokens"] == min(node.sampled, 40) and mine["upstream"] == "chat"


@pytest.mark.parametrize("kind", ["tokens", "chat"])
def test_what_an_answer_is_held_to_holds_through_ids_and_through_text(world, kind):
    number = {"type": "integer", "maximum": 9}
    schema = {"type": "object", "properties": {"n": number}, "required": ["n"], "additionalProperties": False}
    ask = {**ASK, "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}},
           "extra_body": {"thinking": {"type": "disabled"}}, "max_tokens": 200}  # fmt: skip
    if kind == "tokens":
        said = client(world[kind]).chat.completions.create(**ask).choices[0]
        assert set(json.loads(said.message.content)) == {"n"}
        return
    # by text it cannot be kept from thinking, and a random model may do so to its limit; but the server behind was told
    del ask["extra_body"]
    prompts = []
    for asked in (ask, {k: v for k, v in ask.items() if k != "response_format"}):
        client(world[kind]).chat.completions.create(**asked)
        prompts.append(rows(world["server"])[-1]["prompt_tokens"])
    assert prompts[0] > prompts[1] + 50


@pytest.mark.parametrize("kind", ["tokens", "chat"])
def test_a_client_that_leaves_frees_the_engine_behind(world, kind):
    engine = world["engine"]
    with client(world[kind]).chat.completions.create(**{**ASK, "max_tokens": 1800, "stop": None}, stream=True) as stream:
        for chunk in stream:
            delta = chunk.choices[0].delta if chunk.choices else None
            if delta and (delta.content or getattr(delta, "reasoning_content", None)):
                break
    upstreams = world[kind]["state"].policy.upstreams
    for _ in range(2000):
        if not engine._live and all(u.in_flight == 0 for u in upstreams):
            return
        time.sleep(0.005)
    raise AssertionError(f"still running: {engine._live}, {[u.in_flight for u in upstreams]}")


def test_other_weights_pass_through_and_are_refused_where_they_are_not_ours(world):
    def swap(box, version):
        headers, weights = {"Authorization": f"Bearer {box['key']}"}, {"checkpoint": str(world["other"]), "version": version}
        return httpx.post(box["url"] + "/admin/weights", json=weights, headers=headers)

    assert swap(world["chat"], 2).status_code == 400 and world["engine"].version == 1
    assert swap(world["tokens"], 2).json() == {"weights_version": 2} and world["engine"].version == 2
    assert httpx.get(world["tokens"]["url"] + "/health").json()["weights_version"] == 2
    routed = client(world["tokens"]).chat.completions.create(**ASK)
    node = world["tokens"]["state"].traces.get(routed.trace["node"])
    assert {v for v, _ in node.weights_versions} == {2}
