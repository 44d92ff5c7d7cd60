"""The operator's routes: for admin keys alone, and each does what `tidelock admin` does."""

from __future__ import annotations

import httpx2 as httpx
import pytest

from tidelock.service.accounts import SCOPES
from tidelock.service.ladder import KIMI
from tidelock.service.prices import PriceBook, Price
from tidelock.service.surfaces import operator

USD = 10**9
ROUTES = [(next(iter(route.methods - {"HEAD"})), route.path) for route in operator.routes(None)]


@pytest.fixture
def admin(service):
    secret = service.key("house", nano_usd=0, role="admin")
    url = service.running.base_url.removesuffix("/v1")

    def call(method, path, key=secret, status=200, **options):
        answer = httpx.request(method, url + path, headers={"authorization": f"Bearer {key}"} if key else {}, **options)
        assert answer.status_code == status, (method, path, answer.text)
        return answer.json()

    return call


@pytest.mark.parametrize("method, path", ROUTES)
def test_nobody_else_gets_in(service, admin, method, path):
    service.key("ann")
    owner = service.key("ann", scopes=SCOPES)
    path = path.replace("{id}", "ann")
    admin(method, path, None, 401, json={})
    assert "role admin" in admin(method, path, owner, 403, json={})["error"]["message"]


def test_organisations_are_found_paged_and_shown(service, admin):
    for name in ("ann", "bob", "cy_d", "cyxd"):
        service.key(name)
    service.client(service.key("bob")).chat.completions.create(model="tide", messages=[{"role": "user", "content": "hi"}])
    ids, after = [], ""
    while True:
        page = admin("GET", "/admin/organizations", params={"limit": 2, "after": after})
        ids += [o["id"] for o in page["data"]]
        if not page["has_more"]:
            break
        after = page["last_id"]
    assert ids == ["ann", "bob", "cy_d", "cyxd", "house"]
    assert [o["id"] for o in admin("GET", "/admin/organizations", params={"q": "Y_"})["data"]] == ["cy_d"]
    (bob,) = admin("GET", "/admin/organizations", params={"q": "bob"})["data"]
    assert bob["requests_30d"] == 1 and bob["available_nano_usd"] == 2 * USD - bob[
        "spent_30d_nano_usd"
    ] == service.state.ledger.balance("bob")
    detail = admin("GET", "/admin/organizations/bob")
    assert detail["balance"]["available_nano_usd"] == bob["available_nano_usd"] and len(detail["keys"]) == 2
    assert admin("GET", "/admin/organizations/bob/receipts")["data"][0]["cost_nano_usd"] == bob["spent_30d_nano_usd"]
    for method, path, body in (
        ("GET", "", None),
        ("GET", "/receipts", None),
        ("POST", "/vouchers", {"usd": "1", "name": "x"}),
        ("POST", "/limits", {}),
    ):
        admin(method, f"/admin/organizations/nobody{path}", status=404, json=body)


def test_a_voucher_is_given_once_logged_and_exact(service, admin):
    service.key("ann", nano_usd=0)
    given = admin("POST", "/admin/organizations/ann/vouchers", json={"usd": "2.500000001", "name": "hello"})
    assert given["balance"]["voucher_nano_usd"] == 2_500_000_001
    admin("POST", "/admin/organizations/ann/vouchers", json={"usd": "9", "name": "hello"}, status=409)
    for wrong in ("0", "-1", "x", "0.0000000001", "1e40", "NaN"):
        admin("POST", "/admin/organizations/ann/vouchers", json={"usd": wrong, "name": "wrong"}, status=400)
    log = admin("GET", "/admin/audit_logs", params={"organization": "ann"})["data"]
    assert [e["detail"] for e in log if e["type"] == "voucher.granted"] == [{"usd": "2.500000001"}]
    assert log[0]["actor"]["id"] == service.state.keys.list("house")[0].id


def test_limits_are_set_by_hand_and_given_back_to_the_ladder(service, admin):
    service.state.tiers.set_ladder(KIMI)
    service.key("ann", nano_usd=1 * USD)
    assert admin("POST", "/admin/organizations/ann/limits", json={"tier": 4, "requests": 17})["limits"]["requests"] == 17
    assert admin("GET", "/admin/organizations/ann")["by_hand"] == {
        "tier": 4, "concurrency": None, "requests": 17, "tokens": None, "day_tokens": None}  # fmt: skip
    assert admin("POST", "/admin/organizations/ann/limits", json={})["tier"] == 0
    admin("POST", "/admin/organizations/ann/limits", json={"requests": -1}, status=400)
    assert any(e["type"] == "limits.ladder" for e in admin("GET", "/admin/audit_logs")["data"])


def test_the_ledger_is_verified_and_a_wrong_balance_is_seen(service, admin):
    service.client(service.key("ann")).chat.completions.create(model="tide", messages=[{"role": "user", "content": "hi"}])
    audit = admin("GET", "/admin/ledger")
    assert audit["sound"] and audit["transactions"] == 3 and len(audit["root"]) == 64
    with service.state.ledger.db.transaction() as tx:
        tx("UPDATE accounts SET balance_nano = balance_nano + 1 WHERE customer = 'ann' AND kind = 'cash'")
    audit = admin("GET", "/admin/ledger")
    assert not audit["sound"] and audit["wrong_balances"] == 1
    with service.state.ledger.db.transaction() as tx:
        tx("UPDATE accounts SET balance_nano = balance_nano - 1 WHERE customer = 'ann' AND kind = 'cash'")


def test_prices_say_which_version_is_in_force(service, admin):
    PriceBook("next", {"tide": Price(1, 1, 1)}, effective=4e9).register(service.state.ledger.db)
    shown = {v["id"]: v["current"] for v in admin("GET", "/admin/prices")["data"]}
    assert shown == {"v1": True, "next": False}
    assert admin("GET", "/admin/plans")["data"] == []
