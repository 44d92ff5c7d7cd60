"""`tidelock admin orgs|projects|members|keys|limits|plans|payments|invoices|audit`: who is a customer, what they may, what
they pay. A table of verbs; each says in one line what it did, and returns it for `--json`."""

from __future__ import annotations

import argparse
import time
import getpass
import tomllib
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tidelock.service import budget_rules, charges, invoices
from tidelock.service.accounts import ROLES, SCOPES, USUAL_SCOPES, Accounts
from tidelock.service.db import Database
from tidelock.service.keys import KeyStore
from tidelock.service.ladder import KNOWN, Ladder, Limits
from tidelock.service.ledger import Ledger
from tidelock.service.payments import Payments
from tidelock.service.plans import Plan, Plans, SoldOut
from tidelock.service.prices import format_usd
from tidelock.service.tiers import Tiers
from tidelock.tokens.errors import UserError

from .keys import nano_usd

Run = Callable[[argparse.Namespace, Database], dict[str, Any]]


def add(actions: Any, where: argparse.ArgumentParser) -> None:
    """Adds the groups to `tidelock admin`; each verb's `act` is what it does."""
    org = (("org",), {"metavar": "ORG", "help": "an organisation's id: the customer its first key was made for"})
    usd = (("--usd",), {"required": True})
    reference = (("--reference",), {"required": True, "help": "the same one is never booked twice"})
    plan = (("plan",), {"metavar": "PLAN"})
    quantity = (("--quantity",), {"type": int, "metavar": "SEATS", "help": "price and credits are for each"})
    rates = [((f"--{name}",), {"type": int, "metavar": "N", "help": text}) for name, text in (
        ("concurrency", "requests at the same time"), ("rpm", "requests a minute"), ("tpm", "tokens a minute"), ("tpd", "tokens a day"))]
    groups: dict[str, tuple[str, dict[str, tuple[Run, str, str, list]]]] = {
        "orgs": ("organisations", {
            "list": (_orgs, "all of them with balances", "", []),
            "rename": (_rename, "what it is called on invoices", "ann 'Ann Ltd.'", [org, (("name",), {})]),
            "tax": (_tax, "the tax that its invoices bear", "ann --percent 19 --tax-id DE123456789",
                    [org, (("--percent",), {"required": True}), (("--tax-id",), {"default": ""})]),
        }),
        "projects": ("an organisation's projects", {
            "list": (_projects, "all of them", "ann", [org]),
            "create": (_create_project, "a new one", "ann app", [org, (("name",), {})]),
            "archive": (_archive, "end one and its keys", "ann proj_0123456789abcdef", [org, (("project",), {})]),
        }),
        "members": ("an organisation's people", {
            "list": (_members, "all of them", "ann", [org]),
            "add": (_add_member, "a new one", "ann bo@example.com --role developer",
                    [org, (("email",), {}), (("--role",), {"choices": list(ROLES), "default": "developer"})]),
            "role": (_role, "another role", "ann bo@example.com billing",
                     [org, (("member",), {"help": "id or e-mail"}), (("role",), {"choices": list(ROLES)})]),
            "remove": (_remove, "end a membership and its keys", "ann bo@example.com", [org, (("member",), {"help": "id or e-mail"})]),
        }),
        "keys": ("keys with all their options", {
            "list": (_keys, "an organisation's keys", "ann", [org]),
            "create": (_create_key, "a key, shown once", "ann --project proj_0123456789abcdef --scopes model,usage --from 10.0.0.0/8", [
                org, (("--name",), {"default": ""}), (("--project",), {"default": ""}),
                (("--member",), {"default": "", "help": "id or e-mail; the key never may more than the member"}),
                (("--scopes",), {"default": ",".join(USUAL_SCOPES), "help": f"of {', '.join(SCOPES)} (default: %(default)s)"}),
                (("--models",), {"default": "", "help": "only these, separated by commas"}),
                (("--from",), {"dest": "addresses", "default": "", "help": "only from these networks, separated by commas"}),
                (("--profile",), {"choices": ["strict", "lenient"], "default": ""}),
                (("--consent",), {"action": "store_true", "help": "traffic may be trained on unless a request says no"}),
                (("--may-grant",), {"action": "store_true", "help": "a single request may consent to training"}),
            ]),
            "revoke": (_revoke, "end a key within a second everywhere", "key_0123456789abcdef", [(("key",), {})]),
        }),
        "limits": ("rate limits", {
            "show": (_limits, "tier and limits of an organisation, and the caps below it", "ann", [org]),
            "set": (_set_limits, "by hand; what is not named comes from the tier (nothing named: all of it)", "ann --rpm 100 --tpm 500000",
                    [org, *rates, (("--scope",), {"default": "", "help": "a project's or key's id: a cap within the organisation's"}),
                     (("--tier",), {"type": int, "help": "of the ladder, whatever was recharged"})]),
            "budget": (_budget, "a month, of an organisation or of one project or key; without amounts: none",
                       "ann --soft 50 --hard 100 --scope proj_1",
                       [org, (("--scope",), {"default": "", "metavar": "ID", "help": "a project's or key's (default: the organisation's own)"}),
                        (("--soft",), {"metavar": "USD", "help": "who crosses it is told"}),
                        (("--hard",), {"metavar": "USD", "help": "nothing is begun beyond it"})]),
            "ladder": (_ladder, "which tiers are in force: kimi, open (none), or a TOML file of [[tier]]", "kimi", [(("ladder",), {})]),
        }),
        "plans": ("subscriptions", {
            "list": (_plans, "what is sold, and how much of it", "", []),
            "define": (_define, "a plan, or new terms of one", "coder --usd 19 --credits 25 --five-hours 3 --week 10 --seats 100",
                       [plan, usd, (("--credits",), {"required": True, "metavar": "USD", "help": "a month"}),
                        (("--months",), {"type": int, "choices": (1, 12), "default": 1, "help": "that a term has and the price is for"}),
                        (("--least",), {"type": int, "default": 1, "help": "seats of one customer"}),
                        (("--most",), {"type": int, "default": 1, "help": "seats of one customer"}),
                        (("--five-hours",), {"metavar": "USD"}), (("--week",), {"metavar": "USD"}),
                        (("--seats",), {"type": int, "required": True, "help": "never more are sold"})]),
            "show": (_subscription, "an organisation's plan", "ann", [org]),
            "subscribe": (_subscribe, "paid from the cash balance", "ann coder --wait",
                          [org, plan, quantity, (("--wait",), {"action": "store_true", "help": "join the waiting list if it is sold out"})]),
            "change": (_change, "up at once and prorated, down with the next period", "ann pro", [org, plan, quantity]),
            "cancel": (_cancel, "with the end of the period", "ann", [org]),
            "extra-cap": (_extra, "of the extra-usage wallet, a month", "ann 50", [org, (("usd",), {"help": "or none"})]),
            "turn": (_turn, "begin the periods that are due (servers do so by themselves)", "", []),
        }),
        "payments": ("money in and back", {
            "list": (_payments, "an organisation's payments", "ann", [org]),
            "book": (_book, "a payment that came another way", "ann --usd 100 --reference wire-7",
                     [org, usd, reference, (("--tax",), {"metavar": "USD", "help": "paid on top (default: by the organisation's rate)"}),
                      (("--extra",), {"action": "store_true", "help": "into the extra-usage wallet"})]),
            "refund": (_refund, "book that part of a payment was paid back, tax included", "wire-7 --usd 20 --reference back-1",
                       [(("payment",), {}), usd, reference]),
            "auto": (_auto, "top up by itself when the cash falls low; --below none: no more",
                     "ann --below 5 --charge 20 --per-day 2 --month-cap 200 --method cus_1",
                     [org, (("--below",), {"required": True, "metavar": "USD"}), (("--charge",), {"metavar": "USD"}),
                      (("--per-day",), {"type": int, "default": 1, "help": "charges in any 24 hours, at most"}),
                      (("--month-cap",), {"metavar": "USD", "help": "charged in a calendar month, at most"}),
                      (("--method",), {"default": "", "help": "the payment provider's name for whom it charges"})]),
        }),
        "invoices": ("invoices", {
            "list": (_invoices, "an organisation's invoices", "ann", [org]),
            "month": (_month, "the invoice on a month's use", "ann 2026-10", [org, (("month",), {})]),
        }),
        "audit": ("who did what", {
            "list": (_audit, "newest first; without ORG what concerns the whole service", "ann",
                     [(("org",), {"nargs": "?", "default": "", "metavar": "ORG"}), (("--limit",), {"type": int, "default": 50})]),
        }),
    }  # fmt: skip
    for group, (about, verbs) in groups.items():
        parser = actions.add_parser(group, help=about, description=about, formatter_class=argparse.RawDescriptionHelpFormatter,
                                    epilog="example:\n" + "\n".join(f"  tidelock admin {group} {v} {verbs[v][2]}".rstrip() for v in verbs))  # fmt: skip
        under = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
        for verb, (act, text, example, arguments) in verbs.items():
            one = under.add_parser(verb, parents=[where], help=text, description=text[0].upper() + text[1:] + ".",
                                   epilog=f"example:\n  tidelock admin {group} {verb} {example}".rstrip() + " --dir demo-run/service",
                                   formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
            for names, options in arguments:
                one.add_argument(*names, **options)
            one.set_defaults(act=act)


def actor() -> str:
    try:
        return f"operator:{getpass.getuser()}"
    except (OSError, KeyError):
        return "operator"


# ---- organisations, projects, members, keys ----------------------------------------------------------------------


def _orgs(args: argparse.Namespace, db: Database) -> dict[str, Any]:
    ledger = Ledger(db)
    found = [{**org, "balance_nano_usd": ledger.balance(org["id"])} for org in Accounts(db).organizations()]
    for org in found:
        print(f"{org['id']:<20} {org['name']:<24} {format_usd(org['balance_nano_usd'])} USD")
    return {"organizations": found}


def _rename(args: argparse.Namespace, db: Database) -> dict[str, Any]:
    Accounts(db).rename(args.org, args.name, actor())
    print(f"{args.org} is called {args.name} now")
    return {"id": args.org, "name": args.name}


def _tax(args: argparse.Namespace, db: Database) -> dict[str, Any]:
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


def _projects(args: argparse.Namespace, db: Database) -> dict[str, Any]:
    found = Accounts(db).projects(args.org)
    for p in found:
        print(f"{p['id']}  {p['name']:<24} {'archived' if p['archived'] else 'default' if p['standard'] else ''}")
    return {"projects": found}


def _create_project(args: argparse.Namespace, db: Database) -> dict[str, Any]:
    made = Accounts(db).create_project(args.org, args.name, actor())
    print(f"{made['id']}  {made['name']}")
    return made


def _archive(args: argparse.Namespace, db: Database) -> dict[str, Any]:
    ended = Accounts(db).archive_project(args.org, args.project, actor())
    print(f"{ended['id']} is archived, and its keys are ended")
    return ended


def _members(args: argparse.Namespace, db: Database) -> dict[str, Any]:
    found = Accounts(db).members(args.org)
    for m in found:
        print(f"{m['id']}  {m['role']:<10} {m['email']}")
    return {"members": found}


def _add_member(args: argparse.Namespace, db: Database) -> dict[str, Any]:
    made = Accounts(db).add_member(args.org, args.email, args.role, actor())
    print(f"{made['id']}  {made['role']}  {made['email']}")
    return made


def _role(args: argparse.Namespace, db: Database) -> dict[str, Any]:
    accounts = Accounts(db)
    changed = accounts.set_role(args.org, accounts.member(args.org, args.member)["id"], args.role, actor())
    print(f"{changed['email']} is {changed['role']} now")
    return changed


def _remove(args: argparse.Namespace, db: Database) -> dict[str, Any]:
    accounts = Accounts(db)
    member = accounts.member(args.org, args.member)
    accounts.remove_member(args.org, member["id"], actor())
    print(f"{member['email']} is no member any more")
    return {"id": member["id"], "removed": True}


def _keys(args: argparse.Namespace, db: Database) -> dict[str, Any]:
    found = [asdict(key) for key in _store(args, db).list(args.org)]
    for k in found:
        held = " ".join(filter(None, [",".join(k["models"]), ",".join(k["addresses"]), k["profile"], k["member"]]))
        print(f"{k['id']}  {k['hint']}  {k['project']}  {'revoked' if k['revoked'] else 'live':<7} {','.join(k['scopes'])} {held}".rstrip())
    return {"keys": found}


def _create_key(args: argparse.Namespace, db: Database) -> dict[str, Any]:
    key, secret = _store(args, db).create(
        args.org, args.name, training_consent=args.consent, may_grant=args.may_grant, project=args.project, member=args.member,
        scopes=_words(args.scopes), models=_words(args.models), addresses=_words(args.addresses), profile=args.profile, actor=actor(),
    )  # fmt: skip
    print(f"{key.id}  {key.customer}  {key.project}  {','.join(key.scopes)}")
    print(f"secret (shown only now): {secret}")
    return {**asdict(key), "secret": secret}


def _revoke(args: argparse.Namespace, db: Database) -> dict[str, Any]:
    _store(args, db).revoke(args.key, actor=actor())
    print(f"{args.key} is revoked")
    return {"id": args.key, "revoked": True}


def _store(args: argparse.Namespace, db: Database) -> KeyStore:
    return KeyStore.open(db, args.dir / "pepper")


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


# ---- limits ------------------------------------------------------------------------------------------------------


def _limits(args: argparse.Namespace, db: Database) -> dict[str, Any]:
    tiers = Tiers(db)
    tier, recharged, limits = tiers.standing(args.org)
    caps = {scope: asdict(cap) for scope, (_, cap) in tiers.caps(args.org).items() if scope}
    print(f"{args.org}: ladder {tiers.ladder.name}, tier {'none' if tier is None else tier}, {format_usd(recharged)} USD recharged; {_said(limits)}")
    for scope, (_, cap) in tiers.caps(args.org).items():
        if scope:
            print(f"  {scope}: {_said(cap)}")
    return {"organization": args.org, "ladder": tiers.ladder.name, "tier": tier, "recharged_nano_usd": recharged, "limits": asdict(limits), "caps": caps}


def _set_limits(args: argparse.Namespace, db: Database) -> dict[str, Any]:
    _exists(db, args.org, args.scope)
    limits = Limits(args.concurrency, args.rpm, args.tpm, args.tpd)
    Tiers(db).set_caps(args.org, limits, args.scope, args.tier, actor())
    print(f"{args.scope or args.org}: {_said(limits)}{f', tier {args.tier}' if args.tier is not None else ''}")
    return {"organization": args.org, "scope": args.scope, "tier": args.tier, "limits": asdict(limits)}


def _budget(args: argparse.Namespace, db: Database) -> dict[str, Any]:
    soft, hard = (nano_usd(value) if value else None for value in (args.soft, args.hard))
    budget_rules.set_budget(db, args.org, args.scope, soft, hard, time.time(), actor())
    for budget in (found := budget_rules.listed(db, args.org, time.time())):
        amounts = ", ".join(f"{kind} {format_usd(budget[f'{kind}_nano_usd'])}" for kind in ("soft", "hard", "spent")
                            if budget[f"{kind}_nano_usd"] is not None)  # fmt: skip
        print(f"{budget['scope'] or args.org}: {amounts} USD this month")
    return {"organization": args.org, "budgets": found}


def _ladder(args: argparse.Namespace, db: Database) -> dict[str, Any]:
    ladder = KNOWN.get(args.ladder) or _read_ladder(Path(args.ladder))
    Tiers(db).set_ladder(ladder, actor())
    print(f"the ladder {ladder.name} is in force")
    for n, (from_nano, limits) in enumerate(ladder.tiers):
        print(f"  tier {n} from {format_usd(from_nano)} USD: {_said(limits)}")
    return {"ladder": ladder.name, "tiers": [{"from_nano_usd": f, **asdict(limits)} for f, limits in ladder.tiers]}


def _read_ladder(path: Path) -> Ladder:
    """[[tier]] with from_usd = "10" and any of concurrency, rpm, tpm, tpd."""
    try:
        tiers = tomllib.loads(path.read_text())["tier"]
        rows = [(nano_usd(t["from_usd"]) if t["from_usd"] != "0" else 0, [t.get(n) for n in ("concurrency", "rpm", "tpm", "tpd")]) for t in tiers]
        return Ladder(path.stem, tuple((from_nano, Limits(*limits)) for from_nano, limits in rows))
    except OSError as error:
        raise UserError(f"{path} is neither {', '.join(KNOWN)} nor a file that can be read: {error.strerror}") from None
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f'{path} is no ladder: [[tier]] with from_usd = "10" and concurrency, rpm, tpm, tpd ({error})') from None


