"""API keys: created once, shown once, stored only as an HMAC-SHA-256 under a pepper kept outside the database.

A key belongs to a project of an organisation (the ledger's customer, whose wallet pays), perhaps to a member, and says
what it may do, from where, with which models, and what may be done with the traffic it carries.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import os
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from tidelock.service.accounts import OPERATOR, ROLES, SCOPES, USUAL_SCOPES, Accounts, UnknownId, log
from tidelock.service.db import Database
from tidelock.tokens.errors import UserError


REMEMBER_S = 0.5  # how long an answer of the database may be believed: requests of one key come in bursts
MOST_REMEMBERED = 10_000


@dataclass(frozen=True)
class Key:
    id: str
    hint: str  # first and last characters, enough to recognise it in a list
    customer: str
    name: str
    role: str  # "user", or "admin" for the operator's own: may swap weights
    training_consent: bool  # what holds when a request says nothing
    may_grant: bool  # whether a request may consent although the key's default is no
    created: float
    revoked: float | None
    project: str = ""
    member: str = ""  # whose it is; "" for a program's
    scopes: tuple[str, ...] = USUAL_SCOPES  # of its own and its member's role
    models: tuple[str, ...] = ()  # () for all
    addresses: tuple[str, ...] = ()  # networks it may be used from; () for anywhere
    profile: str = ""  # "strict" | "lenient" | "" as the server (see `kimi`)
    last_used: float | None = None  # to within seconds
    suspended: str = ""  # why its organisation is; "": it is not
    budgeted: bool = False  # its organisation has a budget of some kind

    def admits(self, address: str) -> bool:
        """Whether it may be used from this client address."""
        return not self.addresses or _within(address, self.addresses)

    def sees(self, model: str) -> bool:
        return not self.models or model in self.models

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
        self._keyed = hmac.new(pepper, digestmod="sha256")
        self._used: dict[str, float] = {}  # key id -> when, not written yet
        self._known: dict[str, tuple[Key | None, float]] = {}  # by hash: what was lately found, and until when it counts
        self._asking: dict[str, asyncio.Future[Key | None]] = {}  # by hash: who finds it out for all
        self._revocations = 0  # and other changes, through this store

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
        project: str = "",
        member: str = "",
        scopes: Sequence[str] = USUAL_SCOPES,
        models: Sequence[str] = (),
        addresses: Sequence[str] = (),
        profile: str = "",
        actor: str = OPERATOR,
    ) -> tuple[Key, str]:
        """Returns the key's record and the secret itself, which is not stored and cannot be shown again.

        An organisation that is new is made, and its default project is where a key goes that names none.
        Raises UserError for what makes no sense, UnknownId for a project or member of another organisation.
        """
        if not customer:
            raise UserError("a key needs a customer")
        if role not in ("user", "admin"):
            raise UserError(f"unknown role {role!r}; a key's role is user or admin")
        _check(scopes, models, profile)
        networks = tuple(_network(address) for address in addresses)
        accounts = Accounts(self._db)
        standard = accounts.ensure(customer, actor)
        if project and accounts.project(customer, project)["archived"]:
            raise UnknownId(f"no live project {project!r}")
        who = accounts.member(customer, member) if member else None
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
            project=project or standard,
            member=who["id"] if who else "",
            scopes=_granted(" ".join(scopes), who["role"] if who else None),
            models=tuple(models),
            addresses=networks,
            profile=profile,
        )
        with self._db.transaction() as write:
            write(
                "INSERT INTO keys (id, hash, hint, customer, name, role, training_consent, may_grant, created, project, member, "
                "scopes, models, addresses, profile) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (key.id, self._hash(secret), key.hint, customer, name, role, int(training_consent), int(may_grant), key.created,
                 key.project, key.member, " ".join(scopes), " ".join(models), " ".join(networks), profile),
            )  # fmt: skip
            detail = {"project": key.project, "member": key.member, "scopes": list(scopes), "name": name}
            log(write, customer, actor, "key.created", key.id, detail)
        return key, secret

    def authenticate(self, secret: str) -> Key | None:
        """The live key with this secret. A key revoked through another process is dead within `REMEMBER_S`, one revoked
        through this store at once. Waits for the database; `look_up` does not."""
        hashed, now = self._hash(secret), time.monotonic()
        known = self._known.get(hashed)
        if known is None or known[1] <= now:
            return self._remember(hashed, self._db.read(f"{LIVE} AND keys.hash = ?", (hashed,)), now)
        return known[0]

    async def look_up(self, secret: str) -> Key | None:
        """`authenticate` off the event loop; the database is asked once for all who ask for the same key at the same time.
        Raises StorageDown."""
        hashed = self._hash(secret)
        known = self._known.get(hashed)
        if known is not None and known[1] > time.monotonic():
            return known[0]
        asking = self._asking.get(hashed)
        if asking is None:
            asking = self._asking[hashed] = asyncio.ensure_future(self._ask(hashed))
        return await asyncio.shield(asking)  # one who leaves does not take the answer from the others

    async def _ask(self, hashed: str) -> Key | None:
        try:
            known_until = None
            while known_until != self._revocations:  # what was read before a revocation may not outlive it
                known_until, now = self._revocations, time.monotonic()
                rows = await self._db.fetch(f"{LIVE} AND keys.hash = ?", (hashed,))
            return self._remember(hashed, rows, now)
        finally:
            del self._asking[hashed]

    def _remember(self, hashed: str, rows: list, now: float) -> Key | None:
        if len(self._known) >= MOST_REMEMBERED:
            self._known.clear()
        found = _key(rows[0]) if rows and hmac.compare_digest(rows[0]["hash"], hashed) else None
        self._known[hashed] = (found, now + REMEMBER_S)
        if found is not None:
            self._used[found.id] = time.time()
        return found

    def revoke(self, key_id: str, organization: str | None = None, actor: str = OPERATOR) -> None:
        """Raises UnknownId if there is no such live key (in the organisation, if one is named)."""
        within, args = ("", ()) if organization is None else (" AND customer = ?", (organization,))
        with self._db.transaction() as write:
            live = write(f"SELECT customer FROM keys WHERE id = ? AND revoked IS NULL{within}{write.for_update}", (key_id, *args))
            row = live.fetchone()
            if row is None:
                raise UnknownId(f"no live key {key_id!r}; `tidelock keys list` shows them")
            write("UPDATE keys SET revoked = ? WHERE id = ?", (time.time(), key_id))
            log(write, row[0], actor, "key.revoked", key_id)
        self.forget()

    def forget(self) -> None:
        """What the database said of keys is asked again: something changed. Other stores notice within `REMEMBER_S`."""
        self._revocations += 1
        self._known.clear()

    def list(self, organization: str | None = None, project: str | None = None) -> list[Key]:
        """All, or one organisation's, or one project's."""
        where, args = "TRUE", []
        for column, value in (("customer", organization), ("project", project)):
            if value is not None:
                where, args = f"{where} AND keys.{column} = ?", [*args, value]
        return [_key(row) for row in self._db.read(f"{ALL} WHERE {where} ORDER BY keys.created, keys.id", args)]

    def flush(self) -> None:
        """Writes down when keys were last used: in one go now and then, because a write per request would cost it. Raises
        StorageDown and then keeps it for the next time."""
        used, self._used = self._used, {}
        if used:
            try:
                with self._db.transaction() as write:  # in one order for all workers, so that no two wait for each other
                    write.update("keys", ("id",), ("last_used",), sorted(used.items()))
            except BaseException:
                self._used = {**used, **self._used}
                raise

    def live(self, key_id: str) -> Key | None:
        """The key with this id, if it still counts."""
        rows = self._db.read(f"{LIVE} AND keys.id = ?", (key_id,))
        return _key(rows[0]) if rows else None

    def _hash(self, secret: str) -> str:
        """HMAC-SHA-256. From a copy, because the one-step function lets go of the interpreter for the microsecond it takes, and
        beside a busy till has to wait until it gets it back."""
        hashing = self._keyed.copy()
        hashing.update(secret.encode())
        return hashing.hexdigest()


# With what the request path must learn within `REMEMBER_S`: that the organisation is suspended, or was given a budget.
ALL = (
    "SELECT keys.*, members.role AS member_role, COALESCE(organizations.suspended_for, '') AS suspended, "
    "EXISTS (SELECT 1 FROM budgets WHERE budgets.customer = keys.customer) AS budgeted "
    "FROM keys LEFT JOIN members ON members.id = keys.member LEFT JOIN organizations ON organizations.id = keys.customer"
)
# A key ends when it is revoked, its member leaves or its project is archived.
LIVE = (
    f"{ALL} LEFT JOIN projects ON projects.id = keys.project WHERE keys.revoked IS NULL AND projects.archived IS NULL "
    "AND (keys.member = '' OR members.removed IS NULL)"
)


def _key(row: object) -> Key:
    fields = {name: row[name] for name in Key.__dataclass_fields__}
    fields |= {name: bool(row[name]) for name in ("training_consent", "may_grant", "budgeted")}
    fields |= {name: tuple(row[name].split()) for name in ("models", "addresses")}
    return Key(**{**fields, "scopes": _granted(row["scopes"], row["member_role"])})


def _granted(scopes: str, role: str | None) -> tuple[str, ...]:
    """A member's key never may more than the member."""
    allowed = SCOPES if role is None else ROLES[role]
    return tuple(scope for scope in scopes.split() if scope in allowed)


def _check(scopes: Sequence[str], models: Sequence[str], profile: str) -> None:
    for scope in scopes:
        if scope not in SCOPES:
            raise UserError(f"unknown scope {scope!r}; a key's scopes are {', '.join(SCOPES)}")
    if not scopes:
        raise UserError("a key needs at least one scope")
    if any(not model or model.split() != [model] for model in models):
        raise UserError("model names have no spaces")
    if profile not in ("", "strict", "lenient"):
        raise UserError(f"unknown profile {profile!r}; it is strict or lenient")


def _network(address: str) -> str:
    try:
        return str(ipaddress.ip_network(address, strict=False))
    except ValueError:
        raise UserError(f"{address!r} is no IP address or network such as 10.0.0.0/8") from None


@lru_cache(10_000)
def _within(address: str, networks: tuple[str, ...]) -> bool:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    parsed = getattr(parsed, "ipv4_mapped", None) or parsed
    return any(parsed in ipaddress.ip_network(network) for network in networks)
