"""An organisation looks after itself: projects, members, keys and the log of who did what, in OpenAI's admin shapes.

All of it needs a key with the scope `admin`, and nobody gives or takes what they do not have themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from starlette.requests import Request

from tidelock.service import wire
from tidelock.service.accounts import ROLES, USUAL_SCOPES, UnknownId
from tidelock.service.auth import authenticate
from tidelock.service.errors import invalid_request, permission_denied
from tidelock.service.http import read_body
from tidelock.service.keys import Key
from tidelock.service.state import ServiceState
from tidelock.service.surfaces import files
from tidelock.tokens.errors import UserError


class ProjectRequest(msgspec.Struct):
    """The body of `POST /v1/organization/projects`."""

    name: str


class ProjectChange(msgspec.Struct):
    """The body of `POST /v1/organization/projects/{id}`; what it does not say stays."""

    name: str | None = None


class MemberRequest(msgspec.Struct):
    """The body of `POST /v1/organization/users`."""

    email: str
    role: str


class RoleRequest(msgspec.Struct):
    """The body of `POST /v1/organization/users/{id}`; what it does not say stays."""

    role: str | None = None


class KeyRequest(msgspec.Struct):
    """The body of `POST /v1/organization/projects/{id}/api_keys`."""

    name: str = ""
    member: str = ""
    scopes: list[str] = msgspec.field(default_factory=lambda: list(USUAL_SCOPES))
    models: list[str] = []
    addresses: list[str] = []
    profile: str = ""
    training_consent: bool = False
    may_grant: bool = False


# Our words for what was done, in OpenAI's; what theirs have no word for is a change to the organisation.
AUDITED = {
    "key.created": "api_key.created", "key.revoked": "api_key.deleted", "project.created": "project.created",
    "project.updated": "project.updated", "project.archived": "project.archived", "member.added": "user.added",
    "member.role": "user.updated", "member.removed": "user.deleted", "limits.set": "rate_limit.updated",
}  # fmt: skip

_project, _change, _member, _role, _key = (
    msgspec.json.Decoder(struct) for struct in (ProjectRequest, ProjectChange, MemberRequest, RoleRequest, KeyRequest)
)


async def profile(state: ServiceState, request: Request) -> dict[str, Any]:
    """`GET /v1/organization`: who asks, and what the key may do. For every key."""
    key = authenticate(state, request, "")
    rows = state.ledger.db.read("SELECT name, created, tax_id FROM organizations WHERE id = ?", (key.customer,))
    name, created, tax_id = rows[0] if rows else (key.customer, 0, "")
    return {"object": "organization", "id": key.customer, "name": name, "created_at": int(created), "tax_id": tax_id or None,
            "api_key": shown_key(key), "operator": key.role == "admin"}  # fmt: skip


async def projects(state: ServiceState, request: Request) -> dict[str, Any]:
    key = authenticate(state, request, "admin")
    everything = request.query_params.get("include_archived") == "true"
    found = [p for p in state.accounts.projects(key.customer) if everything or not p["archived"]]
    return _listing([_shown_project(p) for p in found])


async def create_project(state: ServiceState, request: Request) -> dict[str, Any]:
    key, body = await _asked(state, request, _project)
    with bad_request():
        return _shown_project(state.accounts.create_project(key.customer, body.name, key.id))


async def project(state: ServiceState, request: Request) -> dict[str, Any]:
    key = authenticate(state, request, "admin")
    return _shown_project(state.accounts.project(key.customer, request.path_params["id"]))


async def update_project(state: ServiceState, request: Request) -> dict[str, Any]:
    key, body = await _asked(state, request, _change)
    found = state.accounts.project(key.customer, request.path_params["id"])
    with bad_request():
        if body.name is not None:
            found = state.accounts.rename_project(key.customer, found["id"], body.name, key.id)
    return _shown_project(found)


async def archive_project(state: ServiceState, request: Request) -> dict[str, Any]:
    key = authenticate(state, request, "admin")
    with bad_request():
        return _shown_project(state.accounts.archive_project(key.customer, request.path_params["id"], key.id))


async def keys(state: ServiceState, request: Request) -> dict[str, Any]:
    key = authenticate(state, request, "admin")
    found = state.accounts.project(key.customer, request.path_params["id"])
    return _listing([shown_key(k) for k in state.keys.list(key.customer, found["id"]) if k.revoked is None])


async def create_key(state: ServiceState, request: Request) -> dict[str, Any]:
    """The answer is the only one that ever has the secret in it, as `value`."""
    key, body = await _asked(state, request, _key)
    found = state.accounts.project(key.customer, request.path_params["id"])
    _may_give(key, body.scopes)
    for own, given, what in ((key.models, body.models, "models"), (key.addresses, body.addresses, "addresses")):
        if own and not set(given) <= set(own):
            raise permission_denied(f"a key that is held to some {what} cannot make one that is not")
    with bad_request():
        made, secret = state.keys.create(
            key.customer, body.name, project=found["id"], member=body.member, scopes=body.scopes,
            models=body.models or key.models, addresses=body.addresses or key.addresses, profile=body.profile,
            training_consent=body.training_consent, may_grant=body.may_grant, actor=key.id,
        )  # fmt: skip
    return {**shown_key(made), "value": secret}


async def key(state: ServiceState, request: Request) -> dict[str, Any]:
    return shown_key(_found_key(state, authenticate(state, request, "admin"), request))


async def delete_key(state: ServiceState, request: Request) -> dict[str, Any]:
    key = authenticate(state, request, "admin")
    found = _found_key(state, key, request)
    _may_give(key, found.scopes)
    state.keys.revoke(found.id, key.customer, key.id)
    return {"object": "organization.project.api_key.deleted", "id": found.id, "deleted": True}


async def members(state: ServiceState, request: Request) -> dict[str, Any]:
    key = authenticate(state, request, "admin")
    return _listing([_shown_member(m) for m in state.accounts.members(key.customer)])


async def add_member(state: ServiceState, request: Request) -> dict[str, Any]:
    key, body = await _asked(state, request, _member)
    _may_give(key, ROLES.get(body.role, ()))
    with bad_request():
        return _shown_member(state.accounts.add_member(key.customer, body.email, body.role, key.id))


async def member(state: ServiceState, request: Request) -> dict[str, Any]:
    key = authenticate(state, request, "admin")
    return _shown_member(state.accounts.member(key.customer, request.path_params["id"]))


async def update_member(state: ServiceState, request: Request) -> dict[str, Any]:
    key, body = await _asked(state, request, _role)
    found = state.accounts.member(key.customer, request.path_params["id"])
    if body.role is None:
        return _shown_member(found)
    _may_give(key, (*ROLES[found["role"]], *ROLES.get(body.role, ())))
    with bad_request():
        return _shown_member(state.accounts.set_role(key.customer, found["id"], body.role, key.id))


async def remove_member(state: ServiceState, request: Request) -> dict[str, Any]:
    key = authenticate(state, request, "admin")
    found = state.accounts.member(key.customer, request.path_params["id"])
    _may_give(key, ROLES[found["role"]])
    with bad_request():
        state.accounts.remove_member(key.customer, found["id"], key.id)
    return {"object": "organization.user.deleted", "id": found["id"], "deleted": True}


async def audit_logs(state: ServiceState, request: Request) -> dict[str, Any]:
    """Newest first."""
    key = authenticate(state, request, "admin")
    after, limit, _ = files.paging(request)
    entries, more = state.accounts.audit_log(key.customer, after=after, limit=limit)
    return files.listing([_openai_entry(e) for e in entries], more)


def _openai_entry(e: dict[str, Any]) -> dict[str, Any]:
    """In the words of OpenAI's clients; `action` is ours."""
    shown = shown_entry(e)
    kind, who = shown["actor"]["type"], shown["actor"]["id"]
    more = {"id": who} if kind == "api_key" else {"user": {"id": who}}
    return {**shown, "type": AUDITED.get(e["action"], "organization.updated"), "action": e["action"],
            "actor": {**shown["actor"], kind: more}}  # fmt: skip