def _said(limits: Limits) -> str:
    names = {"concurrency": "at once", "requests": "requests/min", "tokens": "tokens/min", "day_tokens": "tokens/day"}
    return ", ".join(f"{value} {names[name]}" for name, value in asdict(limits).items() if value is not None) or "no limits"


def _exists(db: Database, org: str, scope: str) -> None:
    accounts = Accounts(db)
    if org not in {o["id"] for o in accounts.organizations()}:
        raise UserError(f"no organization {org!r}; `tidelock admin orgs list` shows them")
    known = {p["id"] for p in accounts.projects(org)} | {r[0] for r in db.read("SELECT id FROM keys WHERE customer = ?", (org,))}
    if scope and scope not in known:
        raise UserError(f"{org} has no project or key {scope!r}")


# ---- plans, payments, invoices -----------------------------------------------------------------------------------


TERMS = {1: "a month", 12: "a year"}


def _plans(args: argparse.Namespace, db: Database) -> dict[str, Any]:
    found = Plans(Ledger(db)).plans()
    for p in found:
        print(f"{p['name']:<16} {format_usd(p['price_nano'])} USD {TERMS[p['months']]}, {format_usd(p['credits_nano'])} USD of credits a month, "
              f"{p['sold']} of {p['seats']} sold, {p['waiting']} waiting")  # fmt: skip
    return {"plans": found}


