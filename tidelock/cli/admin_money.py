"""`tidelock admin plans|payments|invoices|audit`: what customers pay, and who did what."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from tidelock.service import charges
from tidelock.service import invoices as billed
from tidelock.service.accounts import Accounts
from tidelock.service.db import Database
from tidelock.service.ledger import Ledger
from tidelock.service.payments import Payments
from tidelock.service.plans import Plan, Plans, SoldOut
from tidelock.service.prices import format_usd
from tidelock.tokens.errors import UserError

from .admin_orgs import actor
from .keys import nano_usd


TERMS = {1: "a month", 12: "a year"}


def plans(args: argparse.Namespace, db: Database) -> dict[str, Any]:
    found = Plans(Ledger(db)).plans()
    for p in found:
        print(f"{p['name']:<16} {format_usd(p['price_nano'])} USD {TERMS[p['months']]}, {format_usd(p['credits_nano'])} USD of credits a month, "
              f"{p['sold']} of {p['seats']} sold, {p['waiting']} waiting")  # fmt: skip
    return {"plans": found}


def define(args: argparse.Namespace, db: Database) -> dict[str, Any]:
    windows = [nano_usd(value) if value else None for value in (args.five_hours, args.week)]
    plan = Plan(args.plan, nano_usd(args.usd), nano_usd(args.credits), *windows, args.seats, args.months, args.least, args.most)
    Plans(Ledger(db)).define(plan, actor())
    print(f"plan {plan.name}: {args.usd} USD {TERMS[plan.months]}, {plan.seats} seats")
    return asdict(plan)


def subscription(args: argparse.Namespace, db: Database) -> dict[str, Any]:
    return _shown(args.org, db)


def subscribe(args: argparse.Namespace, db: Database) -> dict[str, Any]:
    plans = Plans(Ledger(db))
    try:
        plans.subscribe(args.org, args.plan, actor(), args.quantity)
    except SoldOut:
        if not args.wait:
            raise
        place = plans.wait(args.org, args.plan, actor())
        print(f"{args.plan} is sold out; {args.org} is number {place} on the waiting list")
        return {"organization": args.org, "waiting": place}
    return _shown(args.org, db)


def change(args: argparse.Namespace, db: Database) -> dict[str, Any]:
    Plans(Ledger(db)).change(args.org, args.plan, actor(), args.quantity)
    return _shown(args.org, db)


def cancel(args: argparse.Namespace, db: Database) -> dict[str, Any]:
    Plans(Ledger(db)).cancel(args.org, actor())
    return _shown(args.org, db)


def extra(args: argparse.Namespace, db: Database) -> dict[str, Any]:
    cap = None if args.usd == "none" else nano_usd(args.usd)
    Plans(Ledger(db)).cap_extra(args.org, cap, actor())
    print(f"{args.org}: {'no cap on' if cap is None else f'at most {args.usd} USD a month of'} extra usage")
    return {"organization": args.org, "extra_cap_nano_usd": cap}


def turn(args: argparse.Namespace, db: Database) -> dict[str, Any]:
    moved = Plans(Ledger(db)).turn()
    print(f"{moved} subscriptions moved")
    return {"moved": moved}


def _shown(org: str, db: Database) -> dict[str, Any]:
    sub = Plans(Ledger(db)).subscription(org)
    if sub is None:
        print(f"{org} has no plan")
        return {"organization": org, "plan": None}
    then = "ends" if sub.cancelled else f"becomes {sub.next_plan}" if sub.next_plan else "renews"
    count = f", {sub.quantity} seats" if sub.quantity > 1 else ""
    print(f"{org}: {sub.plan}{count}, {then} on {datetime.fromtimestamp(sub.ends, UTC):%Y-%m-%d %H:%M:%S} UTC")
    return {**asdict(sub), "begins": sub.begins, "ends": sub.ends}


def payments(args: argparse.Namespace, db: Database) -> dict[str, Any]:
    found = Payments(Ledger(db)).payments(args.org)
    for p in found:
        back = f", {format_usd(p['taken_nano'])} back" if p["taken_nano"] else ""
        print(f"{p['id']:<28} {format_usd(p['net_nano'])} USD + {format_usd(p['tax_nano'])} tax{back}")
    return {"payments": found}


def auto(args: argparse.Namespace, db: Database) -> dict[str, Any]:
    below = 0 if args.below == "none" else nano_usd(args.below)
    if below and not (args.charge and args.month_cap):
        raise UserError("an automatic top-up needs --charge and --month-cap")
    rule = charges.Rule(below, nano_usd(args.charge), args.per_day, nano_usd(args.month_cap), args.method) if below else None
    charges.set_rule(Ledger(db), args.org, rule, actor())
    what = f"below {args.below} USD of cash, {args.charge} USD are charged" if rule else "no automatic top-up"
    print(f"{args.org}: {what}")
    return {"organization": args.org, "rule": asdict(rule) if rule else None}


def book(args: argparse.Namespace, db: Database) -> dict[str, Any]:
    ledger = Ledger(db)
    tax = None if args.tax is None else 0 if args.tax == "0" else nano_usd(args.tax)
    booked = Payments(ledger).manual(args.org, nano_usd(args.usd), args.reference, tax_nano=tax, pocket="extra" if args.extra else "cash", actor=actor())
    print(f"{args.usd} USD for {args.org}: {'booked' if booked else 'was booked before; nothing changed'}")
    return {"organization": args.org, "booked": booked, "balance_nano_usd": ledger.balance(args.org)}


def refund(args: argparse.Namespace, db: Database) -> dict[str, Any]:
    payments = Payments(Ledger(db))
    booked = payments.refund(args.payment, nano_usd(args.usd), args.reference, actor())
    print(f"{args.usd} USD of {args.payment}: {'booked as paid back' if booked else 'was booked before; nothing changed'}")
    return {**payments.payment(args.payment), "booked": booked}


def invoices(args: argparse.Namespace, db: Database) -> dict[str, Any]:
    found = billed.listed(db, args.org)
    for i in found:
        _print_invoice(i)
    return {"invoices": found}


def month(args: argparse.Namespace, db: Database) -> dict[str, Any]:
    invoice = billed.bill_month(Ledger(db), args.org, args.month)
    _print_invoice(invoice)
    return invoice


def _print_invoice(i: dict[str, Any]) -> None:
    date = f"{datetime.fromtimestamp(i['created'], UTC):%Y-%m-%d}"
    print(f"{i['id']}  {i['number']:>4}  {date}  {i['kind']:<6} {format_usd(i['total_nano'])} USD, {format_usd(i['tax_nano'])} of it tax")


def audit(args: argparse.Namespace, db: Database) -> dict[str, Any]:
    entries, more = Accounts(db).audit_log(args.org, limit=max(args.limit, 1))
    for e in entries:
        when = f"{datetime.fromtimestamp(e['created'], UTC):%Y-%m-%d %H:%M:%S}"
        print(f"{when}  {e['actor']:<24} {e['action']:<22} {e['target']}")
    return {"entries": entries, "has_more": more}
