"""Nobody sees what is somebody else's: every endpoint with an id, asked by a stranger, has never heard of it."""

from __future__ import annotations

import logging

import httpx2 as httpx
import pytest

from tidelock.service.accounts import SCOPES
from tidelock.service.app import every_route
from tidelock.service.ladder import Limits
from tidelock.service.plans import Plan
from tidelock.service.surfaces.routes import ROUTES

SECRET_WORDS = "the password is swordfish"
ASK = {"model": "tide", "messages": [{"role": "user", "content": SECRET_WORDS}], "max_tokens": 200}


@pytest.fixture
def anns(service):
    """Ann's key and one of everything that can be hers."""
    secret = service.key("ann")

    def call(method: str, path: str, key: str = secret, **options) -> httpx.Response:
        headers = {"authorization": f"Bearer {key}"}
        return httpx.request(method, service.running.base_url + path, headers=headers, **options)

    chat = call("POST", "/chat/completions", json={**ASK, "store": True}).json()
    response = call("POST", "/responses", json={"model": "tide", "input": SECRET_WORDS}).json()
    file = call("POST", "/files", files={"file": b"{}"}, data={"purpose": "batch"}).json()
    body = {"input_file_id": file["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    batch = call("POST", "/batches", json=body).json()
    boss = service.state.keys.create("ann", scopes=SCOPES)[1]
    project = call("POST", "/organization/projects", boss, json={"name": "p"}).json()
    member = call("POST", "/organization/users", boss, json={"email": "a@b.c", "role": "owner"}).json()
    key = call("POST", f"/organization/projects/{project['id']}/api_keys", boss, json={}).json()
    ids = {"/v1/organization/projects": project["id"], "/v1/organization/users": member["id"], "key": key["id"], "boss": boss}
    service.state.payments.manual("ann", 5, "first")
    ids["/v1/organization/invoices"] = call("GET", "/organization/invoices").json()["data"][0]["id"]
    ids["/v1/organization/receipts"] = call("GET", "/organization/receipts").json()["data"][0]["id"]
    ids |= {"/v1/chat/completions": chat["id"], "/v1/responses": response["id"], "/v1/files": file["id"], "/v1/batches": batch["id"]}
    message = {"custom_id": "a", "params": {"model": "tide", "max_tokens": 9, "messages": ASK["messages"]}}
    made = call("POST", "/messages/batches", json={"requests": [message]}).json()["id"]
    service.wait(lambda: call("GET", f"/messages/batches/{made}").json()["processing_status"] == "ended")
    talk = call("POST", "/conversations", json={"items": [{"role": "user", "content": SECRET_WORDS}]}).json()["id"]
    ids |= {"/v1/conversations": talk, "item": call("GET", f"/conversations/{talk}/items").json()["data"][0]["id"]}
    ids |= {f"{root}/messages/batches": made for root in ("/v1", "/anthropic/v1")}
    return call, ids, chat["trace"]["node"]


# What is sold to all.
EVERYBODY_S = ("/v1/models/{model}", "/anthropic/v1/models/{model}", "/v1/organization/plans/{id}/preview")
OWNED = [route for route in ROUTES if "{" in route.path and route.path not in EVERYBODY_S]
BODIES = {
    "/v1/chat/completions/{id}": {"metadata": {}}, "/v1/organization/projects/{id}": {"name": "mine"},
    "/v1/conversations/{id}": {"metadata": {}}, "/v1/conversations/{id}/items": {"items": []},
    "/v1/organization/projects/{id}/api_keys": {}, "/v1/organization/users/{id}": {"role": "viewer"},
}  # fmt: skip


def test_the_table_has_every_endpoint_with_an_id(anns):
    call, ids, _ = anns
    """So that nobody adds one without saying here what a stranger would ask it for."""
    assert {route.path.partition("/{id}")[0] for route in OWNED} | {"key", "boss", "item"} == set(ids)
    assert all("{id}" in route.path for route in OWNED)


def test_whatever_else_is_routed_with_a_name_in_its_path_is_the_operator_s_or_a_file_of_the_console(service):
    """The published table is all that customers have; the rest of the application must not grow a door beside it."""
    published = {route.path.replace("{model}", "{id:path}") for route in ROUTES}
    others = {route.path for route in every_route(service.state) if "{" in route.path} - published
    assert all(path.startswith(("/admin/", "/console")) for path in others), others


def test_a_foreign_id_is_404_everywhere_and_reads_the_same_as_no_id(service, anns):
    _, ids, _ = anns
    bob = service.key("bob", scopes=SCOPES)

    def ask(method: str, path: str, key: str, body: dict | None = None) -> httpx.Response:
        url = service.running.base_url.removesuffix("/v1") + path
        return httpx.request(method, url, headers={"authorization": f"Bearer {key}"}, json=body)

    for route in OWNED:
        root = route.path.partition("/{id}")[0]
        answers = []
        for object_id in (ids[root], "never_existed"):
            path = route.path.replace("{id}", object_id).replace("{key}", ids["key"]).replace("{item}", ids["item"])
            answer = ask(route.method, path, bob, BODIES.get(route.path))
            assert answer.status_code == 404, (route.method, path, answer.text)
            assert answer.json()["error"]["type"] in ("resource_not_found_error", "not_found_error")
            answers.append(answer.json()["error"] | {"message": answer.json()["error"]["message"].replace(object_id, "ID")})
        assert answers[0] == answers[1]
    for route in OWNED:  # and it is all still there for its owner
        if route.method == "GET":
            root = route.path.partition("/{id}")[0]
            path = route.path.replace("{id}", ids[root]).replace("{key}", ids["key"]).replace("{item}", ids["item"])
            assert ask("GET", path, ids["boss"]).status_code == 200, path


def test_foreign_ids_inside_bodies_and_queries_lead_nowhere(service, anns):
    call, ids, node = anns
    bob = service.key("bob")
    batch = {"input_file_id": ids["/v1/files"], "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    assert call("POST", "/batches", bob, json=batch).status_code == 404
    continued = {"model": "tide", "input": "x", "previous_response_id": ids["/v1/responses"]}
    assert call("POST", "/responses", bob, json=continued).status_code == 400
    assert call("POST", "/responses/input_tokens", bob, json=continued).status_code == 400
    referred = {"model": "tide", "input": [{"type": "item_reference", "id": f"rs_{ids['/v1/responses'].removeprefix('resp_')}_0"}]}
    assert call("POST", "/responses", json=referred | {"store": False}).status_code == 200
    assert call("POST", "/responses", bob, json=referred).status_code == 400
    talking = {"model": "tide", "input": "x", "conversation": ids["/v1/conversations"]}
    assert call("POST", "/responses", bob, json=talking).status_code == 404
    feedback = {"node": node, "success": True, "reward": 1, "source": "bob"}
    assert call("POST", "/feedback", bob, json=feedback).status_code == 404
    for root in [path for path in ids if path.startswith("/v1") and "organization" not in path]:
        listed = call("GET", f"{root.removeprefix('/v1')}?after={ids[root]}", bob)
        assert listed.status_code in (200, 405) and listed.json().get("data", []) == []


def test_lists_usage_and_balance_are_one_s_own(service, anns):
    call, _, _ = anns
    bob = service.key("bob", nano_usd=7)
    for path in ("/files", "/batches", "/chat/completions", "/organization/receipts", "/organization/payments"):
        assert call("GET", path, bob).json()["data"] == [] and call("GET", path).json()["data"]
    usage = "/organization/usage/completions?start_time=0&limit=1440&bucket_width=1d&end_time=86400"
    assert all(b["results"] == [] for b in call("GET", usage, bob).json()["data"])
    service.state.tiers.set_caps("ann", Limits(requests=12345), "key_of_ann")
    service.state.plans.define(Plan("coder", 1, 1, None, None, 1))
    service.state.plans.subscribe("ann", "coder")
    assert call("GET", "/organization/limits").json()["caps"] and call("GET", "/organization/limits", bob).json()["caps"] == {}
    assert call("GET", "/organization/subscription").json()["plan"] == "coder"
    assert call("GET", "/organization/subscription", bob).status_code == 404
    assert call("GET", "/organization/invoices", bob).json()["data"] == [] and call("GET", "/organization/invoices").json()["data"]
    assert call("GET", "/users/me/balance", bob).json()["data"]["available_nano_usd"] == 7


def test_a_key_of_one_project_is_not_found_under_another(service, anns):
    call, ids, _ = anns
    other = call("POST", "/organization/projects", ids["boss"], json={"name": "other"}).json()["id"]
    for method in ("GET", "DELETE"):
        assert call(method, f"/organization/projects/{other}/api_keys/{ids['key']}", ids["boss"]).status_code == 404


def test_a_stranger_s_project_and_member_cannot_be_put_on_a_key(service, anns):
    call, ids, _ = anns
    bob = service.key("bob", scopes=SCOPES)
    own = call("GET", "/organization/projects", bob).json()["data"][0]["id"]
    body = {"member": ids["/v1/organization/users"]}
    assert call("POST", f"/organization/projects/{own}/api_keys", bob, json=body).status_code == 404
    assert call("GET", "/organization/audit_logs", bob).json()["data"] and all(
        ids["/v1/organization/users"] != line["target"] for line in call("GET", "/organization/audit_logs", bob).json()["data"]
    )


def test_every_endpoint_wants_a_key(service):
    for route in ROUTES:
        path = route.path.replace("{id}", "x").replace("{model}", "tide").replace("{key}", "x")
        answer = httpx.request(route.method, service.running.base_url.removesuffix("/v1") + path)
        assert answer.status_code == 401, (route.method, path, answer.text)


def test_two_keys_of_one_customer_share_objects_but_not_conversations(service, anns):
    call, ids, _ = anns
    other = service.key("ann")
    assert call("GET", f"/responses/{ids['/v1/responses']}", other).status_code == 200
    before = len(service.state.traces.nodes)
    call("POST", "/chat/completions", other, json=ASK)
    assert len(service.state.traces.nodes) == before + 2


def test_no_key_and_no_words_of_a_prompt_get_into_the_log(service, anns, caplog):
    call, _, _ = anns
    caplog.set_level(logging.DEBUG)
    secret = service.key("cy")
    call("POST", "/chat/completions", secret, json=ASK)
    call("POST", "/chat/completions", "sk-" + "wrong" * 9, json=ASK)
    call("POST", "/chat/completions", secret, content=b'{"model": "tide", "messages": "' + SECRET_WORDS.encode() + b'"')
    service.policy.template.sampled = None  # an unexpected failure, with the prompt in its hands
    assert call("POST", "/chat/completions", secret, json={**ASK, "thinking": {"type": "disabled"}}).status_code == 500
    del service.policy.template.sampled
    assert "failed" in caplog.text
    for word in (secret, secret[3:20], "sk-wrong", "swordfish"):
        assert word not in caplog.text
