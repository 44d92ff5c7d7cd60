"""Who the money torture's customers are: organisations with projects, members and keys, on the published tier ladder."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from tidelock.service.accounts import Accounts
from tidelock.service.budget_rules import set_budget
from tidelock.service.db import Database
from tidelock.service.keys import KeyStore
from tidelock.service.ladder import KIMI, Limits
from tidelock.service.ledger import Ledger
from tidelock.service.tiers import Tiers

ME = "torture"
KEYS = {"default": 60, "project": 20, "member": 16, "viewer": 2, "revoked": 2}  # which one is used, how often of a hundred


@dataclass(frozen=True)
class Organization:
    name: str
    project: str  # the one with a cap
    secrets: dict[str, str]  # by name in KEYS


def make(db: Database, pepper: Path, customers: int, balance_nano: int) -> dict[str, Organization]:
    """Every tier is there, set by hand (their balances are tiny); some organisations, projects and keys have caps of their
    own, and hard budgets, so that every kind of limit is hit by somebody."""
    accounts, keys, ledger, tiers = Accounts(db), KeyStore.open(db, pepper), Ledger(db), Tiers(db)
    tiers.set_ladder(KIMI)
    made = {}
    for n in range(customers):
        name = f"c{n:03}"
        _, default = keys.create(name)
        ledger.topup(name, balance_nano)
        project = accounts.create_project(name, "batch jobs", ME)["id"]
        developer = accounts.add_member(name, f"dev@{name}.example", "developer", ME)["id"]
        viewer = accounts.add_member(name, f"viewer@{name}.example", "viewer", ME)["id"]
        _, capped = keys.create(name, project=project)
        key, member = keys.create(name, member=developer, models=("tide",))
        _, blind = keys.create(name, member=viewer)
        gone, revoked = keys.create(name)
        keys.revoke(gone.id, name)
        tiers.set_caps(name, Limits(day_tokens=400_000) if n % 4 == 3 else Limits(), tier=n % len(KIMI.tiers))
        tiers.set_caps(name, Limits(concurrency=3, requests=30), project)
        tiers.set_caps(name, Limits(tokens=40_000), key.id)
        set_budget(db, name, project, balance_nano // 20, balance_nano // 10, time.time())
        set_budget(db, name, key.id, None, balance_nano // 15, time.time())
        own = {"default": default, "project": capped, "member": member, "viewer": blind, "revoked": revoked}
        made[name] = Organization(name, project, own)
    return made
