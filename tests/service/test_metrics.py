"""/metrics against what was really asked and said."""

import httpx2 as httpx
from prometheus_client.parser import text_string_to_metric_families

from tidelock.service.metrics import route_of
from tidelock.tokens.message import Message


def scrape(service):
    text = httpx.get(service.running.base_url.removesuffix("/v1") + "/metrics").text
    return {(s.name, *sorted(s.labels.values())): s.value for f in text_string_to_metric_families(text) for s in f.samples}


def ask(service, **options):
    return service.client(service.key(), max_retries=0).chat.completions.create(
        model="tide", messages=[{"role": "user", "content": "hi"}], **options)  # fmt: skip


def test_tokens_and_requests_add_up(service):
    service.policy.cached_tokens = 4
    usage = [ask(service).usage for _ in range(3)]
    m = scrape(service)
    assert m["tidelock_prompt_tokens_total",] == sum(u.prompt_tokens for u in usage)
    assert m["tidelock_generated_tokens_total",] == sum(u.completion_tokens for u in usage) == sum(map(len, service.policy.sampled))
    assert m["tidelock_cached_tokens_total",] == 12
    assert m["tidelock_requests_finished_total", "stop"] == 3
    assert m["tidelock_time_to_first_token_seconds_count",] == m["tidelock_request_seconds_count",] == 3
    assert m["tidelock_inter_token_latency_seconds_count",] == sum(-(-len(s) // 5) - 1 for s in service.policy.sampled)
    assert (m["tidelock_requests", "waiting"], m["tidelock_requests", "running"]) == (0, 0)
    assert m["tidelock_http_responses_total", "/v1/chat/completions", "200"] == 3


def test_failures_swaps_and_people_who_leave_are_seen(service):
    service.policy.fail_after = 0
    url, key = service.running.base_url.removesuffix("/v1"), service.key(role="admin")
    headers = {"authorization": f"Bearer {key}"}
    try:
        ask(service)
    except Exception:
        pass
    service.policy.fail_after, service.policy.pause_s = None, 0.05
    service.policy.turns = [Message("assistant", "tide " * 200)]  # ten seconds of it
    stream = ask(service, stream=True)
    next(iter(stream))
    assert scrape(service)["tidelock_requests", "running"] == 1
    stream.close()
    service.wait(lambda: scrape(service)["tidelock_requests", "running"] == 0)
    for checkpoint, version in (("missing", 5), ("c", 6)):
        httpx.post(url + "/admin/weights", json={"checkpoint": checkpoint, "version": version}, headers=headers)
    httpx.get(url + "/wp-admin.php")
    m = scrape(service)
    assert m["tidelock_policy_errors_total", "503"] == 1 and m["tidelock_requests_finished_total", "error"] == 1
    assert m["tidelock_weight_swaps_total", "failed"] == m["tidelock_weight_swaps_total", "done"] == 1
    assert m["tidelock_weights_version",] == 6
    assert m["tidelock_http_responses_total", "404", "other"] == 1
    assert "wp-admin" not in httpx.get(url + "/metrics").text


def test_there_are_as_many_routes_as_routes():
    scope = {"path": "/v1/files/file_7/content", "endpoint": print, "path_params": {"file_id": "file_7"}}
    deep = {"path": "/v1/models/a/b", "endpoint": print, "path_params": {"id": "a/b"}}
    assert route_of(scope) == "/v1/files/{file_id}/content" and route_of(deep) == "/v1/models/{id}"
    assert route_of({"path": "/x"}) == "other"
