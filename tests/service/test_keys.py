"""Laws of the keys: the secret is never stored, a revoked key is dead, a request cannot grant what its key forbids."""

from __future__ import annotations

import asyncio
import stat
import time

import pytest

from tidelock.service.db import Database
from tidelock.service.keys import KeyStore
from tidelock.tokens.errors import UserError


@pytest.fixture
def keys(db, tmp_path):
    return KeyStore.open(db, tmp_path / "pepper")


def test_the_secret_is_nowhere_on_disk(keys, tmp_path):
    _, secret = keys.create("ann")
    for file in tmp_path.iterdir():
        assert secret.encode() not in file.read_bytes() and secret[3:].encode() not in file.read_bytes()
    assert stat.S_IMODE((tmp_path / "pepper").stat().st_mode) == 0o600


def test_only_the_secret_itself_authenticates(keys):
    key, secret = keys.create("ann", "laptop", role="admin")
    assert keys.authenticate(secret) == key
    assert keys.authenticate(secret[:-1]) is None and keys.authenticate("") is None


def test_a_revoked_key_is_dead_at_once(keys):
    key, secret = keys.create("ann")
    keys.revoke(key.id)
    assert keys.authenticate(secret) is None
    assert keys.list()[0].revoked is not None
    with pytest.raises(UserError, match="no live key"):
        keys.revoke(key.id)


def test_a_key_revoked_by_another_process_is_dead_within_a_second(keys, target, tmp_path):
    key, secret = keys.create("ann")
    assert keys.authenticate(secret) == key
    other = KeyStore.open(Database(target), tmp_path / "pepper")
    other.revoke(key.id)
    deadline = time.monotonic() + 1.0
    while keys.authenticate(secret) is not None:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_same_secret_under_another_pepper_is_worthless(keys, target, tmp_path):
    _, secret = keys.create("ann")
    other = KeyStore.open(Database(target), tmp_path / "other-pepper")
    assert other.authenticate(secret) is None


@pytest.mark.parametrize(
    ("default", "may_grant", "requested", "expected"),
    [
        (True, False, None, (True, "key")),
        (True, False, False, (False, "request")),
        (True, False, True, (True, "request")),
        (False, False, None, (False, "key")),
        (False, False, True, (False, "key")),
        (False, True, True, (True, "request")),
        (False, True, None, (False, "key")),
        (False, True, False, (False, "request")),
    ],
)
def test_a_request_can_withdraw_consent_but_grant_only_what_the_key_allows(
    keys, default, may_grant, requested, expected
):
    key, _ = keys.create("ann", training_consent=default, may_grant=may_grant)
    assert key.consent(requested) == expected


def test_bad_roles_and_damaged_peppers_are_clear_errors(keys, tmp_path):
    with pytest.raises(UserError, match="role"):
        keys.create("ann", role="god")
    (tmp_path / "short").write_bytes(b"x")
    with pytest.raises(UserError, match="damaged"):
        KeyStore.open(Database(":memory:"), tmp_path / "short")


def test_whoever_asks_for_the_same_key_at_the_same_time_shares_one_look(keys, monkeypatch):
    key, secret = keys.create("ann")
    looks, fetch = [], keys._db.fetch

    async def counted(sql, args=()):
        looks.append(args)
        return await fetch(sql, args)

    monkeypatch.setattr(keys._db, "fetch", counted)

    async def main() -> None:
        assert await asyncio.gather(*(keys.look_up(secret) for _ in range(20))) == [key] * 20
        assert await asyncio.gather(*(keys.look_up("sk-wrong") for _ in range(20))) == [None] * 20
        assert keys.authenticate(secret) == key and keys.authenticate("sk-wrong") is None
        assert len(looks) == 2

    asyncio.run(main())


def test_a_look_that_began_before_a_revocation_does_not_outlive_it(keys, monkeypatch):
    key, secret = keys.create("ann")
    fetch = keys._db.fetch

    async def slow(sql, args=()):
        rows = await fetch(sql, args)
        if keys.live(key.id):
            keys.revoke(key.id)  # while the rows are on their way
        return rows

    monkeypatch.setattr(keys._db, "fetch", slow)
    assert asyncio.run(keys.look_up(secret)) is None and keys.authenticate(secret) is None
