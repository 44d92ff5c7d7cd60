"""The token routes, word for word: what vLLM's clients send and read."""

import json

import httpx2 as httpx
import numpy as np
import pytest

from tidelock.service.tokens_wire import Output, decoder, npy64, to_params
from tidelock.tokens.policy import Chunk

GENERATE = "/inference/v1/generate"
ASK = {"token_ids": [1, 2, 3], "sampling_params": {"max_tokens": 12, "temperature": 0, "logprobs": 0}}


@pytest.fixture
def http(service):
    key = service.key(role="admin")
    with httpx.Client(base_url=service.running.base_url.removesuffix("/v1"), headers={"Authorization": f"Bearer {key}"}) as client:
        yield client


def events(response):
    lines = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_the_answer_has_vllms_fields_and_the_ids_are_the_samplers(service, http):
    body = http.post(GENERATE, json={**ASK, "request_id": "r1", "return_token_ids": True}).json()
    assert body.keys() >= {"request_id", "model", "created", "usage", "prompt_logprobs", "prompt_token_ids", "output_mode", "choices"}
    assert body["request_id"] == "generate-tokens-r1" and body["output_mode"] == "tokens"
    (choice,) = body["choices"]
    assert choice.keys() == {"index", "finish_reason", "stop_reason", "token_ids", "routed_experts", "sampling_mask",
                             "weight_versions", "logprobs"}  # fmt: skip
    (said,) = service.policy.sampled
    assert choice["token_ids"] == said and service.policy.prompts == [(1, 2, 3)] and body["prompt_token_ids"] == [1, 2, 3]
    assert [c["token_id"] for c in choice["logprobs"]["content"]] == said
    assert choice["logprobs"]["content"][0] == {
        "token_id": said[0], "logprob": -0.5, "rank": None,
        "top_logprobs": [{"token_id": said[0], "logprob": -0.5, "rank": None}]}  # fmt: skip
    assert choice["weight_versions"] == [{"version": "1", "start": 0, "end": len(said)}]
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": len(said), "total_tokens": 3 + len(said),
                             "prompt_tokens_details": {"cached_tokens": 0}}  # fmt: skip


def test_a_stream_adds_up_to_the_whole(service, http):
    whole = http.post(GENERATE, json=ASK).json()["choices"][0]
    got = events(http.post(GENERATE, json={**ASK, "stream": True, "stream_options": {"include_usage": True}}))
    *chunks, last = got
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == len(whole["token_ids"]) and len(chunks) > 1
    parts = [c["choices"][0] for c in chunks]
    assert [i for p in parts for i in p["token_ids"]] == whole["token_ids"]
    assert [c for p in parts for c in p["logprobs"]["content"]] == whole["logprobs"]["content"]
    assert [p["finish_reason"] for p in parts] == [None] * (len(parts) - 1) + [whole["finish_reason"]]
    assert parts[-1]["weight_versions"] == whole["weight_versions"]  # vLLM: the last one covers everything
    spans = [s for p in parts[:-1] for s in p["weight_versions"]]
    assert [(s["start"], s["end"]) for s in spans] == [(i, i + 5) for i in range(0, 5 * len(spans), 5)]


def test_only_an_admin_may_send_raw_ids_or_steer(service, http):
    user = {"Authorization": f"Bearer {service.key('bob')}"}
    for method, path in (("POST", GENERATE), ("POST", "/pause"), ("POST", "/resume"), ("GET", "/is_paused"), ("GET", "/weight_info"),
                         ("POST", "/abort_requests"), ("POST", "/start_weight_update"), ("POST", "/update_weights"),
                         ("POST", "/finish_weight_update"), ("POST", "/init_weight_transfer_engine")):  # fmt: skip
        assert http.request(method, path, json=ASK, headers=user).status_code == 403, path
        assert http.request(method, path, json=ASK, headers={"Authorization": "Bearer no"}).status_code == 401, path
    assert service.policy.prompts == []


def test_it_is_not_billed(service, http):
    before = service.state.ledger.balance("ann")
    http.post(GENERATE, json=ASK)
    assert service.state.ledger.balance("ann") == before


