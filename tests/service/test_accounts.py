"""Laws of the accounts: a key does what it was given and its member may, from where it may, and every act is on record."""

from __future__ import annotations

import sqlite3
import threading
import time
from pathlib import Path

import httpx2 as httpx
import openai
import pytest

from tidelock.service.accounts import ROLES, SCOPES, Accounts, UnknownId
from tidelock.service.db import Conflict, Database
from tidelock.service.guesses import Guesses
from tidelock.service.keys import KeyStore
from tidelock.tokens.errors import UserError

FIRST_RELEASE = Path(__file__).parent / "data" / "first_release.sql"
ASK = {"model": "tide", "messages": [{"role": "user", "content": "hi"}]}
WANTS = {"model": ("POST", "/chat/completions"), "files": ("GET", "/files"), "usage": ("GET", "/users/me/balance"),
         "admin": ("GET", "/organization/projects")}  # fmt: skip


@pytest.fixture
def accounts(db):
    return Accounts(db)


@pytest.fixture
def keys(db, tmp_path):
    return KeyStore.open(db, tmp_path / "pepper")


def call(service, secret: str, method: str, path: str, **options) -> httpx.Response:
    headers = {"authorization": f"Bearer {secret}", **options.pop("headers", {})}
    return httpx.request(method, service.running.base_url + path, headers=headers, **options)


def test_a_customer_s_first_key_makes_the_organisation_and_its_default_project(keys, accounts):
    (first, _), (second, _) = keys.create("ann"), keys.create("ann")
    (project,) = accounts.projects("ann")
    assert first.project == second.project == project["id"] and project["standard"] == 1
    assert [o["id"] for o in accounts.organizations()] == ["ann"]


