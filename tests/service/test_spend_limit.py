"""The spend limit in OpenAI's admin shape is the organisation's hard budget; and what nobody may delete."""

from __future__ import annotations

import httpx2 as httpx
import openai
import pytest

from tidelock.service import budget_rules
from tidelock.service.accounts import SCOPES

ASK = {"model": "tide", "messages": [{"role": "user", "content": "hi"}]}


def test_it_is_set_enforced_raised_and_taken_away_over_http(service):
    secret, boss = service.key("ann"), service.state.keys.create("ann", scopes=SCOPES)[1]

    def call(method: str, key: str = boss, **options) -> httpx.Response:
        url = f"{service.running.base_url}/organization/spend_limit"
        return httpx.request(method, url, headers={"authorization": f"Bearer {key}"}, **options)

    db, now = service.state.ledger.db, service.state.ledger.clock()
    budget_rules.set_budget(db, "ann", "", 5, None, now)
    body = {"threshold_amount": 0, "currency": "USD", "interval": "month"}
    assert call("POST", secret, json=body).status_code == 403
    assert call("POST", json=body).json()["threshold_amount"] == call("GET").json()["threshold_amount"] == 0
    client = service.client(secret)
    with pytest.raises(openai.RateLimitError, match="budget") as refused:
        client.chat.completions.create(**ASK)
    assert refused.value.response.headers["x-should-retry"] == "false" and not service.policy.prompts
    call("POST", json={**body, "threshold_amount": 50})
    client.chat.completions.create(**ASK)
    call("POST", json=body)  # what was spent before it was set counts
    with pytest.raises(openai.RateLimitError):
        client.chat.completions.create(**ASK)
    for _ in range(2):
        assert call("DELETE").json() == {"object": "organization.spend_limit.deleted", "deleted": True}
    client.chat.completions.create(**ASK)
    assert [(b["soft_nano_usd"], b["hard_nano_usd"]) for b in budget_rules.listed(db, "ann", now)] == [(5, None)]
    for wrong in ({"threshold_amount": -1}, {"currency": "EUR"}, {"interval": "day"}):
        assert call("POST", json={**body, **wrong}).status_code == 400


def test_deleting_a_model_is_nobody_s_to_do(service):
    client = service.client()
    with pytest.raises(openai.PermissionDeniedError):
        client.models.delete("tide")
    with pytest.raises(openai.NotFoundError):
        client.models.delete("ft:gone")