@pytest.mark.parametrize("change,named", [
    ({"token_ids": []}, "token_ids"), ({"token_ids": [-1]}, "token_ids"), ({"output_mode": "text"}, "output_mode"),
    ({"cache_salt": "x"}, "cache_salt"), ({"sampling_params": {"n": 2}}, "sampling_params.n"),
    ({"sampling_params": {"min_tokens": 3}}, "min_tokens"), ({"sampling_params": {"bad_words": ["x"]}}, "bad_words"),
    ({"sampling_params": {"prompt_logprobs": 0}}, "prompt_logprobs"), ({"sampling_params": {"top_p": 0}}, "top_p"),
    ({"sampling_params": {"structured_outputs": {"choice": ["a"]}}}, "structured_outputs"),
    ({"sampling_params": {"max_tokens": 4096}}, "token_ids"), ({"sampling_params": {"extra_args": {"deadline_s": "x"}}}, "deadline_s"),
])  # fmt: skip
def test_what_cannot_be_honoured_is_refused_by_name(service, http, change, named):
    answer = http.post(GENERATE, json={**ASK, **change})
    assert answer.status_code == 400 and named in (answer.json()["error"]["param"] or "")
    assert service.policy.prompts == []


def test_another_model_is_not_found(http):
    assert http.post(GENERATE, json={**ASK, "model": "gpt-0"}).status_code == 404


def test_a_policy_that_fails_late_ends_the_stream_with_an_error_event(service, http):
    service.policy.fail_after = 1
    *_, last = events(http.post(GENERATE, json={**ASK, "stream": True}))
    assert last["error"]["message"] == "the engine is full"
    service.policy.fail_after = 0
    answer = http.post(GENERATE, json={**ASK, "stream": True})
    assert answer.status_code == 503 and answer.headers["retry-after"]


def test_abort_by_name_ends_the_stream_with_abort(service, http):
    service.policy.pause_s = 0.05
    with http.stream("POST", GENERATE, json={**ASK, "request_id": "r9", "stream": True}) as response:
        lines = (line for line in response.iter_lines() if line.startswith("data: {"))
        next(lines)
        assert http.post("/inference/v1/abort_requests", json={"request_ids": ["generate-tokens-r9"]}).json()["aborted"] == 1
        assert [json.loads(line[6:])["choices"][0]["finish_reason"] for line in lines][-1] == "abort"
    assert http.post("/abort_requests", json={}).json() == {"status": "aborted", "aborted": 0}


def test_weights_are_updated_in_vllms_three_steps(service, http):
    assert http.get("/weight_info").json() == {"weight_version": "1"}
    assert http.post("/update_weights", json={"update_info": {"checkpoint": "c"}}).status_code == 400  # not started
    assert http.post("/init_weight_transfer_engine", json={"init_info": {}}).json() == {"message": "Weight transfer initialized"}
    assert http.post("/start_weight_update").json() == {"message": "Weight update started"}
    http.post("/update_weights", json={"update_info": {"checkpoint": "of a trainer that died"}})
    assert http.post("/start_weight_update").status_code == 200  # forgets it
    assert http.post("/finish_weight_update").status_code == 400
    http.post("/start_weight_update")
    assert "update_info.checkpoint" in http.post("/update_weights", json={"update_info": {"names": []}}).text
    assert http.post("/update_weights", json={"update_info": {"checkpoint": "c"}}).json() == {"message": "Weights updated"}
    assert http.post("/finish_weight_update", json={"weight_version": "step-7"}).status_code == 400
    assert http.post("/finish_weight_update", json={"weight_version": "7"}).json() == {"message": "Weight update finished"}
    assert http.get("/weight_info").json() == {"weight_version": "7"} and service.policy.swapped == [("c", 7)]
    http.post("/start_weight_update")
    http.post("/update_weights", json={"update_info": {"checkpoint": "missing"}})
    assert http.post("/finish_weight_update").status_code == 400  # the old ones keep serving
    assert http.get("/weight_info").json() == {"weight_version": "7"}
    assert http.post("/start_weight_update").status_code == 200  # and another update can begin