def _define(args: argparse.Namespace, db: Database) -> dict[str, Any]:
    windows = [nano_usd(value) if value else None for value in (args.five_hours, args.week)]
    plan = Plan(args.plan, nano_usd(args.usd), nano_usd(args.credits), *windows, args.seats, args.months, args.least, args.most)
    Plans(Ledger(db)).define(plan, actor())
    print(f"plan {plan.name}: {args.usd} USD {TERMS[plan.months]}, {plan.seats} seats")
    return asdict(plan)


def _subscription(args: argparse.Namespace, db: Database) -> dict[str, Any]:
    return _shown(args.org, db)


def _subscribe(args: argparse.Namespace, db: Database) -> dict[str, Any]:
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


def _change(args: argparse.Namespace, db: Database) -> dict[str, Any]:
    Plans(Ledger(db)).change(args.org, args.plan, actor(), args.quantity)
    return _shown(args.org, db)


def _cancel(args: argparse.Namespace, db: Database) -> dict[str, Any]:
    Plans(Ledger(db)).cancel(args.org, actor())
    return _shown(args.org, db)


def _extra(args: argparse.Namespace, db: Database) -> dict[str, Any]:
    cap = None if args.usd == "none" else nano_usd(args.usd)
    Plans(Ledger(db)).cap_extra(args.org, cap, actor())
    print(f"{args.org}: {'no cap on' if cap is None else f'at most {args.usd} USD a month of'} extra usage")
    return {"organization": args.org, "extra_cap_nano_usd": cap}


