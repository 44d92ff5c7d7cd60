"""`tidelock admin`: the books of a service. Verify, back up, restore, give vouchers, refund, register prices, re-rate;
its customers (`admin_accounts`); and what they say of the business (`analytics`)."""

from __future__ import annotations

import argparse
from contextlib import closing
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tidelock.service import backup, pricefile
from tidelock.service.audit import audit_and_root
from tidelock.service.db import Database, service_database
from tidelock.service.ledger import Ledger
from tidelock.service.prices import format_usd
from tidelock.service.rating import rerate
from tidelock.tokens.errors import UserError

from . import admin_accounts, admin_receipts, admin_reconcile, analytics
from .keys import nano_usd
from .main import command, explained

EXAMPLES = {
    "verify": "tidelock admin verify --dir demo-run/service",
    "backup": "tidelock admin backup books.gz --dir demo-run/service",
    "restore": "tidelock admin restore books.gz --dir restored",
    "grant": "tidelock admin grant --customer ann --usd 5 --voucher welcome --expires 2026-12-31 --dir demo-run/service",
    "refund": "tidelock admin refund --customer ann --usd 2.50 --reference refund-17 --dir demo-run/service",
    "prices": "tidelock admin prices tidelock/service/pricebooks/kimi.toml --dir demo-run/service",
    "rerate": "tidelock admin rerate --from 2026-11-01 --price-version kimi-2026-10 --dir demo-run/service --dry-run",
}
MORE = """tidelock admin reconcile demo-run/service --since 2026-11-01
  tidelock admin limits ladder kimi --dir demo-run/service
  tidelock admin payments book ann --usd 100 --reference wire-7 --dir demo-run/service
  tidelock admin receipts ann --dir demo-run/service
  tidelock admin analytics --month 2026-03 --json - --dir demo-run/service
  tidelock admin synthetic-year --seed 0 --dir year"""


def add(subparsers: Any) -> None:
    summary = "a service's books, customers and numbers: verify, back up, prices, accounts, limits, plans, payments, analytics"
    parser = command(subparsers, "admin", run, summary, "\n  ".join([*EXAMPLES.values(), MORE]))
    where = argparse.ArgumentParser(add_help=False)
    where.add_argument("--dir", type=Path, default=Path("service"), help="service directory, DIR/service of a run (default: service)")
    where.add_argument("--database", metavar="URL", help="a postgresql:// database, instead of the directory's")
    where.add_argument("--json", metavar="PATH", default=argparse.SUPPRESS, help="write the result as JSON to PATH")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    def one(name: str, text: str) -> argparse.ArgumentParser:
        return explained(actions, name, text, EXAMPLES[name], parents=[where])

    one("verify", "recompute every sum, balance and hash chain")
    saved = one("backup", "write all of it, as of one moment, to a file")
    saved.add_argument("file", type=Path)
    back = one("restore", "fill a new, empty database from a backup and verify it")
    back.add_argument("file", type=Path)
    grant = one("grant", "give a customer a voucher; it is spent before cash")
    grant.add_argument("--customer", required=True)
    grant.add_argument("--usd", required=True)
    grant.add_argument("--voucher", required=True, metavar="NAME", help="the same one is never given twice")
    grant.add_argument("--expires", metavar="TIME", help="2026-12-31 (UTC); default: never")
    refund = one("refund", "book money paid back to a customer")
    refund.add_argument("--customer", required=True)
    refund.add_argument("--usd", required=True)
    refund.add_argument("--reference", required=True, help="the payment's id; the same one is never booked twice")
    prices = one("prices", "check a price book and register its versions")
    prices.add_argument("file", type=Path)
    again = one("rerate", "bring settled requests to another price version")
    again.add_argument("--from", dest="since", required=True, metavar="TIME", help="2026-11-01 or 2026-11-01T12:00 (UTC)")
    again.add_argument("--to", dest="until", metavar="TIME", help="up to, not including (default: now)")
    again.add_argument("--price-version", required=True, metavar="NAME")
    again.add_argument("--model", help="only this one's requests")
    again.add_argument("--dry-run", action="store_true", help="say what would be booked, and book nothing")
    admin_accounts.add(actions, where)
    admin_receipts.add(actions, where)
    analytics.add(actions, where)
    admin_reconcile.add(actions, where)


