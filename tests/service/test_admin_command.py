"""`tidelock admin`: what it does is what the service goes by, every verb has an example, and bad input is one clear line."""

from __future__ import annotations

import json
import shlex

import pytest

from tidelock.cli.main import parser, write_json
from tidelock.service.db import Database
from tidelock.service.keys import KeyStore
from tidelock.service.ladder import Limits
from tidelock.service.ledger import Ledger
from tidelock.service.prices import Price, PriceBook
from tidelock.service.tiers import Tiers
from tidelock.tokens.errors import UserError


@pytest.fixture
def admin(tmp_path):
    """Runs a line in a service where ann has a key; returns what `--json` writes."""

    def run(line: str, group: str = "admin") -> dict:
        out = tmp_path / "out.json"
        args = parser().parse_args([group, *shlex.split(line), "--dir", str(tmp_path), "--json", str(out)])
        write_json(args.json, args.run(args))
        return json.loads(out.read_text())

    run("create --customer ann", "keys")
    return run


def verbs() -> list[list[str]]:
    top = parser()
    admin = next(a for a in top._subparsers._group_actions[0].choices.items() if a[0] == "admin")[1]
    groups = admin._subparsers._group_actions[0].choices
    return [[name, verb] for name, group in groups.items() if group._subparsers for verb in group._subparsers._group_actions[0].choices]


