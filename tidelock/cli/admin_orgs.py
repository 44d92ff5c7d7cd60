"""`tidelock admin orgs|projects|members|keys`: who is a customer, and who may act for them."""

from __future__ import annotations

import argparse
import getpass
from dataclasses import asdict
from typing import Any

from tidelock.service import suspension
from tidelock.service.accounts import Accounts
from tidelock.service.db import Database
from tidelock.service.keys import KeyStore
from tidelock.service.ledger import Ledger
from tidelock.service.prices import format_usd
from tidelock.tokens.errors import UserError


def actor() -> str:
    try:
        return f"operator:{getpass.getuser()}"
    except (OSError, KeyError):
        return "operator"


def orgs(args: argparse.Namespace, db: Database) -> dict[str, Any]:
    ledger = Ledger(db)
    found = [{**org, "balance_nano_usd": ledger.balance(org["id"])} for org in Accounts(db).organizations()]
    for org in found:
        state = f"  suspended: {org['suspended_for']}" if org["suspended"] is not None else ""
        print(f"{org['id']:<20} {org['name']:<24} {format_usd(org['balance_nano_usd'])} USD{state}")
    return {"organizations": found}


def rename(args: argparse.Namespace, db: Database) -> dict[str, Any]:
    Accounts(db).rename(args.org, args.name, actor())
    print(f"{args.org} is called {args.name} now")
    return {"id": args.org, "name": args.name}


def tax(args: argparse.Namespace, db: Database) -> dict[str, Any]:
    try:
        bps = float(args.percent) * 100
        whole = round(bps)
    except (ValueError, OverflowError):
        raise UserError(f"{args.percent!r} is no percentage such as 19 or 7.7") from None
    if abs(whole - bps) > 1e-6:
        raise UserError("a tax rate has at most two decimals")
    Accounts(db).set_tax(args.org, whole, args.tax_id, actor())
    print(f"{args.org}: {args.percent} % tax on invoices from now on")
    return {"id": args.org, "tax_bps": whole, "tax_id": args.tax_id}


def suspend(args: argparse.Namespace, db: Database) -> dict[str, Any]:
    done = suspension.suspend(Ledger(db), args.org, args.reason, actor())
    print(f"{args.org} is suspended: within a second its keys are refused everywhere; nothing is charged, nothing it has runs out")
    return done


def resume(args: argparse.Namespace, db: Database) -> dict[str, Any]:
    done = suspension.resume(Ledger(db), args.org, actor())
    print(f"{args.org} goes on after {done['suspended_s'] / 3600:.1f} hours; its vouchers and credits last as much longer")
    return done


def projects(args: argparse.Namespace, db: Database) -> dict[str, Any]:
    found = Accounts(db).projects(args.org)
    for p in found:
        print(f"{p['id']}  {p['name']:<24} {'archived' if p['archived'] else 'default' if p['standard'] else ''}")
    return {"projects": found}


def create_project(args: argparse.Namespace, db: Database) -> dict[str, Any]:
    made = Accounts(db).create_project(args.org, args.name, actor())
    print(f"{made['id']}  {made['name']}")
    return made


def archive(args: argparse.Namespace, db: Database) -> dict[str, Any]:
    ended = Accounts(db).archive_project(args.org, args.project, actor())
    print(f"{ended['id']} is archived, and its keys are ended")
    return ended


def members(args: argparse.Namespace, db: Database) -> dict[str, Any]:
    found = Accounts(db).members(args.org)
    for m in found:
        print(f"{m['id']}  {m['role']:<10} {m['email']}")
    return {"members": found}


def add_member(args: argparse.Namespace, db: Database) -> dict[str, Any]:
    made = Accounts(db).add_member(args.org, args.email, args.role, actor())
    print(f"{made['id']}  {made['role']}  {made['email']}")
    return made


def role(args: argparse.Namespace, db: Database) -> dict[str, Any]:
    accounts = Accounts(db)
    changed = accounts.set_role(args.org, accounts.member(args.org, args.member)["id"], args.role, actor())
    print(f"{changed['email']} is {changed['role']} now")
    return changed


def remove(args: argparse.Namespace, db: Database) -> dict[str, Any]:
    accounts = Accounts(db)
    member = accounts.member(args.org, args.member)
    accounts.remove_member(args.org, member["id"], actor())
    print(f"{member['email']} is no member any more")
    return {"id": member["id"], "removed": True}


def keys(args: argparse.Namespace, db: Database) -> dict[str, Any]:
    found = [asdict(key) for key in _store(args, db).list(args.org)]
    for k in found:
        held = " ".join(filter(None, [",".join(k["models"]), ",".join(k["addresses"]), k["profile"], k["member"]]))
        print(f"{k['id']}  {k['hint']}  {k['project']}  {'revoked' if k['revoked'] else 'live':<7} {','.join(k['scopes'])} {held}".rstrip())
    return {"keys": found}


def create_key(args: argparse.Namespace, db: Database) -> dict[str, Any]:
    key, secret = _store(args, db).create(
        args.org, args.name, training_consent=args.consent, may_grant=args.may_grant, project=args.project, member=args.member,
        scopes=_words(args.scopes), models=_words(args.models), addresses=_words(args.addresses), profile=args.profile, actor=actor(),
    )  # fmt: skip
    print(f"{key.id}  {key.customer}  {key.project}  {','.join(key.scopes)}")
    print(f"secret (shown only now): {secret}")
    return {**asdict(key), "secret": secret}


def revoke(args: argparse.Namespace, db: Database) -> dict[str, Any]:
    _store(args, db).revoke(args.key, actor=actor())
    print(f"{args.key} is revoked")
    return {"id": args.key, "revoked": True}


def _store(args: argparse.Namespace, db: Database) -> KeyStore:
    return KeyStore.open(db, args.dir / "pepper")


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]
