"""`tidelock keys`: create, list, revoke and top up the API keys of a service directory."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tidelock.service.db import Database, service_database
from tidelock.service.keys import KeyStore
from tidelock.service.ledger import MAX_NANO, Ledger
from tidelock.service.prices import exact_nano, format_usd
from tidelock.tokens.errors import UserError

from .main import command, explained

EXAMPLES = {
    "create": "tidelock keys create --dir demo-run/service --customer ann --usd 5 --consent",
    "topup": "tidelock keys topup --dir demo-run/service --customer ann --usd 2.50 --reference invoice-17",
    "list": "tidelock keys list --dir demo-run/service",
    "revoke": "tidelock keys revoke key_0123456789abcdef --dir demo-run/service",
}


def add(subparsers: Any) -> None:
    parser = command(subparsers, "keys", run, "create, list, revoke and top up API keys", "\n  ".join(EXAMPLES.values()))
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--dir", type=Path, default=Path("service"), help="service directory, DIR/service of a run (default: service)")
    common.add_argument("--json", metavar="PATH", default=argparse.SUPPRESS, help="write the result as JSON to PATH")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    create = explained(actions, "create", "create a key and show its secret once", EXAMPLES["create"], parents=[common])
    create.add_argument("--customer", required=True, help="whose balance pays")
    create.add_argument("--name", default="", help="a label for lists")
    create.add_argument("--admin", action="store_true", help="may also swap weights")
    create.add_argument("--usd", help="top the customer up by this amount")
    create.add_argument("--consent", action="store_true", help="traffic may be trained on unless a request says no")
    create.add_argument("--may-grant", action="store_true", help="a single request may consent to training")

    topup = explained(actions, "topup", "book money paid in", EXAMPLES["topup"], parents=[common])
    topup.add_argument("--customer", required=True)
    topup.add_argument("--usd", required=True)
    topup.add_argument("--reference", help="the payment's id; the same one is never booked twice")

    revoke = explained(actions, "revoke", "end a key at once", EXAMPLES["revoke"], parents=[common])
    revoke.add_argument("key_id")

    explained(actions, "list", "show keys and balances", EXAMPLES["list"], parents=[common])


def run(args: argparse.Namespace) -> dict[str, Any]:
    creates = args.action == "create"
    if creates:
        args.dir.mkdir(parents=True, exist_ok=True)
    target = service_database(args.dir)
    if not creates and "://" not in target and not Path(target).is_file():
        raise UserError(f"no service in {args.dir}; `tidelock keys create --dir {args.dir}` starts one")
    db = Database(target)
    try:
        keys, ledger = KeyStore.open(db, args.dir / "pepper"), Ledger(db)
        result = {"create": _create, "topup": _topup, "revoke": _revoke, "list": _list}[args.action](args, keys, ledger)
    finally:
        db.close()
    return result


def _create(args: argparse.Namespace, keys: KeyStore, ledger: Ledger) -> dict[str, Any]:
    amount = nano_usd(args.usd) if args.usd is not None else 0
    key, secret = keys.create(
        args.customer,
        args.name,
        role="admin" if args.admin else "user",
        training_consent=args.consent,
        may_grant=args.may_grant,
    )
    if amount:
        ledger.topup(args.customer, amount)
    print(f"{key.id}  {args.customer}  balance {format_usd(ledger.balance(args.customer))} USD")
    print(f"secret (shown only now): {secret}")
    return {**asdict(key), "secret": secret, "balance_nano_usd": ledger.balance(args.customer)}


def _topup(args: argparse.Namespace, keys: KeyStore, ledger: Ledger) -> dict[str, Any]:
    booked = ledger.topup(args.customer, nano_usd(args.usd), args.reference)
    state = "booked" if booked else "was booked before; nothing changed"
    print(f"{args.usd} USD for {args.customer}: {state}; balance {format_usd(ledger.balance(args.customer))} USD")
    return {"customer": args.customer, "booked": booked, "balance_nano_usd": ledger.balance(args.customer)}


def _revoke(args: argparse.Namespace, keys: KeyStore, ledger: Ledger) -> dict[str, Any]:
    keys.revoke(args.key_id)
    print(f"{args.key_id} is revoked")
    return {"id": args.key_id, "revoked": True}


def _list(args: argparse.Namespace, keys: KeyStore, ledger: Ledger) -> dict[str, Any]:
    listed = [{**asdict(key), "balance_nano_usd": ledger.balance(key.customer)} for key in keys.list()]
    for key in listed:
        state = "revoked" if key["revoked"] else "live"
        consent = "consents" if key["training_consent"] else "on request" if key["may_grant"] else "no training"
        balance = format_usd(key["balance_nano_usd"])
        who = f"{key['id']}  {key['hint']}  {key['customer']:<12}"
        print(f"{who} {key['role']:<5} {state:<7} {consent:<11} {balance} USD")
    return {"keys": listed}


def nano_usd(usd: str) -> int:
    """Raises UserError unless this is a positive amount, not absurdly large, with at most nine decimals."""
    nano = exact_nano(usd)
    if nano is not None and 0 < nano < MAX_NANO:
        return nano
    raise UserError(f"{usd!r} is not an amount in USD such as 5 or 2.50")
