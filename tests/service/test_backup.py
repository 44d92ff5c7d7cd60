"""The restore drill: what comes back is what went in, from either database into either."""

from __future__ import annotations

import gzip
import hashlib
import json
import sqlite3
import tracemalloc
from pathlib import Path

import pytest
from test_ledger import PRICE, place, use

from tidelock.cli.main import parser
from tidelock.service.backup import backup, restore
from tidelock.service.db import Database
from tidelock.service.keys import KeyStore
from tidelock.service.ledger import Ledger
from tidelock.service.prices import PriceBook
from tidelock.tokens.errors import UserError


@pytest.fixture
def ledger(db, tmp_path):
    ledger = Ledger(db)
    PriceBook("v1", {"m": PRICE}).register(db)
    KeyStore.open(db, tmp_path / "pepper").create("ann", "naïve „key“")
    ledger.topup("ann", 10_000_000)
    ledger.grant("ann", 5_000, lot="gift", expires=4e9)
    for n in range(5):
        use(ledger, place(ledger, f"r{n}", prompt=5, most=50), tokens=10 * n)
    place(ledger, "still running", prompt=5, most=50)
    return ledger


@pytest.fixture(params=["sqlite", "postgres"])
def empty(request, tmp_path):
    if request.param == "sqlite":
        return str(tmp_path / "restored.sqlite")
    return request.getfixturevalue("postgres").database()


def test_a_restored_database_has_the_same_audit_the_same_chains_and_goes_on(ledger, empty, tmp_path):
    file = tmp_path / "backup.gz"
    before, root = backup(ledger.db, file)
    assert restore(file, empty) == (before, root)
    db = Database(empty)
    again = Ledger(db)
    assert again.statement() == ledger.statement() and again.balances("ann") == ledger.balances("ann")
    assert [key.name for key in KeyStore.open(db, tmp_path / "pepper").list()] == ["naïve „key“"]
    assert again.release("still running") and again.topup("ann", 1) and again.audit().sound
    with pytest.raises(UserError, match="new file|not empty"):
        restore(file, empty)
    db.close()