def test_first_keys_made_at_the_same_moment_share_one_organisation(keys, accounts):
    made: list[str] = []
    threads = [threading.Thread(target=lambda: made.append(keys.create("ann")[0].project)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 6 and set(made) == {accounts.projects("ann")[0]["id"]} and len(accounts.projects("ann")) == 1


def test_keys_of_the_first_release_work_on_in_a_default_project(tmp_path):
    path = tmp_path / "service.sqlite"
    old = sqlite3.connect(path)
    old.executescript(FIRST_RELEASE.read_text())
    old.close()
    db = Database(path)
    keys = KeyStore(db, b"x" * 32)
    assert [o["id"] for o in Accounts(db).organizations()] == ["ann", "bob"]
    for key in keys.list():
        assert key.project == Accounts(db).projects(key.customer)[0]["id"] and keys.live(key.id) == key
        assert key.scopes == SCOPES[:-1] and key.models == key.addresses == ()
    db.close()


def test_a_file_of_the_schema_before_accounts_keeps_its_keys(target, tmp_path):
    db = Database(target, version=4)
    with db.transaction() as tx:
        tx("INSERT INTO customers VALUES ('cy', 0, '', 0)")
        hashed = KeyStore(db, b"x" * 32)._hash("sk-old")
        tx("INSERT INTO keys (id, hash, hint, customer, name, role, training_consent, may_grant, created) "
           "VALUES ('key_1', ?, 'h', 'cy', '', 'user', 1, 0, 5)", (hashed,))  # fmt: skip
    db.migrate()
    key = KeyStore(db, b"x" * 32).authenticate("sk-old")
    assert key.customer == "cy" and key.training_consent and Accounts(db).project("cy", key.project)["standard"]
    db.close()


@pytest.mark.parametrize("scope", WANTS)
def test_a_key_does_what_its_scopes_say_and_nothing_else(service, scope):
    secret = service.key("ann", scopes=(scope,))
    for wanted, (method, path) in WANTS.items():
        answer = call(service, secret, method, path, **({"json": ASK} if method == "POST" else {}))
        assert answer.status_code == (200 if wanted == scope else 403), (wanted, answer.text)
        assert wanted == scope or answer.json()["error"]["type"] == "permission_denied_error"


def test_every_scope_but_admin_is_given_when_nothing_is_said(service):
    assert call(service, service.key("ann"), "GET", "/organization/projects").status_code == 403


def test_a_model_off_the_list_is_a_model_that_is_not_there(service):
    allowed, barred = service.key("ann", models=("tide", "x")), service.key("ann", models=("other",))
    assert service.client(allowed).chat.completions.create(**ASK).choices
    with pytest.raises(openai.NotFoundError) as refused:
        service.client(barred).chat.completions.create(**ASK)
    with pytest.raises(openai.NotFoundError) as unknown:
        service.client(allowed).chat.completions.create(**{**ASK, "model": "nope"})
    assert refused.value.body["message"].replace("tide", "nope") == unknown.value.body["message"]
    assert [m.id for m in service.client(barred).models.list().data] == []
    assert [m.id for m in service.client(allowed).models.list().data] == ["tide"]
    assert call(service, barred, "GET", "/models/tide").status_code == 404
    body = {"model": "tide", "input": "hi"}
    assert call(service, barred, "POST", "/responses", json=body).status_code == 404
    body = {**ASK, "max_tokens": 9}
    assert call(service, barred, "POST", "/messages", json=body, headers={"anthropic-version": "2023-06-01"}).status_code == 404


@pytest.mark.parametrize(
    ("networks", "address", "admitted"),
    [
        ((), "203.0.113.9", True),
        (("127.0.0.1",), "127.0.0.1", True),
        (("10.0.0.0/8", "127.0.0.0/8"), "127.0.0.1", True),
        (("10.0.0.0/8",), "127.0.0.1", False),
        (("10.0.0.0/8",), "::ffff:10.1.2.3", True),
        (("2001:db8::/32",), "2001:db8:1::5", True),
        (("2001:db8::/32",), "10.1.2.3", False),
        (("10.0.0.0/8",), "", False),
        (("10.0.0.0/8",), "testclient", False),
    ],
)
def test_a_key_works_only_from_its_networks(keys, networks, address, admitted):
    assert keys.create("ann", addresses=networks)[0].admits(address) is admitted


def test_a_key_from_elsewhere_is_403(service):
    answer = call(service, service.key("ann", addresses=("10.0.0.0/8",)), "GET", "/models")
    assert answer.status_code == 403 and answer.json()["error"]["type"] == "permission_denied_error"
    assert call(service, service.key("ann", addresses=("127.0.0.1",)), "GET", "/models").status_code == 200


def test_a_proxy_on_this_machine_says_who_its_client_is(service):
    key = service.key("ann", addresses=("10.0.0.0/8",))
    for told, status in (("10.1.2.3", 200), ("10.1.2.3, 127.0.0.1", 200), ("203.0.113.9", 403), ("10.1.2.3, 203.0.113.9", 403)):
        assert call(service, key, "GET", "/models", headers={"x-forwarded-for": told}).status_code == status, told


def test_a_key_s_profile_decides_unless_the_request_does(service):
    lenient, strict = service.key("ann", profile="lenient"), service.key("ann", profile="strict")
    odd = {**ASK, "model": "gpt-9"}
    assert call(service, lenient, "POST", "/chat/completions", json=odd).status_code == 200
    assert call(service, strict, "POST", "/chat/completions", json=odd).status_code == 404
    headers = {"x-tidelock-profile": "strict"}
    assert call(service, lenient, "POST", "/chat/completions", json=odd, headers=headers).status_code == 404
    service.state.lenient = True
    assert call(service, strict, "POST", "/chat/completions", json=odd).status_code == 404
    service.state.lenient = False


# ---- members -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ROLES)
def test_a_member_s_key_never_may_more_than_the_member_and_changes_with_the_role(keys, accounts, role):
    keys.create("ann")
    accounts.add_member("ann", "boss@x.y", "owner", "operator")
    member = accounts.add_member("ann", "m@x.y", role, "operator")
    key, secret = keys.create("ann", member="m@x.y", scopes=SCOPES)
    assert key.scopes == keys.authenticate(secret).scopes == tuple(s for s in SCOPES if s in ROLES[role])
    accounts.set_role("ann", member["id"], "viewer", "operator")
    assert keys.live(key.id).scopes == ROLES["viewer"]


def test_keys_end_with_their_member_and_their_project_within_a_second(keys, accounts):
    accounts.ensure("ann")
    member = accounts.add_member("ann", "m@x.y", "developer", "operator")
    project = accounts.create_project("ann", "side", "operator")
    secrets = [keys.create("ann", member=member["id"])[1], keys.create("ann", project=project["id"])[1]]
    assert all(keys.authenticate(secret) for secret in secrets)
    accounts.remove_member("ann", member["id"], "operator")
    accounts.archive_project("ann", project["id"], "operator")
    deadline = time.monotonic() + 1.0
    while any(keys.authenticate(secret) for secret in secrets):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    with pytest.raises(UnknownId):
        keys.create("ann", project=project["id"])
    with pytest.raises(UnknownId):
        keys.create("ann", member=member["id"])


def test_an_organisation_keeps_an_owner_and_its_default_project(accounts):
    standard = accounts.ensure("ann")
    owner = accounts.add_member("ann", "a@x.y", "owner", "operator")
    for refused in (
        lambda: accounts.set_role("ann", owner["id"], "viewer", "operator"),
        lambda: accounts.remove_member("ann", owner["id"], "operator"),
        lambda: accounts.archive_project("ann", standard, "operator"),
        lambda: accounts.add_member("ann", "a@x.y", "viewer", "operator"),
        lambda: accounts.add_member("ann", "b@x.y", "god", "operator"),
        lambda: accounts.add_member("ann", "nobody", "viewer", "operator"),
        lambda: accounts.ensure("a/b"),
    ):
        with pytest.raises(UserError):
            refused()
    second = accounts.add_member("ann", "b@x.y", "owner", "operator")
    accounts.remove_member("ann", owner["id"], "operator")
    assert [m["id"] for m in accounts.members("ann")] == [second["id"]]


def test_ids_of_another_organisation_are_unknown(accounts, keys):
    accounts.ensure("ann"), accounts.ensure("bob")
    member, project = accounts.add_member("ann", "a@x.y", "owner", "o"), accounts.create_project("ann", "p", "o")
    key, _ = keys.create("ann")
    for stranger in (
        lambda: accounts.project("bob", project["id"]),
        lambda: accounts.rename_project("bob", project["id"], "x", "o"),
        lambda: accounts.archive_project("bob", project["id"], "o"),
        lambda: accounts.member("bob", member["id"]),
        lambda: accounts.set_role("bob", member["id"], "viewer", "o"),
        lambda: accounts.remove_member("bob", member["id"], "o"),
        lambda: keys.create("bob", project=project["id"]),
        lambda: keys.create("bob", member=member["id"]),
        lambda: keys.revoke(key.id, "bob"),
    ):
        with pytest.raises(UnknownId):
            stranger()


# ---- the admin API -----------------------------------------------------------------------------------------------


def test_a_key_made_over_the_api_is_shown_once_and_works(service):
    boss = service.key("ann", scopes=SCOPES)
    project = call(service, boss, "POST", "/organization/projects", json={"name": "app"}).json()
    path = f"/organization/projects/{project['id']}/api_keys"
    made = call(service, boss, "POST", path, json={"name": "ci", "scopes": ["model"], "training_consent": True}).json()
    assert service.client(made["value"]).chat.completions.create(**ASK).choices
    for answer in (call(service, boss, "GET", path), call(service, boss, "GET", f"{path}/{made['id']}"),
                   call(service, boss, "GET", "/organization/audit_logs?limit=100")):  # fmt: skip
        assert answer.status_code == 200 and made["id"] in answer.text and made["value"] not in answer.text
    assert call(service, boss, "DELETE", f"{path}/{made['id']}").json()["deleted"] is True
    assert call(service, made["value"], "GET", "/models").status_code == 401
    assert call(service, boss, "DELETE", f"{path}/{made['id']}").status_code == 404


def test_nobody_gives_or_takes_what_they_do_not_have(service):
    service.key("ann")
    accounts = service.state.accounts
    owner = accounts.add_member("ann", "o@x.y", "owner", "operator")
    accounts.add_member("ann", "a@x.y", "admin", "operator")
    admin = service.state.keys.create("ann", member="a@x.y", scopes=SCOPES)[1]
    path = f"/organization/projects/{accounts.ensure('ann')}/api_keys"
    refused = [
        ("POST", "/organization/users", {"email": "n@x.y", "role": "owner"}),
        ("POST", f"/organization/users/{owner['id']}", {"role": "viewer"}),
        ("DELETE", f"/organization/users/{owner['id']}", None),
        ("POST", path, {"scopes": ["billing"]}),
        ("DELETE", f"{path}/{service.state.keys.list('ann')[0].id}", None),
    ]
    for method, where, body in refused:
        assert call(service, admin, method, where, **({"json": body} if body else {})).status_code == 403, (method, where)
    assert call(service, admin, "POST", "/organization/users", json={"email": "n@x.y", "role": "developer"}).status_code == 200
    held = service.key("ann", scopes=SCOPES, models=("tide",), addresses=("127.0.0.0/8",))
    assert call(service, held, "POST", path, json={"models": ["other"]}).status_code == 403
    assert call(service, held, "POST", path, json={"addresses": ["0.0.0.0/0"]}).status_code == 403
    inherits = call(service, held, "POST", path, json={}).json()
    assert (inherits["models"], inherits["addresses"]) == (["tide"], ["127.0.0.0/8"])


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/organization/projects", {"name": ""}),
        ("POST", "/organization/projects", {}),
        ("POST", "/organization/users", {"email": "x", "role": "viewer"}),
        ("POST", "/organization/users", {"email": "x@y.z", "role": "king"}),
        ("POST", "/organization/projects/{p}/api_keys", {"addresses": ["somewhere"]}),
        ("POST", "/organization/projects/{p}/api_keys", {"scopes": []}),
        ("POST", "/organization/projects/{p}/archive", None),
    ],
)
def test_what_makes_no_sense_is_400(service, method, path, body):
    boss = service.key("ann", scopes=SCOPES)
    path = path.replace("{p}", service.state.accounts.ensure("ann"))
    assert call(service, boss, method, path, **({} if body is None else {"json": body})).status_code == 400


