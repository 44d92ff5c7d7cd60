"""What a customer reads about their account is what the ledger says, to the nano-dollar."""

from __future__ import annotations

import time
from decimal import Decimal

import httpx2 as httpx
import openai
import pytest


def get(service, secret: str, path: str, **query) -> dict:
    headers = {"authorization": f"Bearer {secret}"}
    answer = httpx.get(service.running.base_url + path, params=query, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer.json()


def ask(client, **more):
    return client.chat.completions.create(model="tide", messages=[{"role": "user", "content": "hi"}], **more).usage


@pytest.fixture
def used(service):
    """Ann has two keys and made three requests."""
    secrets = [service.key("ann"), service.key("ann", nano_usd=0)]
    service.policy.cached_tokens = 4
    usages = [ask(service.client(secret)) for secret in (*secrets, secrets[1])]
    return service, secrets, usages


def test_usage_and_costs_add_up_to_the_bills_in_the_official_client(used):
    service, secrets, bills = used
    admin = openai.OpenAI(base_url=service.running.base_url, api_key="x", admin_api_key=secrets[0]).admin.organization
    since = int(time.time()) - 3600
    results = [r for bucket in admin.usage.completions(start_time=since).data for r in bucket.results]
    (total,) = results
    assert total.num_model_requests == 3
    assert total.input_tokens == sum(b.prompt_tokens for b in bills)
    assert total.output_tokens == sum(b.completion_tokens for b in bills)
    assert total.input_cached_tokens == 12
    by_key = [r for b in admin.usage.completions(start_time=since, group_by=["api_key_id", "model"]).data for r in b.results]
    assert sorted(r.num_model_requests for r in by_key) == [1, 2] and {r.model for r in by_key} == {"tide"}
    one = [k.id for k in service.state.keys.list()][0]
    mine = [r for b in admin.usage.completions(start_time=since, api_key_ids=[one]).data for r in b.results]
    assert len(mine) == 1
    costs = get(service, secrets[0], "/organization/costs", start_time=since)
    raw = [r["amount"]["value"] for b in costs["data"] for r in b["results"]]
    assert sum(Decimal(str(v)) for v in raw) * 10**9 == sum(b.cost_nano_usd for b in bills)


def test_buckets_cover_the_time_asked_for_once_page_by_page(used):
    service, secrets, _ = used
    now = int(time.time())
    query = {"start_time": now - 7200, "end_time": now + 3600, "bucket_width": "1m", "limit": 50}
    pages, page = [], {}
    while not pages or pages[-1]["has_more"]:
        pages.append(get(service, secrets[0], "/organization/usage/completions", **query, **page))
        page = {"page": pages[-1]["next_page"]}
    buckets = [b for p in pages for b in p["data"]]
    starts = [b["start_time"] for b in buckets]
    assert starts == sorted(set(starts)) and all(a["end_time"] == b["start_time"] for a, b in zip(buckets, buckets[1:]))
    assert sum(r["num_model_requests"] for b in buckets for r in b["results"]) == 3


def test_balance_limit_and_windows_agree_with_the_ledger(used):
    service, secrets, bills = used
    spent = sum(b.cost_nano_usd for b in bills)
    free = service.state.ledger.balance("ann")
    assert get(service, secrets[1], "/users/me/balance")["data"]["available_nano_usd"] == free == 10**9 - spent
    windows = get(service, secrets[0], "/usages")
    for window in (windows["usage"], windows["limits"][0]["detail"]):
        assert window["used"] == str(spent) and window["limit"] == str(spent + free)
    assert windows["limits"][0]["window"] == {"duration": 300, "timeUnit": "TIME_UNIT_MINUTE"}
    limit = get(service, secrets[0], "/organization/spend_limit")
    assert limit["threshold_amount"] == (spent + free) // 10_000_000 and limit["enforcement"]["status"] == "enforcing"


def test_vouchers_are_told_apart_from_cash(service):
    secret = service.key("vera", nano_usd=5)
    service.state.ledger.grant("vera", 2_000_000_000, lot="welcome")
    data = get(service, secret, "/users/me/balance")["data"]
    assert (data["voucher_balance"], data["available_nano_usd"]) == (2.0, 2_000_000_005)
    assert Decimal(str(data["cash_balance"])) * 10**9 == 5


def test_kinds_of_usage_there_are_not_are_empty_pages(used):
    service, secrets, _ = used
    for kind in ("embeddings", "images", "moderations", "vector_stores"):
        page = get(service, secrets[0], f"/organization/usage/{kind}", start_time=int(time.time()))
        assert page["object"] == "page" and all(bucket["results"] == [] for bucket in page["data"])


@pytest.mark.parametrize(
    "query", [{}, {"start_time": "x"}, {"start_time": -1}, {"start_time": 1, "bucket_width": "1y"}, {"start_time": 1, "limit": 9999}]
)
def test_a_query_that_means_nothing_is_400(service, query):
    headers = {"authorization": f"Bearer {service.key()}"}
    url = service.running.base_url + "/organization/usage/completions"
    assert httpx.get(url, params=query, headers=headers).status_code == 400


def test_a_prompt_is_counted_as_it_will_be_billed(service):
    secret = service.key()
    body = {"model": "tide", "messages": [{"role": "user", "content": "hi"}]}
    answer = httpx.post(
        service.running.base_url + "/tokenizers/estimate-token-count", json=body, headers={"authorization": f"Bearer {secret}"}
    )
    assert answer.json()["data"]["total_tokens"] == ask(service.client(secret)).prompt_tokens


def test_kept_reasoning_is_counted_as_input(service):
    client, question = service.client(), {"role": "user", "content": "hi"}
    answers = [
        client.chat.completions.create(model="tide", messages=[question, {"role": "assistant", "content": "x", **more}, question])
        for more in ({}, {"reasoning_content": "because it is so"})
    ]
    assert answers[1].usage.prompt_tokens > answers[0].usage.prompt_tokens
