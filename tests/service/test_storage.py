"""Laws of the storage: old files open with every cent in place, migrations run once, an outage keeps nothing half-done."""

from __future__ import annotations

import os
import sqlite3
import threading
from pathlib import Path

import pytest

from tidelock.service import migrations
from tidelock.service.db import Conflict, Database, StorageDown, service_database
from tidelock.service.ledger import Ledger
from tidelock.service.local_postgres import local_postgres, missing
from tidelock.service.prices import Price, PriceBook
from tidelock.tokens.errors import UserError

FIRST_RELEASE = Path(__file__).parent / "data" / "first_release.sql"  # `sqlite3 service.sqlite .dump` of that program


def test_a_file_of_the_first_release_opens_with_its_books_intact(tmp_path):
    path = tmp_path / "service.sqlite"
    old = sqlite3.connect(path)
    old.executescript(FIRST_RELEASE.read_text())
    old.close()
    for _ in range(2):  # opening it again changes nothing
        db = Database(path)
        ledger = Ledger(db)
        audit, statement = ledger.audit(), {line["customer"]: line for line in ledger.statement()}
        assert audit.sound and (audit.transactions, audit.entries) == (9, 20)
        ann, bob = statement["ann"], statement["bob"]
        assert (ann["paid_nano"], ann["spent_nano"], ann["held_nano"]) == (5_000_000, 74_100, 153_000)
        assert ann["free_nano"] == 5_000_000 - 74_100 - 153_000
        assert (bob["spent_nano"], bob["free_nano"], bob["completion_tokens"]) == (33_000, 967_000, 20)
        assert [row["customer"] for row in db.read("SELECT customer FROM keys ORDER BY customer")] == ["ann", "bob"]
        db.close()
    db = Database(path)
    ledger = Ledger(db)
    PriceBook("2026-11", {"tide-nano": Price(300, 30, 1500)}).register(db)
    with pytest.raises(UserError, match="already stands"):
        PriceBook("2026-11", {"tide-nano": Price(300, 30, 1501)}).register(db)
    assert ledger.recover([""]) == 1 and ledger.balance("ann") == 5_000_000 - 74_100 and ledger.audit().sound
    db.close()


