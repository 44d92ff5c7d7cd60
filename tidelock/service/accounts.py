"""Who is a customer: an organisation has projects and members, a project has keys (`keys`), and every change is logged.

The organisation is what the ledger calls the customer; its id is the name it was given. Ids that belong to another
organisation read as ids that do not exist. Whatever changes an account writes who did it, in the same transaction.
"""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Callable
from typing import Any

from tidelock.service.db import Conflict, Database, Transaction
from tidelock.service.ledger import Ledger
from tidelock.tokens.errors import UserError

SCOPES = ("model", "files", "usage", "billing", "admin")  # ask the model; files and batches; read usage; bills; accounts
USUAL_SCOPES = SCOPES[:-1]
ROLES = {
    "owner": SCOPES,
    "admin": ("model", "files", "usage", "admin"),
    "developer": ("model", "files", "usage"),
    "billing": ("usage", "billing"),
    "viewer": ("usage",),
}
NAME = re.compile(r"[^\s/\x00-\x1f\x7f][^/\x00-\x1f\x7f]{0,127}")
EMAIL = re.compile(r"[^@\s\x00-\x1f\x7f]{1,64}@[^@\s\x00-\x1f\x7f]{1,190}")
OPERATOR = "operator"


class UnknownId(UserError):
    """There is no such thing in this organisation."""