def test_pausing_needs_a_policy_that_can(service, http):
    assert http.post("/pause?mode=keep").status_code == 501
    assert http.post("/pause?mode=nap").status_code == 400
    asked = []

    async def pause(mode):
        asked.append(mode)
        service.policy.paused = True

    async def resume():
        service.policy.paused = False

    service.policy.pause, service.policy.resume = pause, resume
    assert http.post("/pause").json() == {"status": "paused"} and http.get("/is_paused").json() == {"is_paused": True}
    assert http.post("/pause?mode=keep&clear_cache=false").status_code == 200 and asked == ["abort", "keep"]
    assert http.post("/resume").json() == {"status": "resumed"} and http.get("/is_paused").json() == {"is_paused": False}


def test_sampling_parameters_keep_their_meaning():
    sampling = {"max_tokens": 5, "temperature": 0.3, "top_k": -1, "min_p": 0.1, "stop": "x", "stop_token_ids": [9], "seed": 3,
                "logprobs": 2, "logit_bias": {"7": -1.5}, "structured_outputs": {"json": {"type": "object"}},
                "repetition_penalty": 1.1, "extra_args": {"deadline_s": 2}}  # fmt: skip
    request = decoder.decode(json.dumps({"token_ids": [1], "priority": -1, "sampling_params": sampling}).encode())
    p = to_params(request, room=100, stop_ids=(4, 9), tenant="ann")
    assert (p.max_tokens, p.temperature, p.top_k, p.min_p, p.stop, p.seed, p.top_logprobs) == (5, 0.3, 0, 0.1, ("x",), 3, 2)
    assert p.stop_ids == (9, 4) and p.logit_bias == ((7, -1.5),) and p.constraint.kind == "json_schema"
    assert (p.tenant, p.priority, p.deadline_s) == ("ann", -1, 2)
    sampling |= {"ignore_eos": True, "max_tokens": None}
    request = decoder.decode(json.dumps({"token_ids": [1], "sampling_params": sampling}).encode())
    p = to_params(request, room=100, stop_ids=(4, 9), tenant="ann")
    assert p.stop_ids == (9,) and p.max_tokens == 100


def test_spans_kept_sets_and_stop_reasons_over_a_swap():
    out = Output(want_logprobs=True, stop_ids=(6,))
    out.add(Chunk((1, 2), (-1.0, -2.0), 3))
    out.add(Chunk((5,), (float("-inf"),), 4, kept=((5, 8),), sampled_logprobs=(-0.1,), top_logprobs=(((8, -0.2), (5, -9.0)),)))
    last = out.add(Chunk((6,), (-1.0,), 4, "stop", 2))
    assert last["weight_versions"] == [{"version": "3", "start": 0, "end": 2}, {"version": "4", "start": 2, "end": 4}]
    whole = out.whole()
    assert whole["sampling_mask"] == [[], [], [5, 8], []] and whole["sampled_logprobs"] == [-1.0, -2.0, -0.1, -1.0]
    assert whole["stop_reason"] == 6 and out.cached_tokens == 2
    third = whole["logprobs"]["content"][2]
    assert third["rank"] == 2 and third["logprob"] == -9.0 and [c["token_id"] for c in third["top_logprobs"]] == [5, 8]
    named = Output(False, ())
    named.add(Chunk((1,), (-1.0,), 1, "stop", stop="end"))
    assert named.whole()["stop_reason"] == "end" and named.whole()["logprobs"] is None


def test_a_kept_set_stored_as_bits_travels_as_ids():
    from tidelock.tokens.policy import compact

    ids = np.arange(0, 288, 3)
    assert isinstance(compact(ids, 288), bytes)
    out = Output(False, ())
    assert out.add(Chunk((3, 6), (-1.0, -1.0), 1, kept=(compact(ids, 288), None)))["sampling_mask"] == [ids.tolist(), []]


def test_routing_travels_as_npy():
    import base64
    import io

    array = np.arange(12, dtype=np.uint8).reshape(2, 3, 2)
    assert np.array_equal(np.load(io.BytesIO(base64.b64decode(npy64(array)))), array)