def test_the_official_admin_client_reads_projects_users_and_keys(service):
    boss = service.key("ann", scopes=SCOPES)
    service.state.accounts.add_member("ann", "o@x.y", "owner", "operator")
    admin = openai.OpenAI(base_url=service.running.base_url, api_key="x", admin_api_key=boss).admin.organization
    project = admin.projects.create(name="app")
    assert project.id in [p.id for p in admin.projects.list()]
    assert [u.email for u in admin.users.list()] == ["o@x.y"]
    default = next(p.id for p in admin.projects.list() if p.name == "default")
    assert [k.redacted_value for k in admin.projects.api_keys.list(default)] == [service.state.keys.list("ann")[0].hint]
    assert "project.created" in [e.type for e in admin.audit_logs.list()]


def test_usage_and_costs_are_told_apart_by_project(service):
    main = service.key("ann")
    project = service.state.accounts.create_project("ann", "side", "operator")["id"]
    side = service.key("ann", project=project)
    for secret in (main, side, side):
        service.client(secret).chat.completions.create(**ASK)
    for path in ("usage/completions", "costs"):
        query = f"/organization/{path}?start_time={int(time.time()) - 60}"
        grouped = call(service, main, "GET", f"{query}&group_by=project_id").json()["data"]
        assert {r["project_id"] for b in grouped for r in b["results"]} == {project, service.state.accounts.ensure("ann")}
        only = [r for b in call(service, main, "GET", f"{query}&project_ids={project}").json()["data"] for r in b["results"]]
        assert len(only) == 1 and only[0].get("num_model_requests", 2) == 2


