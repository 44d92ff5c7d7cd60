"""`tidelock admin limits`: what a customer may ask for at a time, by tier or by hand, and spend in a month."""

from __future__ import annotations

import argparse
import time
import tomllib
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tidelock.service import budget_rules
from tidelock.service.accounts import Accounts
from tidelock.service.db import Database
from tidelock.service.ladder import KNOWN, Ladder, Limits
from tidelock.service.prices import format_usd
from tidelock.service.tiers import Tiers
from tidelock.tokens.errors import UserError

from .admin_orgs import actor
from .keys import nano_usd


def limits(args: argparse.Namespace, db: Database) -> dict[str, Any]:
    tiers = Tiers(db)
    tier, recharged, limits = tiers.standing(args.org)
    caps = {scope: asdict(cap) for scope, (_, cap) in tiers.caps(args.org).items() if scope}
    print(f"{args.org}: ladder {tiers.ladder.name}, tier {'none' if tier is None else tier}, {format_usd(recharged)} USD recharged; {_said(limits)}")
    for scope, (_, cap) in tiers.caps(args.org).items():
        if scope:
            print(f"  {scope}: {_said(cap)}")
    return {"organization": args.org, "ladder": tiers.ladder.name, "tier": tier, "recharged_nano_usd": recharged, "limits": asdict(limits), "caps": caps}


def set_limits(args: argparse.Namespace, db: Database) -> dict[str, Any]:
    _exists(db, args.org, args.scope)
    limits = Limits(args.concurrency, args.rpm, args.tpm, args.tpd)
    Tiers(db).set_caps(args.org, limits, args.scope, args.tier, actor())
    print(f"{args.scope or args.org}: {_said(limits)}{f', tier {args.tier}' if args.tier is not None else ''}")
    return {"organization": args.org, "scope": args.scope, "tier": args.tier, "limits": asdict(limits)}


def budget(args: argparse.Namespace, db: Database) -> dict[str, Any]:
    soft, hard = (nano_usd(value) if value else None for value in (args.soft, args.hard))
    budget_rules.set_budget(db, args.org, args.scope, soft, hard, time.time(), actor())
    for budget in (found := budget_rules.listed(db, args.org, time.time())):
        amounts = ", ".join(f"{kind} {format_usd(budget[f'{kind}_nano_usd'])}" for kind in ("soft", "hard", "spent")
                            if budget[f"{kind}_nano_usd"] is not None)  # fmt: skip
        print(f"{budget['scope'] or args.org}: {amounts} USD this month")
    return {"organization": args.org, "budgets": found}


def ladder(args: argparse.Namespace, db: Database) -> dict[str, Any]:
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