def _turn(args: argparse.Namespace, db: Database) -> dict[str, Any]:
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


def _payments(args: argparse.Namespace, db: Database) -> dict[str, Any]:
    found = Payments(Ledger(db)).payments(args.org)
    for p in found:
        back = f", {format_usd(p['taken_nano'])} back" if p["taken_nano"] else ""
        print(f"{p['id']:<28} {format_usd(p['net_nano'])} USD + {format_usd(p['tax_nano'])} tax{back}")
    return {"payments": found}


def _auto(args: argparse.Namespace, db: Database) -> dict[str, Any]:
    below = 0 if args.below == "none" else nano_usd(args.below)
    if below and not (args.charge and args.month_cap):
        raise UserError("an automatic top-up needs --charge and --month-cap")
    rule = charges.Rule(below, nano_usd(args.charge), args.per_day, nano_usd(args.month_cap), args.method) if below else None
    charges.set_rule(Ledger(db), args.org, rule, actor())
    what = f"below {args.below} USD of cash, {args.charge} USD are charged" if rule else "no automatic top-up"
    print(f"{args.org}: {what}")
    return {"organization": args.org, "rule": asdict(rule) if rule else None}


def _book(args: argparse.Namespace, db: Database) -> dict[str, Any]:
    ledger = Ledger(db)
    tax = None if args.tax is None else 0 if args.tax == "0" else nano_usd(args.tax)
    booked = Payments(ledger).manual(args.org, nano_usd(args.usd), args.reference, tax_nano=tax, pocket="extra" if args.extra else "cash", actor=actor())
    print(f"{args.usd} USD for {args.org}: {'booked' if booked else 'was booked before; nothing changed'}")
    return {"organization": args.org, "booked": booked, "balance_nano_usd": ledger.balance(args.org)}