# ---- the audit log and the guessing of keys ----------------------------------------------------------------------


def test_every_act_is_on_record_with_who_did_it_and_none_can_be_undone(db, keys, accounts):
    key, _ = keys.create("ann", actor="key_boss")
    project = accounts.create_project("ann", "p", "key_boss")
    accounts.rename_project("ann", project["id"], "q", "key_boss")
    accounts.archive_project("ann", project["id"], "key_boss")
    one = accounts.add_member("ann", "a@x.y", "owner", "key_boss")
    two = accounts.add_member("ann", "b@x.y", "owner", "key_boss")
    accounts.set_role("ann", two["id"], "viewer", "key_boss")
    accounts.remove_member("ann", two["id"], "key_boss")
    keys.revoke(key.id, "ann", "key_boss")
    entries, more = accounts.audit_log("ann", limit=100)
    actions = [e["action"] for e in reversed(entries)]
    assert actions == ["organization.created", "key.created", "project.created", "project.updated", "project.archived",
                       "member.added", "member.added", "member.role", "member.removed", "key.revoked"]  # fmt: skip
    assert {e["actor"] for e in entries} == {"key_boss"} and not more and one["id"] in {e["target"] for e in entries}
    first, more = accounts.audit_log("ann", limit=4)
    rest, _ = accounts.audit_log("ann", after=first[-1]["id"], limit=100)
    assert more and first + rest == entries and accounts.audit_log("bob") == ([], False)
    for sql in ("UPDATE audit_log SET actor = 'nobody'", "DELETE FROM audit_log"):
        with pytest.raises(Conflict), db.transaction() as tx:
            tx(sql)