@pytest.mark.parametrize("words", verbs(), ids=" ".join)
def test_every_verb_has_help_with_an_example_that_parses_and_json(words, capsys):
    with pytest.raises(SystemExit) as end:
        parser().parse_args(["admin", *words, "--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and "--json" in text and "example:" in text
    example = text.partition("example:")[2].strip().splitlines()[0]
    assert parser().parse_args(shlex.split(example)[1:]).verb == words[1]


def test_an_organisation_s_life_in_the_terminal(admin, tmp_path, capsys):
    project = admin("projects create ann app")["id"]
    admin("members add ann bo@x.y --role owner")
    admin("members add ann cy@x.y")
    assert admin("members role ann cy@x.y viewer")["role"] == "viewer"
    made = admin(f"keys create ann --project {project} --member cy@x.y --from 10.0.0.0/8 --models tide --profile lenient --consent")
    assert made["scopes"] == ["usage"] and made["addresses"] == ["10.0.0.0/8"] and made["secret"] in capsys.readouterr().out
    db = Database(tmp_path / "service.sqlite")
    key = KeyStore.open(db, tmp_path / "pepper").authenticate(made["secret"])
    assert key.project == project and key.profile == "lenient" and key.training_consent and key.models == ("tide",)
    assert made["secret"] not in json.dumps([admin("keys list ann"), admin("audit list ann")])
    admin(f"keys revoke {made['id']}")
    capsys.readouterr()
    admin("orgs suspend ann --reason 'invoice 7 is overdue'")
    assert admin("orgs list")["organizations"][0]["suspended_for"] == "invoice 7 is overdue"
    assert "suspended: invoice 7" in capsys.readouterr().out
    admin("orgs resume ann")
    assert admin("orgs list")["organizations"][0]["suspended"] is None and "suspended" not in capsys.readouterr().out.split("\n")[-2]
    admin("members remove ann cy@x.y")
    assert admin(f"projects archive ann {project}")["archived"]
    actions = [e["action"] for e in admin("audit list ann")["entries"]]
    assert actions[:5] == ["project.archived", "member.removed", "organization.resumed", "organization.suspended", "key.revoked"]
    assert all(e["actor"].startswith("operator") for e in admin("audit list ann")["entries"])
    db.close()


def test_limits_plans_and_payments_in_the_terminal(admin, tmp_path):
    assert len(admin("limits ladder kimi")["tiers"]) == 6
    admin("orgs tax ann --percent 19 --tax-id DE1")
    assert admin("payments book ann --usd 100 --reference w1")["booked"]
    assert not admin("payments book ann --usd 100 --reference w1")["booked"]
    assert admin("limits show ann")["tier"] == 3
    assert admin("limits set ann --rpm 7 --tier 5") and admin("limits show ann")["limits"]["requests"] == 7
    project = admin("projects list ann")["projects"][0]["id"]
    admin(f"limits set ann --scope {project} --concurrency 2")
    assert admin("limits show ann")["caps"] == {project: {"concurrency": 2, "requests": None, "tokens": None, "day_tokens": None}}
    (tmp_path / "mine.toml").write_text('[[tier]]\nfrom_usd = "0"\nrpm = 5\n[[tier]]\nfrom_usd = "50"\ntpm = 9\n')
    admin(f"limits ladder {tmp_path / 'mine.toml'}")
    admin("limits set ann")
    db = Database(tmp_path / "service.sqlite")
    assert Tiers(db).standing("ann") == (1, 100 * 10**9, Limits(tokens=9))
    admin("plans define coder --usd 19 --credits 25 --five-hours 3 --week 10 --seats 1")
    assert admin("plans subscribe ann coder")["plan"] == "coder"
    admin("create --customer bob", "keys")
    assert admin("plans subscribe bob coder --wait")["waiting"] == 1
    admin("plans define pro --usd 40 --credits 60 --seats 1")
    assert admin("plans change ann pro")["plan"] == "pro" and admin("plans cancel ann")["cancelled"] == 1
    assert admin("plans turn")["moved"] == 0 and admin("plans list")["plans"][0]["waiting"] == 0  # bob could not pay
    admin("plans extra-cap ann 50")
    assert admin("payments refund w1 --usd 11.9 --reference r1")["taken_nano"] == 11_900_000_000
    kinds = [(i["kind"], i["total_nano"]) for i in admin("invoices list ann")["invoices"]]
    assert kinds == [("credit", -11_900_000_000), ("topup", 119 * 10**9)]
    assert Ledger(db).audit().sound and admin("payments list ann")["payments"][0]["id"] == "w1"
    assert admin("verify")["failed"] is False
    db.close()


@pytest.mark.parametrize(
    "line",
    [
        "orgs rename nobody x", "projects create nobody x", "projects archive ann proj_x", "members add ann nobody",
        "members role ann x@y.z owner", "keys create ann --scopes fly", "keys create ann --from moon", "keys revoke key_x",
        "limits set nobody --rpm 1", "limits set ann --rpm -1", "limits set ann --scope proj_x --rpm 1", "limits ladder nowhere.toml",
        "plans subscribe ann gold", "plans cancel ann", "plans define x --usd 0 --credits 1 --seats 1", "payments book ann --usd 1e99 --reference x",
        "payments book nobody --usd 1 --reference x", "payments refund x --usd 1 --reference y", "invoices month ann 2026-13",
        "orgs tax ann --percent 900", "orgs tax ann --percent nan", "orgs suspend nobody --reason x", "orgs suspend ann --reason ''",
        "orgs resume ann", "orgs resume nobody",
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_line(admin, line):
    with pytest.raises(UserError) as error:
        admin(line)
    assert "\n" not in str(error.value)


def test_receipts_in_the_terminal_say_what_the_books_say(admin, tmp_path, capsys):
    db = Database(tmp_path / "service.sqlite")
    ledger, price = Ledger(db), Price(300, 30, 1500)
    PriceBook("v1", {"tide": price}).register(db)
    ledger.topup("ann", 10**9)
    hold = ledger.hold("ann", "key_x", "req_1", model="tide", price=price, price_version="v1", prompt_tokens=100, max_tokens=50, lifetime_s=60)
    cost = ledger.settle(hold, cached_tokens=40, completion_tokens=20, finish_reason="stop")
    db.close()
    (one,) = admin("receipts ann --outcome stop")["receipts"]
    assert one["id"] == "req_1" and one["cost_nano_usd"] == cost and admin("receipts ann --outcome refused")["receipts"] == []
    capsys.readouterr()
    full = admin("receipts ann req_1")
    assert full["sum_nano_usd"] == 0 and full["price"]["agrees"] and "sum 0.000000000 USD" in capsys.readouterr().out
    with pytest.raises(UserError, match="no receipt"):
        admin("receipts bob req_1")
