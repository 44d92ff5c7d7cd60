"""Every schema there ever was opens with what was in it: the same rows, the same chains, and a ledger that goes on."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from tidelock.service import migrations
from tidelock.service.audit import audit_and_root
from tidelock.service.books import Admission, Metered
from tidelock.service.db import Conflict, Database
from tidelock.service.keys import KeyStore
from tidelock.service.ledger import Ledger
from tidelock.service.payments import Payments
from tidelock.service.plans import Plan, Plans
from tidelock.service.prices import Counts, Price, PriceBook
from tidelock.service.rating import rerate

PRICE, USD = Price(300, 30, 1500), 10**9
LATER = [version for version in migrations.steps() if version > 1]  # the first one's file is in test_storage


def ask(request_id: str) -> Admission:
    return Admission(request_id, "ann", "key_1", "m", PRICE, "v1", 10, 20, 600)


def lived_in(version: int) -> Database:
    """With one of everything that could be done by then."""
    db = Database(":memory:")
    PriceBook("v1", {"m": PRICE}).register(db)
    PriceBook("v2", {"m": Price(200, 20, 1000)}, effective=1.0).register(db)
    ledger, keys = Ledger(db), KeyStore(db, b"p" * 64)
    for customer in ("ann", "bob"):
        keys.create(customer)
        ledger.topup(customer, 1000 * USD, f"paid by {customer}")
    ledger.grant("ann", USD, lot="welcome", expires=time.time() + 1e6)
    ledger.refund("bob", 5, "back")
    for n in range(8):  # settled, released, and still open
        with ledger.books(["ann"]) as books:
            books.hold(ask(f"r{n}"))
        if n % 4 == 0:
            ledger.release(f"r{n}")
        elif n % 4 != 3:
            with ledger.books(["ann"], [f"r{n}"]) as books:
                books.settle(f"r{n}", PRICE, Metered(Counts(10, 3, completion=7), "stop"))
    if version >= 4:
        rerate(ledger, 0, time.time() + 10, "v2")
    if version >= 7:
        plans = Plans(ledger)
        plans.define(Plan("coder", 19 * USD, 25 * USD, 3 * USD, 10 * USD, 5))
        plans.subscribe("ann", "coder")
        plans.wait("bob", "coder")
    if version >= 8:
        Payments(ledger).manual("ann", 5 * USD, "wire")
        Payments(ledger).refund("wire", USD, "back again")
    return db


def columns(db: Database, table: str) -> set[str]:
    if db.name == "sqlite":
        return {row[1] for row in db.read(f"PRAGMA table_info({table})")}
    sql = "SELECT column_name FROM information_schema.columns WHERE table_schema = current_schema() AND table_name = ?"
    return {row[0] for row in db.read(sql, (table,))}


def tables(db: Database) -> set[str]:
    return {row[0] for row in db.read(db.list_tables)} - {"migrations"}


def copied(source: Database, old: Database) -> None:
    """What of it an older schema has a place for; tables refer to each other, so what does not go in yet comes later."""
    left = tables(old) & tables(source)
    while left:
        waiting = set()
        for table in sorted(left):
            names = sorted(columns(old, table) & columns(source, table))
            rows = [tuple(row) for row in source.read(f"SELECT {', '.join(names)} FROM {table}")]
            try:
                with old.transaction() as tx:
                    tx.insert(table, names, rows)
            except Conflict:
                waiting.add(table)
        assert waiting < left
        left = waiting


def counted(db: Database) -> dict[str, int]:
    return {table: db.read(f"SELECT COUNT(*) FROM {table}")[0][0] for table in tables(db)}


def audited(db: Database):
    with db.snapshot() as read:
        return audit_and_root(read)


@pytest.mark.parametrize("version", LATER)
def test_a_database_of_every_version_is_brought_up_to_date_with_what_is_in_it(target, version):
    source, old = lived_in(version), Database(target, version=version)
    copied(source, old)
    before, rows = audited(source), counted(old)
    old.close()
    new = Database(target)
    assert audited(new) == before and before[0].sound
    assert {table: count for table, count in counted(new).items() if table in rows} == rows
    ledger = Ledger(new)
    with ledger.books(["ann"]) as books:
        books.hold(ask("new"))
    assert ledger.recover([""]) == 3 and ledger.audit().sound  # r3, r7 and the new one
    Plans(ledger).turn()
    for db in (source, new):
        db.close()


def test_a_migration_that_is_killed_has_not_begun(target):
    """At its last step, all of them done and none of it committed."""
    source, old = lived_in(4), Database(target, version=4)
    copied(source, old)
    before = audited(source)
    old.close()
    script = f"""
import os, signal
from tidelock.service import migrations
from tidelock.service.db import Database
last = migrations.importlib.import_module(migrations.steps()[{max(migrations.steps())}])
last.up = lambda tx, backend, up=last.up: (up(tx, backend), os.kill(os.getpid(), signal.SIGKILL))
Database({target!r})
"""
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == -9
    half = Database(target, version=4)
    assert half.read("SELECT MAX(version) FROM migrations")[0][0] == 4 and "plans" not in tables(half)
    half.close()
    new = Database(target)
    assert audited(new) == before
    for db in (source, new):
        db.close()
