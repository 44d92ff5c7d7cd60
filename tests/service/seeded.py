"""An organisation with a past, made through the real ledger: keys, projects, members, vouchers, a plan, payments, invoices and
weeks of settled requests, so that every page of the console has something to show."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

from tidelock.service.accounts import SCOPES
from tidelock.service.books import Admission, Books, Latency, Metered
from tidelock.service.ladder import KIMI
from tidelock.service.ledger import Ledger
from tidelock.service.payments import Payments
from tidelock.service.plans import Plan, Plans
from tidelock.service.prices import Counts
from tidelock.service.state import ServiceState

USD, DAY_S = 10**9, 86400
HOSTILE = "<img src=x onerror=alert(1)>"  # what a name may contain


@dataclass
class Seeded:
    customer: str
    owner: str  # a key's secret
    operator: str
    requests: int
    spent_nano: int
    newest: str  # the newest request's id


def seed(state: ServiceState, customer: str = "aurora", days: int = 40, a_day: int = 6, draw: int = 1) -> Seeded:
    rng, now = random.Random(draw), time.time()
    begun = now - days * DAY_S
    ledger = Ledger(state.ledger.db, clock=lambda: begun)
    operator = state.keys.create("house", "operator", role="admin", scopes=SCOPES)[1]
    _, owner = state.keys.create(customer, "console", scopes=SCOPES)
    accounts = state.accounts
    accounts.rename(customer, "Aurora Labs", "seed")
    accounts.set_tax(customer, 1900, "DE123456789", "seed")
    app = accounts.create_project(customer, f"support-bot {HOSTILE}", "seed")["id"]
    nightly = accounts.create_project(customer, "nightly evals", "seed")["id"]
    for email, role in (
        ("mara@aurora.example", "owner"),
        ("jun@aurora.example", "developer"),
        ("pay@aurora.example", "billing"),
    ):
        accounts.add_member(customer, email, role, "seed")
    keys = [
        state.keys.create(customer, name, project=project, **more)[0]
        for name, project, more in (
            ("production", app, {"training_consent": True}),
            (HOSTILE, app, {"addresses": ["10.0.0.0/8"]}),
            ("evals", nightly, {"models": [state.model], "may_grant": True}),
        )
    ]
    state.tiers.set_ladder(KIMI, "seed")
    for plan in (
        Plan("starter", 19 * USD, 25 * USD, 3 * USD, 10 * USD, 100),
        Plan("studio", 99 * USD, 140 * USD, 20 * USD, 60 * USD, 50),
        Plan("scale", 499 * USD, 800 * USD, None, None, 2),
    ):
        state.plans.define(plan, "seed")
    payments = Payments(ledger)
    payments.manual(customer, 500 * USD, f"wire-{customer}-1", actor="seed")
    payments.manual(customer, 40 * USD, f"card-{customer}-2", pocket="extra", actor="seed")
    ledger.grant(customer, USD // 5, lot="welcome", expires=now + 20 * DAY_S)
    price, version, spent, count, newest = state.prices.now.price(state.model), state.prices.now.version, 0, 0, ""
    for n in range(days):
        if n == max(0, days - 9):  # until here the voucher and then cash pay; from here on the plan's credits
            Plans(Ledger(state.ledger.db, clock=lambda: begun + n * DAY_S)).subscribe(customer, "starter", "seed")
        with state.ledger.db.transaction() as tx:
            books = Books(tx, [customer], now=begun + n * DAY_S)
            today = max(1, round(a_day * (0.5 + n / days) * rng.uniform(0.6, 1.3)))
            for at in sorted(rng.uniform(0, DAY_S) for _ in range(today)):
                books.now, count, key = begun + n * DAY_S + at, count + 1, rng.choice(keys)
                prompt, answer = rng.randrange(2_000, 60_000), rng.randrange(50, 2_500)
                cached = int(prompt * rng.choice((0, 0.4, 0.8, 0.95)))
                newest = f"req_seed{count:028d}"
                ask = Admission(
                    newest,
                    customer,
                    key.id,
                    state.model,
                    price,
                    version,
                    prompt,
                    answer + rng.randrange(300),
                    600,
                    project=key.project,
                )
                books.hold(ask)
                wait = rng.randrange(1, 9)
                took = Latency(wait, wait + prompt // 150, wait + prompt // 150 + answer * 12)
                used = Counts(prompt, cached, completion=answer)
                books.now += took.total_ms / 1000
                spent += books.settle(
                    newest, price, Metered(used, "length" if rng.random() < 0.06 else "stop", latency=took)
                )
            books.write()
    ledger.grant(customer, 5 * USD, lot="sorry-for-november", expires=now + 20 * DAY_S)
    return Seeded(customer, owner, operator, count, spent, newest)