def _refund(args: argparse.Namespace, db: Database) -> dict[str, Any]:
    payments = Payments(Ledger(db))
    booked = payments.refund(args.payment, nano_usd(args.usd), args.reference, actor())
    print(f"{args.usd} USD of {args.payment}: {'booked as paid back' if booked else 'was booked before; nothing changed'}")
    return {**payments.payment(args.payment), "booked": booked}


def _invoices(args: argparse.Namespace, db: Database) -> dict[str, Any]:
    found = invoices.listed(db, args.org)
    for i in found:
        _print_invoice(i)
    return {"invoices": found}


def _month(args: argparse.Namespace, db: Database) -> dict[str, Any]:
    invoice = invoices.bill_month(Ledger(db), args.org, args.month)
    _print_invoice(invoice)
    return invoice


def _print_invoice(i: dict[str, Any]) -> None:
    date = f"{datetime.fromtimestamp(i['created'], UTC):%Y-%m-%d}"
    print(f"{i['id']}  {i['number']:>4}  {date}  {i['kind']:<6} {format_usd(i['total_nano'])} USD, {format_usd(i['tax_nano'])} of it tax")


def _audit(args: argparse.Namespace, db: Database) -> dict[str, Any]:
    entries, more = Accounts(db).audit_log(args.org, limit=max(args.limit, 1))
    for e in entries:
        when = f"{datetime.fromtimestamp(e['created'], UTC):%Y-%m-%d %H:%M:%S}"
        print(f"{when}  {e['actor']:<24} {e['action']:<22} {e['target']}")
    return {"entries": entries, "has_more": more}
