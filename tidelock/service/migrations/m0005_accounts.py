"""Organisations with projects, members and keys that say what they may do; a log of who did what.

Every customer of before becomes an organisation of the same name with one default project that has all its keys.
"""

from __future__ import annotations

import secrets
from typing import Any

from tidelock.service.migrations import script

SCHEMA = """
CREATE TABLE organizations (
    id TEXT PRIMARY KEY,  -- the ledger's customer: the organisation is what pays
    name TEXT NOT NULL,
    created DOUBLE PRECISION NOT NULL
);
CREATE TABLE projects (
    id TEXT PRIMARY KEY,
    organization TEXT NOT NULL REFERENCES organizations (id),
    name TEXT NOT NULL,
    standard BIGINT NOT NULL CHECK (standard IN (0, 1)),  -- 1: where a key goes that names no project
    created DOUBLE PRECISION NOT NULL,
    archived DOUBLE PRECISION
);
CREATE UNIQUE INDEX standard_project ON projects (organization) WHERE standard = 1;
CREATE TABLE members (
    id TEXT PRIMARY KEY,
    organization TEXT NOT NULL REFERENCES organizations (id),
    email TEXT NOT NULL,
    role TEXT NOT NULL CHECK (role IN ('owner', 'admin', 'developer', 'billing', 'viewer')),
    created DOUBLE PRECISION NOT NULL,
    removed DOUBLE PRECISION
);
CREATE UNIQUE INDEX member_once ON members (organization, email) WHERE removed IS NULL;
CREATE TABLE audit_log (
    id TEXT PRIMARY KEY,         -- sorts by time
    organization TEXT NOT NULL,  -- '' for what concerns the whole service
    actor TEXT NOT NULL,         -- a key's id, or the operator at a terminal
    action TEXT NOT NULL,
    target TEXT NOT NULL,
    detail TEXT NOT NULL,        -- JSON
    created DOUBLE PRECISION NOT NULL
);
CREATE INDEX audit_log_of_organization ON audit_log (organization, id);
ALTER TABLE keys ADD COLUMN project TEXT NOT NULL DEFAULT '';
ALTER TABLE keys ADD COLUMN member TEXT NOT NULL DEFAULT '';
ALTER TABLE keys ADD COLUMN scopes TEXT NOT NULL DEFAULT 'model files usage billing';
ALTER TABLE keys ADD COLUMN models TEXT NOT NULL DEFAULT '';
ALTER TABLE keys ADD COLUMN addresses TEXT NOT NULL DEFAULT '';
ALTER TABLE keys ADD COLUMN profile TEXT NOT NULL DEFAULT '';
CREATE INDEX keys_of_project ON keys (project);
"""


def up(tx: Any, backend: Any) -> None:
    script(tx, SCHEMA)
    for statement in backend.append_only("audit_log"):
        tx(statement)
    for (customer,) in tx("SELECT customer FROM customers UNION SELECT customer FROM keys ORDER BY 1").fetchall():
        project = f"proj_{secrets.token_hex(8)}"
        tx("INSERT INTO organizations VALUES (?, ?, 0)", (customer, customer))
        tx("INSERT INTO projects VALUES (?, ?, 'default', 1, 0, NULL)", (project, customer))
        tx("UPDATE keys SET project = ? WHERE customer = ?", (project, customer))