def test_what_was_refused_leaves_no_record(accounts):
    accounts.ensure("ann")
    before = accounts.audit_log("ann")
    with pytest.raises(UnknownId):
        accounts.rename_project("ann", "proj_none", "x", "operator")
    assert accounts.audit_log("ann") == before


def test_an_address_that_guesses_keys_must_wait_and_then_may_again():
    now = [100.0]
    guesses = Guesses(burst=3, per_s=0.5, most=5, clock=lambda: now[0])
    for _ in range(3):
        assert guesses.wait_s("10.0.0.1") == 0
        guesses.wrong("10.0.0.1")
    assert guesses.wait_s("10.0.0.1") == 2 and guesses.wait_s("10.0.0.2") == 0
    now[0] += 2
    assert guesses.wait_s("10.0.0.1") == 0
    guesses.wrong("10.0.0.1")
    assert guesses.wait_s("10.0.0.1") == 2
    for host in range(100):
        guesses.wrong(f"10.1.0.{host}")
    assert len(guesses) == 5
    for n in range(3):
        guesses.wrong(f"2001:db8::{n}")
    assert guesses.wait_s("2001:db8::ffff") > 0 and guesses.wait_s("2001:db8:0:1::") == 0


def test_guessing_is_429_on_the_wire_and_a_missing_key_is_no_guess(service):
    right = service.key("ann")
    service.state.guesses = Guesses(clock=lambda: 0.0)  # nothing is forgiven meanwhile, however slow the machine
    for _ in range(40):
        assert httpx.get(service.running.base_url + "/models").status_code == 401
    answers = [call(service, f"sk-{n}", "GET", "/models") for n in range(32)]
    assert [a.status_code for a in answers[:30]] == [401] * 30 and answers[-1].status_code == 429
    assert int(answers[-1].headers["retry-after"]) >= 1 and answers[-1].headers["x-should-retry"] == "false"
    assert call(service, right, "GET", "/models").status_code == 429