def run(args: argparse.Namespace) -> dict[str, Any]:
    if args.action == "restore":
        return _restore(args)
    if args.action == "synthetic-year":
        return analytics.synthetic_year(args)
    args.dir = getattr(args, "directory", None) or args.dir
    target = _target(args)
    if "://" not in target and not Path(target).is_file():
        raise UserError(f"no service in {args.dir}")
    with closing(Database(target)) as db:
        return args.act(args, db) if hasattr(args, "act") else _ACTIONS[args.action](args, db)


def _target(args: argparse.Namespace) -> str:
    return args.database or service_database(args.dir)


def _verify(args: argparse.Namespace, db: Database) -> dict[str, Any]:
    with db.snapshot() as read:
        found, root = audit_and_root(read)
    for name, value in asdict(found).items():
        print(f"{name:>16}  {value}")
    print(f"{'root':>16}  {root}")
    print(f"{'verdict':>16}  {'sound' if found.sound else 'NOT sound'}")
    return {**asdict(found), "root": root, "failed": not found.sound}


def _backup(args: argparse.Namespace, db: Database) -> dict[str, Any]:
    found, root = backup.backup(db, args.file)
    print(f"{args.file}: {found.transactions} transactions, {args.file.stat().st_size} bytes, root {root}")
    print("the keys' pepper is not in it; keep that file too, elsewhere")
    return {"file": str(args.file), "root": root}


def _restore(args: argparse.Namespace) -> dict[str, Any]:
    if not args.database:
        args.dir.mkdir(parents=True, exist_ok=True)
    found, root = backup.restore(args.file, _target(args))
    print(f"restored {found.transactions} transactions; the audit is sound and the root is the backup's: {root}")
    return {"root": root}


def _prices(args: argparse.Namespace, db: Database) -> dict[str, Any]:
    schedule = pricefile.read_prices(args.file)
    schedule.register(db)
    for book in schedule.books:
        print(f"{book.version} from {datetime.fromtimestamp(book.effective, UTC):%Y-%m-%d %H:%M} UTC: {', '.join(book.prices)}")
    return {"versions": [book.version for book in schedule.books]}


def _rerate(args: argparse.Namespace, db: Database) -> dict[str, Any]:
    until = _time(args.until) if args.until else datetime.now(UTC).timestamp()
    done = rerate(Ledger(db), _time(args.since), until, args.price_version, model=args.model, dry_run=args.dry_run)
    would = "would be " if args.dry_run else ""
    print(f"{done.changed} of {done.requests} requests {would}changed: {format_usd(done.charged_nano)} USD {would}charged, "
          f"{format_usd(done.returned_nano)} USD {would}returned, {format_usd(done.owed_nano)} USD of it owed")  # fmt: skip
    return asdict(done)


def _grant(args: argparse.Namespace, db: Database) -> dict[str, Any]:
    expires = _time(args.expires) if args.expires else None
    given = Ledger(db).grant(args.customer, nano_usd(args.usd), lot=args.voucher, expires=expires)
    return _booked(args, db, given)


def _refund(args: argparse.Namespace, db: Database) -> dict[str, Any]:
    return _booked(args, db, Ledger(db).refund(args.customer, nano_usd(args.usd), args.reference))


def _booked(args: argparse.Namespace, db: Database, booked: bool) -> dict[str, Any]:
    balances = Ledger(db).balances(args.customer)
    state = "booked" if booked else "was booked before; nothing changed"
    shown = ", ".join(f"{kind} {format_usd(balances.get(kind, 0))}" for kind in ("cash", "voucher"))
    print(f"{args.action} of {args.usd} USD for {args.customer}: {state}; {shown} USD")
    return {"customer": args.customer, "booked": booked, "balances_nano_usd": balances}


def _time(text: str) -> float:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise UserError(f"{text!r} is no time; write 2026-11-01 or 2026-11-01T12:00") from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


_ACTIONS = {
    "verify": _verify, "backup": _backup, "grant": _grant, "refund": _refund, "prices": _prices, "rerate": _rerate,
    "analytics": analytics.analytics, "facts": analytics.register,
}  # fmt: skip
