"""`tidelock keys` on a service directory: what it books is what the service sees."""

from __future__ import annotations

import json

import pytest

from tidelock.cli.main import parser, write_json
from tidelock.service.db import Database
from tidelock.service.keys import KeyStore
from tidelock.service.ledger import Ledger
from tidelock.tokens.errors import UserError


def command(*words: str) -> None:
    args = parser().parse_args(["keys", *words])
    result = args.run(args)
    if args.json:
        write_json(args.json, result)


def test_a_created_key_authenticates_and_its_topup_is_booked_once(tmp_path, capsys):
    where = ["--dir", str(tmp_path)]
    result = tmp_path / "key.json"
    command("create", *where, "--customer", "ann", "--usd", "0.000000005", "--consent", "--json", str(result))
    for _ in range(2):
        command("topup", *where, "--customer", "ann", "--usd", "2.50", "--reference", "invoice-17")
    created = json.loads(result.read_text())
    assert created["secret"] in capsys.readouterr().out
    command("list", *where)
    shown = capsys.readouterr().out
    assert created["secret"] not in shown and "2.500000005" in shown
    db = Database(tmp_path / "service.sqlite")
    store = KeyStore.open(db, tmp_path / "pepper")
    assert store.authenticate(created["secret"]).training_consent
    assert Ledger(db).balance("ann") == 2_500_000_005
    command("revoke", created["id"], *where)
    assert KeyStore.open(db, tmp_path / "pepper").authenticate(created["secret"]) is None


@pytest.mark.parametrize("usd", ["-1", "0", "NaN", "inf", "1e400", "five", "0.0000000001"])
def test_an_amount_that_is_no_money_is_refused_before_anything_is_created(tmp_path, usd):
    with pytest.raises(UserError):
        command("create", "--dir", str(tmp_path), "--customer", "ann", f"--usd={usd}", "--name", "x")
    assert KeyStore.open(Database(tmp_path / "service.sqlite"), tmp_path / "pepper").list() == []


def test_a_directory_without_a_service_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="no service in"):
        command("list", "--dir", str(tmp_path / "nothing"))