async def _asked(state: ServiceState, request: Request, decoder: msgspec.json.Decoder) -> tuple[Key, Any]:
    key = authenticate(state, request, "admin")
    return key, wire.decode(await read_body(request, state.max_body_bytes), decoder)


def _may_give(key: Key, scopes: Sequence[str]) -> None:
    """Raises ApiError (403)."""
    lacking = sorted(set(scopes) - set(key.scopes))
    if lacking:
        raise permission_denied(f"this key cannot give or take what it does not have: {', '.join(lacking)}")


def _found_key(state: ServiceState, key: Key, request: Request) -> Key:
    """Raises UnknownId, for the project and for the key alike."""
    project = state.accounts.project(key.customer, request.path_params["id"])
    wanted = request.path_params["key"]
    for found in state.keys.list(key.customer, project["id"]):
        if found.id == wanted and found.revoked is None:
            return found
    raise UnknownId(f"no live key {wanted!r}")


class bad_request:
    """What the accounts refuse is the client's to mend (400); what is not there stays a 404."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, UserError) and not isinstance(error, UnknownId):
            raise invalid_request(str(error)) from error


def _listing(docs: list[dict[str, Any]]) -> dict[str, Any]:
    return files.listing(docs, False)


def _shown_project(p: dict[str, Any]) -> dict[str, Any]:
    return {
        "object": "organization.project", "id": p["id"], "name": p["name"], "created_at": int(p["created"]),
        "archived_at": int(p["archived"]) if p["archived"] else None, "status": "archived" if p["archived"] else "active",
    }  # fmt: skip


def _shown_member(m: dict[str, Any]) -> dict[str, Any]:
    return {"object": "organization.user", "id": m["id"], "email": m["email"], "role": m["role"],
            "name": m["email"].partition("@")[0], "added_at": int(m["created"])}  # fmt: skip


def shown_entry(e: dict[str, Any]) -> dict[str, Any]:
    """Of the audit log."""
    return {
        "object": "organization.audit_log", "id": e["id"], "type": e["action"], "effective_at": int(e["created"]),
        "actor": {"type": "api_key" if e["actor"].startswith("key_") else "session", "id": e["actor"]},
        "target": e["target"], "detail": e["detail"],
    }  # fmt: skip


def shown_key(k: Key) -> dict[str, Any]:
    kind = "user" if k.member else "service_account"
    holder = {"id": k.member or k.id, "name": k.name, "role": "member", "created_at": int(k.created)}
    owner = {"type": kind, kind: {**holder, **({"email": ""} if k.member else {})}}
    return {
        "object": "organization.project.api_key", "id": k.id, "redacted_value": k.hint, "name": k.name, "project_id": k.project,
        "owner": owner, "owner_project_access": "active", "created_at": int(k.created), "scopes": list(k.scopes),
        "models": list(k.models),
        "addresses": list(k.addresses), "profile": k.profile, "training_consent": k.training_consent, "may_grant": k.may_grant,
        "last_used_at": None if k.last_used is None else int(k.last_used),
    }  # fmt: skip
