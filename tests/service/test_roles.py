"""Who may what, for every route there is: the table is made from the router, so that no new door is left out of it."""

from __future__ import annotations

import httpx2 as httpx
import pytest
from starlette.routing import Route

from tidelock.service.accounts import SCOPES
from tidelock.service.app import every_route
from tidelock.service.surfaces.routes import ROUTES

# Neither a key nor a role: what machines and browsers ask before anybody has signed in, and what a signature opens.
OPEN = {"/health", "/metrics", "/openapi.json", "/webhooks/payments"}
# By the first match: which scope of a key opens it. "" is any key.
NEEDS = (
    ("/v1/organization/projects", "admin"), ("/v1/organization/users", "admin"), ("/v1/organization/audit_logs", "admin"),
    ("/v1/organization/subscription", "billing"), ("/v1/organization/plans", "billing"), ("/v1/organization/payments", "billing"),
    ("/v1/organization/invoices", "billing"),
    ("/v1/organization/", "usage"), ("/v1/organization", ""), ("/v1/users/me/balance", "usage"), ("/v1/usages", "usage"),
    ("/v1/files", "files"), ("/v1/batches", "files"), ("/v1/messages/batches", "files"), ("/anthropic/v1/messages/batches", "files"),
    ("/v1/", "model"), ("/anthropic/v1/", "model"),
)  # fmt: skip
ALSO_ADMIN = {("POST", "/v1/organization/subscription"), ("DELETE", "/v1/organization/subscription")}


def filled(path: str) -> str:
    for name in ("{id:path}", "{model}", "{id}", "{key}", "{path:path}"):
        path = path.replace(name, "x")
    return path


@pytest.fixture
def ask(service):
    root = service.running.base_url.removesuffix("/v1")

    def call(method: str, path: str, secret: str | None) -> int:
        headers = {"authorization": f"Bearer {secret}"} if secret else {}
        stream = "stream" in path
        with httpx.Client(timeout=20) as client, client.stream(method, root + filled(path), headers=headers) as answer:
            if not stream:
                answer.read()
            return answer.status_code

    return call


def test_every_route_of_a_customer_opens_to_its_scope_and_to_no_other(service, ask):
    keys = {scope: service.key("ann", 0, scopes=[scope]) for scope in SCOPES}
    both = service.key("ann", 0, scopes=["billing", "admin"])
    for route in ROUTES:
        needed = next(scope for path, scope in NEEDS if route.path.startswith(path))
        if route.path == "/v1/organization/spend_limit" and route.method != "GET":
            needed = "admin"
        for scope, secret in keys.items():
            status = ask(route.method, route.path, secret)
            if (route.method, route.path) in ALSO_ADMIN:
                assert status == 403, (route.method, route.path, scope)
            else:
                assert (status != 403) == (needed in ("", scope)), (route.method, route.path, scope, status)
                assert status < 500, (route.method, route.path, scope, status)
        if (route.method, route.path) in ALSO_ADMIN:
            assert ask(route.method, route.path, both) not in (403, 500)


def test_every_other_route_is_the_operator_s(service, ask):
    published = {(route.method, route.path.replace("{model}", "{id:path}")) for route in ROUTES}
    user = service.key("ann", 0, scopes=SCOPES)
    looked_at = set()
    for route in every_route(service.state):
        methods = route.methods or () if isinstance(route, Route) else ()
        for method in sorted(set(methods) - {"HEAD"}):
            path = route.path
            if (method, path) in published or path in OPEN or path.startswith("/console") or path == "/v1/feedback":
                continue
            looked_at.add(path)
            assert ask(method, path, None) == 401, (method, path)
            assert ask(method, path, user) == 403, (method, path)
    assert {"/admin/ledger", "/admin/analytics", "/admin/weights", "/admin/organizations/{id}/suspend"} <= looked_at
    assert ask("POST", "/v1/feedback", None) == 401