class Accounts:
    def __init__(self, db: Database, clock: Callable[[], float] = time.time) -> None:
        self._db, self._clock = db, clock

    # ---- organisations and projects ----------------------------------------------------------------------------

    def ensure(self, organization: str, actor: str = OPERATOR) -> str:
        """Makes the organisation, its books and its default project if they are not there; returns the project's id."""
        sql = "SELECT id FROM projects WHERE organization = ? AND standard = 1"
        found = self._db.read(sql, (organization,))
        if found:
            return found[0][0]
        if not NAME.fullmatch(organization):
            raise UserError(f"{organization!r} is no name for an organisation: 1 to 128 characters on one line, without /")
        Ledger(self._db).open_account(organization)
        now, project = self._clock(), _id("proj")
        try:
            with self._db.transaction() as tx:
                tx("INSERT INTO organizations (id, name, created) VALUES (?, ?, ?) ON CONFLICT (id) DO NOTHING",
                   (organization, organization, now))  # fmt: skip
                _insert_project(tx, project, organization, "default", 1, now)
                log(tx, organization, actor, "organization.created", organization, now=now)
        except Conflict:  # somebody else did so at the same moment
            return self._db.read(sql, (organization,))[0][0]
        return project

    def rename(self, organization: str, name: str, actor: str) -> None:
        """What it is called on invoices and in lists; its id stays."""
        self._check_name(name)
        self._change(
            "UPDATE organizations SET name = ? WHERE id = ?", (name, organization), f"organization {organization!r}",
            organization, actor, "organization.renamed", organization, {"name": name},
        )  # fmt: skip

    def set_tax(self, organization: str, bps: int, tax_id: str, actor: str) -> None:
        """The rate (hundredths of a percent) and tax number that its invoices bear from now on."""
        if not 0 <= bps <= 10_000:
            raise UserError("a tax rate lies between 0 and 100 percent")
        self._change(
            "UPDATE organizations SET tax_bps = ?, tax_id = ? WHERE id = ?", (bps, tax_id, organization),
            f"organization {organization!r}", organization, actor, "organization.tax", organization, {"bps": bps, "tax_id": tax_id},
        )  # fmt: skip

    def organizations(self) -> list[dict[str, Any]]:
        return _dicts(self._db.read("SELECT * FROM organizations ORDER BY id"))

    def create_project(self, organization: str, name: str, actor: str) -> dict[str, Any]:
        self._check_name(name)
        now, project = self._clock(), _id("proj")
        with self._db.transaction() as tx:
            _known(tx, organization)
            _insert_project(tx, project, organization, name, 0, now)
            log(tx, organization, actor, "project.created", project, {"name": name}, now)
        return self.project(organization, project)

    def rename_project(self, organization: str, project: str, name: str, actor: str) -> dict[str, Any]:
        self._check_name(name)
        self._change(
            "UPDATE projects SET name = ? WHERE id = ? AND organization = ?", (name, project, organization),
            f"project {project!r}", organization, actor, "project.updated", project, {"name": name},
        )  # fmt: skip
        return self.project(organization, project)

    def archive_project(self, organization: str, project: str, actor: str) -> dict[str, Any]:
        """Its keys end with it. The default project stays."""
        if self.project(organization, project)["standard"]:
            raise UserError("the default project cannot be archived")
        self._change(
            "UPDATE projects SET archived = ? WHERE id = ? AND organization = ? AND archived IS NULL",
            (self._clock(), project, organization), f"live project {project!r}", organization, actor, "project.archived", project,
        )  # fmt: skip
        return self.project(organization, project)

    def projects(self, organization: str) -> list[dict[str, Any]]:
        return _dicts(self._db.read("SELECT * FROM projects WHERE organization = ? ORDER BY created, id", (organization,)))

    def project(self, organization: str, project: str) -> dict[str, Any]:
        """Raises UnknownId."""
        rows = self._db.read("SELECT * FROM projects WHERE organization = ? AND id = ?", (organization, project))
        return _one(rows, f"project {project!r}")

    # ---- members -----------------------------------------------------------------------------------------------

    def add_member(self, organization: str, email: str, role: str, actor: str) -> dict[str, Any]:
        _check_role(role)
        if not EMAIL.fullmatch(email):
            raise UserError(f"{email!r} is no e-mail address")
        now, member = self._clock(), _id("user")
        try:
            with self._db.transaction() as tx:
                _known(tx, organization)
                tx("INSERT INTO members (id, organization, email, role, created) VALUES (?, ?, ?, ?, ?)",
                   (member, organization, email, role, now))  # fmt: skip
                log(tx, organization, actor, "member.added", member, {"email": email, "role": role}, now)
        except Conflict:
            raise UserError(f"{email} is a member already") from None
        return self.member(organization, member)

    def set_role(self, organization: str, member: str, role: str, actor: str) -> dict[str, Any]:
        """Counts for the member's keys, too. Raises UserError if nobody would be left who owns the organisation."""
        _check_role(role)
        with self._db.transaction() as tx:
            _keep_an_owner(tx, organization, member, role)
            sql = "UPDATE members SET role = ? WHERE id = ? AND organization = ? AND removed IS NULL"
            _expect(tx(sql, (role, member, organization)), f"member {member!r}")
            log(tx, organization, actor, "member.role", member, {"role": role}, self._clock())
        return self.member(organization, member)

    def remove_member(self, organization: str, member: str, actor: str) -> None:
        """Their keys end with them. Raises UserError for the last owner."""
        now = self._clock()
        with self._db.transaction() as tx:
            _keep_an_owner(tx, organization, member, "")
            sql = "UPDATE members SET removed = ? WHERE id = ? AND organization = ? AND removed IS NULL"
            _expect(tx(sql, (now, member, organization)), f"member {member!r}")
            log(tx, organization, actor, "member.removed", member, now=now)

    def members(self, organization: str) -> list[dict[str, Any]]:
        sql = "SELECT * FROM members WHERE organization = ? AND removed IS NULL ORDER BY created, id"
        return _dicts(self._db.read(sql, (organization,)))

    def member(self, organization: str, member: str) -> dict[str, Any]:
        """Raises UnknownId."""
        sql = "SELECT * FROM members WHERE organization = ? AND (id = ? OR email = ?) AND removed IS NULL"
        return _one(self._db.read(sql, (organization, member, member)), f"member {member!r}")

    # ---- what was done -----------------------------------------------------------------------------------------

    def audit_log(self, organization: str, *, after: str | None = None, limit: int = 20) -> tuple[list[dict[str, Any]], bool]:
        """(entries, newest first, from behind `after` on; whether there are more)."""
        where, args = "organization = ?", [organization]
        if after is not None:
            where, args = f"{where} AND id < ?", [*args, after]
        rows = self._db.read(f"SELECT * FROM audit_log WHERE {where} ORDER BY id DESC LIMIT {int(limit) + 1}", args)
        return [{**row, "detail": json.loads(row["detail"])} for row in _dicts(rows)[:limit]], len(rows) > limit

    def _change(
        self, sql: str, args: tuple, what: str, organization: str, actor: str, action: str, target: str,
        detail: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        with self._db.transaction() as tx:
            _expect(tx(sql, args), what)
            log(tx, organization, actor, action, target, detail, self._clock())

    @staticmethod
    def _check_name(name: str) -> None:
        if not NAME.fullmatch(name):
            raise UserError(f"{name!r} is no name: 1 to 128 characters on one line, without /")


def log(
    tx: Transaction, organization: str, actor: str, action: str, target: str, detail: dict[str, Any] | None = None,
    now: float | None = None,
) -> None:  # fmt: skip
    """Writes a line of the audit log, with whatever else `tx` does. Never a secret."""
    now = time.time() if now is None else now
    entry = f"audit_{int(now * 1e6):016d}{secrets.token_hex(4)}"
    row = (entry, organization, actor, action, target, json.dumps(detail or {}, sort_keys=True), float(now))
    tx("INSERT INTO audit_log (id, organization, actor, action, target, detail, created) VALUES (?, ?, ?, ?, ?, ?, ?)", row)


def _insert_project(tx: Transaction, project: str, organization: str, name: str, standard: int, now: float) -> None:
    sql = "INSERT INTO projects (id, organization, name, standard, created) VALUES (?, ?, ?, ?, ?)"
    tx(sql, (project, organization, name, standard, now))


def _keep_an_owner(tx: Transaction, organization: str, member: str, role: str) -> None:
    sql = f"SELECT id FROM members WHERE organization = ? AND role = 'owner' AND removed IS NULL{tx.for_update}"
    owners = [row[0] for row in tx(sql, (organization,)).fetchall()]
    if owners == [member] and role != "owner":
        raise UserError("this is the organisation's last owner; make somebody else an owner first")


def _known(tx: Transaction, organization: str) -> None:
    if tx("SELECT 1 FROM organizations WHERE id = ?", (organization,)).fetchone() is None:
        raise UnknownId(f"no organization {organization!r}")


def _expect(result: Any, what: str) -> None:
    if result.rowcount != 1:
        raise UnknownId(f"no {what}")


def _check_role(role: str) -> None:
    if role not in ROLES:
        raise UserError(f"unknown role {role!r}; a member is {', '.join(ROLES)}")


def _one(rows: list[Any], what: str) -> dict[str, Any]:
    if not rows:
        raise UnknownId(f"no {what}")
    return _dicts(rows)[0]


def _dicts(rows: list[Any]) -> list[dict[str, Any]]:
    return [{name: row[name] for name in row.keys()} for row in rows]


def _id(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(8)}"
