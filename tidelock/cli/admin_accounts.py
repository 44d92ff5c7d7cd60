"""`tidelock admin orgs|projects|members|keys|limits|plans|payments|invoices|audit`: who is a customer, what they may, what
they pay. A table of verbs; each says in one line what it did, and returns it for `--json`. What they do is in `admin_orgs`,
`admin_limits` and `admin_money`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from tidelock.service.accounts import ROLES, SCOPES, USUAL_SCOPES
from tidelock.service.db import Database

from . import admin_limits, admin_money, admin_orgs

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
            "list": (admin_orgs.orgs, "all of them with balances", "", []),
            "rename": (admin_orgs.rename, "what it is called on invoices", "ann 'Ann Ltd.'", [org, (("name",), {})]),
            "tax": (admin_orgs.tax, "the tax that its invoices bear", "ann --percent 19 --tax-id DE123456789",
                    [org, (("--percent",), {"required": True}), (("--tax-id",), {"default": ""})]),
            "suspend": (admin_orgs.suspend, "refuse its keys within a second everywhere; batches, renewals and top-ups wait",
                        "ann --reason 'invoice 7 is overdue'",
                        [org, (("--reason",), {"required": True, "metavar": "TEXT",
                                               "help": "one line, which its keys are told"})]),
            "resume": (admin_orgs.resume, "lift that; vouchers and credits last as much longer as it took", "ann", [org]),
        }),
        "projects": ("an organisation's projects", {
            "list": (admin_orgs.projects, "all of them", "ann", [org]),
            "create": (admin_orgs.create_project, "a new one", "ann app", [org, (("name",), {})]),
            "archive": (admin_orgs.archive, "end one and its keys", "ann proj_0123456789abcdef", [org, (("project",), {})]),
        }),
        "members": ("an organisation's people", {
            "list": (admin_orgs.members, "all of them", "ann", [org]),
            "add": (admin_orgs.add_member, "a new one", "ann bo@example.com --role developer",
                    [org, (("email",), {}), (("--role",), {"choices": list(ROLES), "default": "developer"})]),
            "role": (admin_orgs.role, "another role", "ann bo@example.com billing",
                     [org, (("member",), {"help": "id or e-mail"}), (("role",), {"choices": list(ROLES)})]),
            "remove": (admin_orgs.remove, "end a membership and its keys", "ann bo@example.com", [org, (("member",), {"help": "id or e-mail"})]),
        }),
        "keys": ("keys with all their options", {
            "list": (admin_orgs.keys, "an organisation's keys", "ann", [org]),
            "create": (admin_orgs.create_key, "a key, shown once", "ann --project proj_0123456789abcdef --scopes model,usage --from 10.0.0.0/8", [
                org, (("--name",), {"default": ""}), (("--project",), {"default": ""}),
                (("--member",), {"default": "", "help": "id or e-mail; the key never may more than the member"}),
                (("--scopes",), {"default": ",".join(USUAL_SCOPES), "help": f"of {', '.join(SCOPES)} (default: %(default)s)"}),
                (("--models",), {"default": "", "help": "only these, separated by commas"}),
                (("--from",), {"dest": "addresses", "default": "", "help": "only from these networks, separated by commas"}),
                (("--profile",), {"choices": ["strict", "lenient"], "default": ""}),
                (("--consent",), {"action": "store_true", "help": "traffic may be trained on unless a request says no"}),
                (("--may-grant",), {"action": "store_true", "help": "a single request may consent to training"}),
            ]),
            "revoke": (admin_orgs.revoke, "end a key within a second everywhere", "key_0123456789abcdef", [(("key",), {})]),
        }),
        "limits": ("rate limits", {
            "show": (admin_limits.limits, "tier and limits of an organisation, and the caps below it", "ann", [org]),
            "set": (admin_limits.set_limits, "by hand; what is not named comes from the tier (nothing named: all of it)", "ann --rpm 100 --tpm 500000",
                    [org, *rates, (("--scope",), {"default": "", "help": "a project's or key's id: a cap within the organisation's"}),
                     (("--tier",), {"type": int, "help": "of the ladder, whatever was recharged"})]),
            "budget": (admin_limits.budget, "a month, of an organisation or of one project or key; without amounts: none",
                       "ann --soft 50 --hard 100",
                       [org, (("--scope",), {"default": "", "metavar": "ID", "help": "a project's or key's (default: the organisation's own)"}),
                        (("--soft",), {"metavar": "USD", "help": "who crosses it is told"}),
                        (("--hard",), {"metavar": "USD", "help": "nothing is begun beyond it"})]),
            "ladder": (admin_limits.ladder, "which tiers are in force: kimi, open (none), or a TOML file of [[tier]]", "kimi", [(("ladder",), {})]),
        }),
        "plans": ("subscriptions", {
            "list": (admin_money.plans, "what is sold, and how much of it", "", []),
            "define": (admin_money.define, "a plan, or new terms of one", "coder --usd 19 --credits 25 --five-hours 3 --week 10 --seats 100",
                       [plan, usd, (("--credits",), {"required": True, "metavar": "USD", "help": "a month"}),
                        (("--months",), {"type": int, "choices": (1, 12), "default": 1, "help": "that a term has and the price is for"}),
                        (("--least",), {"type": int, "default": 1, "help": "seats of one customer"}),
                        (("--most",), {"type": int, "default": 1, "help": "seats of one customer"}),
                        (("--five-hours",), {"metavar": "USD"}), (("--week",), {"metavar": "USD"}),
                        (("--seats",), {"type": int, "required": True, "help": "never more are sold"})]),
            "show": (admin_money.subscription, "an organisation's plan", "ann", [org]),
            "subscribe": (admin_money.subscribe, "paid from the cash balance", "ann coder --wait",
                          [org, plan, quantity, (("--wait",), {"action": "store_true", "help": "join the waiting list if it is sold out"})]),
            "change": (admin_money.change, "up at once and prorated, down with the next period", "ann coder", [org, plan, quantity]),
            "cancel": (admin_money.cancel, "with the end of the period", "ann", [org]),
            "extra-cap": (admin_money.extra, "of the extra-usage wallet, a month", "ann 50", [org, (("usd",), {"help": "or none"})]),
            "turn": (admin_money.turn, "begin the periods that are due (servers do so by themselves)", "", []),
        }),
        "payments": ("money in and back", {
            "list": (admin_money.payments, "an organisation's payments", "ann", [org]),
            "book": (admin_money.book, "a payment that came another way", "ann --usd 100 --reference wire-7",
                     [org, usd, reference, (("--tax",), {"metavar": "USD", "help": "paid on top (default: by the organisation's rate)"}),
                      (("--extra",), {"action": "store_true", "help": "into the extra-usage wallet"})]),
            "refund": (admin_money.refund, "book that part of a payment was paid back, tax included", "wire-7 --usd 20 --reference back-1",
                       [(("payment",), {}), usd, reference]),
            "auto": (admin_money.auto, "top up by itself when the cash falls low; --below none: no more",
                     "ann --below 5 --charge 20 --per-day 2 --month-cap 200 --method cus_1",
                     [org, (("--below",), {"required": True, "metavar": "USD"}), (("--charge",), {"metavar": "USD"}),
                      (("--per-day",), {"type": int, "default": 1, "help": "charges in any 24 hours, at most"}),
                      (("--month-cap",), {"metavar": "USD", "help": "charged in a calendar month, at most"}),
                      (("--method",), {"default": "", "help": "the payment provider's name for whom it charges"})]),
        }),
        "invoices": ("invoices", {
            "list": (admin_money.invoices, "an organisation's invoices", "ann", [org]),
            "month": (admin_money.month, "the invoice on a month's use", "ann 2026-10", [org, (("month",), {})]),
        }),
        "audit": ("who did what", {
            "list": (admin_money.audit, "newest first; without ORG what concerns the whole service", "ann",
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