def test_workers_that_start_together_migrate_once(target):
    opened: list[Database] = []
    threads = [threading.Thread(target=lambda: opened.append(Database(target))) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(opened) == 5
    done = [row[0] for row in opened[0].read("SELECT version FROM migrations ORDER BY version")]
    assert done == sorted(migrations.steps())
    for db in opened:
        db.close()


def test_a_schema_of_a_later_program_is_refused(db, target):
    with db.transaction() as tx:
        tx("INSERT INTO migrations VALUES (9999)")
    with pytest.raises(UserError, match="newer version"):
        Database(target)


def test_a_transaction_that_fails_leaves_nothing(db):
    with pytest.raises(Conflict), db.transaction() as tx:
        tx("INSERT INTO customers VALUES ('ann', 0, '', 0)")
        tx("INSERT INTO customers VALUES ('ann', 0, '', 0)")
    with pytest.raises(RuntimeError), db.transaction() as tx:
        tx("INSERT INTO customers VALUES ('bob', 0, '', 0)")
        raise RuntimeError
    assert db.read("SELECT * FROM customers") == []


def test_a_long_look_at_one_moment_keeps_nobody_waiting_and_sees_nothing_newer(db):
    ledger = Ledger(db)
    ledger.open_account("ann")
    with db.snapshot() as read:
        assert read("SELECT COUNT(*) FROM customers")[0][0] == 1
        other = threading.Thread(target=lambda: (ledger.open_account("bob"), db.read("SELECT * FROM customers")), daemon=True)
        other.start()
        other.join(10)
        assert not other.is_alive() and read("SELECT COUNT(*) FROM customers")[0][0] == 1
    assert len(db.read("SELECT * FROM customers")) == 2


def test_rows_are_read_by_name_and_by_position_on_both(db):
    with db.transaction() as tx:
        tx.insert("customers", ("customer", "seq", "hash", "created"), [("ann", 2**40, "h", 0.25), ("bob", 0, "100% ?", 1)])
        tx.update("customers", ("customer",), ("hash",), [("ann", "x"), ("nobody", "y")])
        changed = tx("UPDATE customers SET seq = seq WHERE customer <> ?", ("ann",))
        assert (changed.rowcount, tx("DELETE FROM customers WHERE seq = -1").rowcount) == (1, 0)
    row, other = db.read("SELECT * FROM customers ORDER BY customer")
    assert dict(row) == {"customer": "ann", "seq": 2**40, "hash": "x", "created": 0.25} and row["seq"] == row[1]
    assert other["hash"] == "100% ?"
    with db.snapshot() as read:
        assert [tuple(row) for row in read("SELECT SUM(seq) FROM customers")] == [(2**40,)]


@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_a_database_that_crashes_is_an_outage_and_then_goes_on_where_it_was():
    with local_postgres() as server:
        db = Database(server.database())
        ledger = Ledger(db)
        ledger.open_account("ann")
        ledger.topup("ann", 700)
        server.stop("immediate")
        for work in (lambda: ledger.balance("ann"), lambda: ledger.topup("ann", 1, "lost")):
            with pytest.raises(StorageDown):
                work()
        server.start()
        assert ledger.balance("ann") == 700 and ledger.topup("ann", 1, "lost")
        assert ledger.audit().sound
        db.close()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_we_may_not_write_to_is_one_clear_line(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot open"):
        Database(tmp_path / "service.sqlite")


def test_a_service_directory_names_its_database_and_its_prices(tmp_path, postgres):
    from scripted import ScriptedPolicy

    from tidelock.service.state import open_state
    from tidelock.tokens.template import get_template
    from tidelock.tokens.tokenizer import ByteTokenizer

    url = postgres.database()
    (tmp_path / "database").write_text(url + "\n")
    (tmp_path / "prices.toml").write_text(
        '[[version]]\nname = "mine"\neffective = 2026-01-01T00:00:00Z\n'
        '[version.models.tide]\ninput = "0.30"\ncached_input = "0.03"\noutput = "1.50"\n'
    )
    template = get_template("xtml", ByteTokenizer())
    state = open_state(
        tmp_path, policy=ScriptedPolicy(template), template=template, prices=PriceBook("v1", {"tide": Price(1, 1, 1)}),
        model="tide", context_length=100, weights_version=1,
    )  # fmt: skip
    assert state.ledger.db.name == "postgres" and not (tmp_path / "service.sqlite").exists()
    assert state.prices.now.version == "mine" and state.prices.now.price("tide").output_nano == 1500
    state.traces.close()
    state.ledger.db.close()
    (tmp_path / "database").write_text("/somewhere/else")
    with pytest.raises(UserError, match="should hold one line"):
        service_database(tmp_path)


def test_many_rows_are_updated_as_one_by_one_would_be(target):
    """In lots of several sizes, so around each of them."""
    db = Database(target)
    with db.transaction() as tx:
        tx("CREATE TABLE many (k TEXT, l BIGINT, v BIGINT, w TEXT, PRIMARY KEY (k, l))")
        for n in [*range(20), 31, 32, 33, 63, 64, 65, 75, 127, 128, 131]:
            tx("DELETE FROM many")
            tx.insert("many", ("k", "l", "v", "w"), [("a", i, 0, "") for i in range(150)])
            tx.update("many", ("k", "l"), ("v", "w"), [("a", 7 * i % 150, i, f"w{i}") for i in range(n)])
            expected = {("a", i): (0, "") for i in range(150)} | {("a", 7 * i % 150): (i, f"w{i}") for i in range(n)}
            assert {(k, l): (v, w) for k, l, v, w in map(tuple, tx("SELECT k, l, v, w FROM many").fetchall())} == expected, n
        tx("DROP TABLE many")
    db.close()


def test_a_network_that_swallows_packets_is_an_outage_within_seconds(postgres):
    """By itself TCP waits a quarter of an hour for an acknowledgement, and a thread of ours with it."""
    db = Database(postgres.database())
    with db._backend._connection() as connection:
        said = connection.info.get_parameters()
    assert said["tcp_user_timeout"] == "10000" and int(said["keepalives_idle"]) <= 10 and said["connect_timeout"] == "5"
    db.close()
