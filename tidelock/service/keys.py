"""API keys: created once, shown once, stored only as an HMAC-SHA-256 under a pepper kept outside the database.

A key belongs to a customer (whose wallet pays), has a role, and says what may be done with the traffic it carries.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import time
from dataclasses import dataclass
from pathlib import Path

from tidelock.service.db import Database
from tidelock.service.ledger import Ledger
from tidelock.tokens.errors import UserError


REMEMBER_S = 0.5  # how long an answer of the database may be believed: requests of one key come in bursts
MOST_REMEMBERED = 10_000


@dataclass(frozen=True)
class Key:
    id: str
    hint: str  # first and last characters, enough to recognise it in a list
    customer: str
    name: str
    role: str  # "user" | "admin"
    training_consent: bool  # what holds when a request says nothing
    may_grant: bool  # whether a request may consent although the key's default is no
    created: float
    revoked: float | None

    def consent(self, requested: bool | None) -> tuple[bool, str]:
        """The consent of one request and where it comes from. A request can always withdraw; it can only grant
        what the key allows."""
        if requested is None:
            return self.training_consent, "key"
        if requested and not (self.training_consent or self.may_grant):
            return False, "key"
        return requested, "request"


class KeyStore:
    def __init__(self, db: Database, pepper: bytes) -> None:
        self._db = db
        self._pepper = pepper
        self._known: dict[str, tuple[Key, float]] = {}  # by hash: live keys lately seen, and until when they count

    @classmethod
    def open(cls, db: Database, pepper_path: str | Path) -> KeyStore:
        """Reads the pepper file, creating it (mode 0600) on first use. Raises UserError if it cannot."""
        path = Path(pepper_path)
        try:
            try:
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            except FileExistsError:
                pepper = path.read_bytes()
            else:
                pepper = secrets.token_hex(32).encode()
                with os.fdopen(descriptor, "wb") as file:
                    file.write(pepper)
                    file.flush()
                    os.fsync(descriptor)
        except OSError as error:
            raise UserError(f"cannot use the key pepper file {path}: {error.strerror}") from error
        if len(pepper) < 32:
            raise UserError(f"the key pepper file {path} is damaged; restore it, or delete it and issue new keys")
        return cls(db, pepper)

    def create(
        self,
        customer: str,
        name: str = "",
        *,
        role: str = "user",
        training_consent: bool = False,
        may_grant: bool = False,
    ) -> tuple[Key, str]:
        """Returns the key's record and the secret itself, which is not stored and cannot be shown again."""
        if not customer:
            raise UserError("a key needs a customer")
        if role not in ("user", "admin"):
            raise UserError(f"unknown role {role!r}; a key's role is user or admin")
        secret = f"sk-{secrets.token_urlsafe(32)}"
        key = Key(
            id=f"key_{secrets.token_hex(8)}",
            hint=f"{secret[:6]}…{secret[-4:]}",
            customer=customer,
            name=name,
            role=role,
            training_consent=training_consent,
            may_grant=may_grant,
            created=time.time(),
            revoked=None,
        )
        Ledger(self._db).open_account(customer)
        with self._db.transaction() as write:
            write(
                "INSERT INTO keys VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, NULL)",
                (key.id, self._hash(secret), key.hint, customer, name, role, int(training_consent),
                 int(may_grant), key.created),
            )
        return key, secret

    def authenticate(self, secret: str) -> Key | None:
        """The live key with this secret. A key revoked through another process is dead within `REMEMBER_S`, one revoked
        through this store at once."""
        hashed, now = self._hash(secret), time.monotonic()
        known = self._known.get(hashed)
        if known is None or known[1] <= now:
            rows = self._db.read("SELECT * FROM keys WHERE hash = ? AND revoked IS NULL", (hashed,))
            if len(self._known) >= MOST_REMEMBERED:
                self._known.clear()
            self._known.pop(hashed, None)
            if not rows:
                return None
            known = self._known[hashed] = (_key(rows[0]), now + REMEMBER_S)
        return known[0]

    def revoke(self, key_id: str) -> None:
        """Raises UserError if there is no such live key."""
        with self._db.transaction() as write:
            revoked = write("UPDATE keys SET revoked = ? WHERE id = ? AND revoked IS NULL", (time.time(), key_id))
            if revoked.rowcount == 0:
                raise UserError(f"no live key {key_id!r}; `tidelock keys list` shows them")
        self._known.clear()

    def list(self) -> list[Key]:
        return [_key(row) for row in self._db.read("SELECT * FROM keys ORDER BY created, id")]

    def _hash(self, secret: str) -> str:
        return hmac.new(self._pepper, secret.encode(), hashlib.sha256).hexdigest()


def _key(row: object) -> Key:
    fields = {name: row[name] for name in Key.__dataclass_fields__}
    return Key(**{**fields, "training_consent": bool(row["training_consent"]), "may_grant": bool(row["may_grant"])})