def test_a_damaged_backup_and_unsound_books_are_refused_and_leave_nothing(tmp_path):
    db = Database(tmp_path / "service.sqlite")
    ledger = Ledger(db)
    ledger.open_account("ann")
    ledger.topup("ann", 5)
    file = tmp_path / "backup.gz"
    backup(db, file)
    text = gzip.decompress(file.read_bytes())
    for damaged in (text.replace(b'"cash"', b'"extra"', 1), text[:-90], b"", text[: len(text) // 2]):
        (tmp_path / "damaged.gz").write_bytes(gzip.compress(damaged))
        with pytest.raises(UserError, match="damaged"):
            restore(tmp_path / "damaged.gz", str(tmp_path / "new.sqlite"))
    (tmp_path / "cut.gz").write_bytes(file.read_bytes()[:-20])
    with pytest.raises(UserError, match="damaged"):
        restore(tmp_path / "cut.gz", str(tmp_path / "new.sqlite"))
    assert not list(tmp_path.glob("new.sqlite*"))
    with db.transaction() as tx:
        tx("UPDATE accounts SET balance_nano = 6 WHERE kind = 'cash'")
    with pytest.raises(UserError, match="not sound"):
        backup(db, file)
    assert gzip.decompress(file.read_bytes()) == text
    db.close()


def test_a_backup_of_an_older_schema_is_brought_up_to_date(tmp_path):
    db = Database(tmp_path / "service.sqlite")
    ledger = Ledger(db)
    ledger.open_account("ann")
    ledger.topup("ann", 5)
    _, root = backup(db, tmp_path / "new.gz")
    db.close()
    lines = gzip.decompress((tmp_path / "new.gz").read_bytes()).splitlines()[:-1]
    lines[0] = lines[0].replace(lines[0].split(b'"version":')[1].split(b",")[0], b"2", 1)
    old = Database(":memory:", version=2)
    then = {row[0] for row in old.read(old.list_tables)}
    old.close()
    sections = [json.loads(line) for line in lines]  # those of later tables are all empty: no rows follow their line
    kept = [line for line, said in zip(lines, sections) if not isinstance(said, dict) or said.get("table", "keys") in then]
    text = b"".join(line + b"\n" for line in kept)
    end = json.dumps({"sha256": hashlib.sha256(text).hexdigest()}).encode() + b"\n"
    (tmp_path / "old.gz").write_bytes(gzip.compress(text + end))
    assert restore(tmp_path / "old.gz", str(tmp_path / "restored.sqlite"))[1] == root
    db = Database(tmp_path / "restored.sqlite")
    assert db.read("SELECT MAX(version) FROM migrations")[0][0] > 2 and Ledger(db).balance("ann") == 5
    db.close()


def test_admin_backs_up_restores_and_verifies(tmp_path, capsys):
    def command(*words: str) -> dict:
        args = parser().parse_args(["admin", *words])
        return args.run(args)

    (tmp_path / "a").mkdir()
    db = Database(tmp_path / "a" / "service.sqlite")
    Ledger(db).open_account("ann")
    Ledger(db).topup("ann", 5)
    db.close()
    first = command("verify", "--dir", str(tmp_path / "a"))
    command("backup", str(tmp_path / "b.gz"), "--dir", str(tmp_path / "a"))
    command("restore", str(tmp_path / "b.gz"), "--dir", str(tmp_path / "b"))
    assert command("verify", "--dir", str(tmp_path / "b"))["root"] == first["root"]
    assert "sound" in capsys.readouterr().out
    sqlite3.connect(tmp_path / "b" / "service.sqlite").executescript("UPDATE accounts SET balance_nano = 9 WHERE kind = 'cash'")
    assert command("verify", "--dir", str(tmp_path / "b"))["failed"]


def test_admin_gives_a_voucher_once_and_refunds_no_more_than_there_is(tmp_path):
    db = Database(tmp_path / "service.sqlite")
    Ledger(db).open_account("ann")
    Ledger(db).topup("ann", 3_000_000_000)
    db.close()

    def command(*words: str) -> dict:
        args = parser().parse_args(["admin", *words, "--customer", "ann", "--dir", str(tmp_path)])
        return args.run(args)

    assert [command("grant", "--usd", "5", "--voucher", "hello")["booked"] for _ in range(2)] == [True, False]
    assert command("refund", "--usd", "2", "--reference", "r1")["balances_nano_usd"]["cash"] == 1_000_000_000
    with pytest.raises(UserError, match="does not have that much"):
        command("refund", "--usd", "2", "--reference", "r2")
    with pytest.raises(UserError, match="not an amount"):
        command("grant", "--usd", "-5", "--voucher", "x")


def test_admin_rerates_from_the_command_line(tmp_path, capsys):
    from test_prices import KIMI, spend

    db = Database(tmp_path / "service.sqlite")
    ledger = Ledger(db)
    ledger.open_account("ann")
    ledger.topup("ann", 10**9)
    spend(ledger, "ann", "r1", 10)
    db.close()
    book = tmp_path / "prices.toml"
    book.write_text(Path(KIMI).read_text().replace("kimi-k3]", "m]"))
    where = ["--dir", str(tmp_path)]
    for words in (["prices", str(book), *where],
                  ["rerate", "--from", "2020-01-01", "--price-version", "kimi-2026-03", *where, "--dry-run"],
                  ["rerate", "--from", "2020-01-01", "--price-version", "kimi-2026-03", *where]):  # fmt: skip
        args = parser().parse_args(["admin", *words])
        result = args.run(args)
    assert result["charged_nano"] == 10 * 13_500 + 6 * 2_700 + 4 * 270 and "charged" in capsys.readouterr().out


def test_backup_audit_and_restore_hold_a_few_rows_at_a_time(tmp_path, target, request):
    """What is in memory at once does not grow with the tables."""
    db = Database(target)
    ledger = Ledger(db)
    ledger.open_account("ann")
    peaks = []
    for rows in (2000, 8000):
        for n in range(0, rows, 500):
            with ledger.books(["ann"]) as books:
                for m in range(500):
                    books.post("ann", "topup", f"{rows}-{n + m}", [(("outside", ""), -5), (("cash", ""), 5)], "x" * 200)
        file = tmp_path / f"{rows}.gz"
        tracemalloc.start()
        backup(db, file)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.reset_peak()
        into = str(tmp_path / f"{rows}.sqlite") if db.name == "sqlite" else request.getfixturevalue("postgres").database()
        restore(file, into)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    db.close()
    small, large = max(peaks[:2]), max(peaks[2:])
    assert large < 1.5 * small and large < 6 << 20, peaks
