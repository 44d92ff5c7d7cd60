"""What analytics need and the ledger does not know, as a person writes it: one TOML file, and the rows it becomes.

    [billing]                            # customer: who of us bills them, in which currency
    ann = ["Tidelock Ltd", "USD"]
    [fx."2026-03"]                       # USD for one unit, month by month
    CNY = "0.1379"
    [compute."my-model"]                 # USD for a second of one worker, from that day on
    2026-01-01 = "0.0011"
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from math import floor
from pathlib import Path
from typing import Any

from tidelock.service.analytics.calendar import month
from tidelock.service.db import Conflict, Database, Transaction
from tidelock.service.prices import exact_nano
from tidelock.tokens.errors import UserError


@dataclass(frozen=True)
class Facts:
    billing: Mapping[str, tuple[str, str]] = field(default_factory=dict)  # customer -> entity, currency
    fx: Mapping[tuple[str, str], int] = field(default_factory=dict)  # month, currency -> nano-USD
    compute: Mapping[tuple[str, float], int] = field(default_factory=dict)  # model, from when -> nano-USD a second


@dataclass(frozen=True)
class Term:
    """A plan, sold to a customer for [starts, ends)."""

    reference: str  # the payment's id
    customer: str
    plan: str
    starts: float
    ends: float
    months: int
    price_nano: int  # of the whole term


def read_facts(path: str | Path) -> Facts:
    """Raises UserError that names the entry."""
    try:
        data = tomllib.loads(Path(path).read_text())
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if unknown := set(data) - {"billing", "fx", "compute"}:
        raise UserError(f"{path}: unknown table [{min(unknown)}]; there are billing, fx and compute")
    try:
        return Facts(
            {customer: _pair(customer, pair) for customer, pair in data.get("billing", {}).items()},
            {(month(name).name, currency): _nano(f"fx {name} {currency}", usd)
             for name, rates in data.get("fx", {}).items() for currency, usd in rates.items()},
            {(model, _day(model, day)): _nano(f"compute {model} {day}", usd)
             for model, rates in data.get("compute", {}).items() for day, usd in rates.items()},
        )  # fmt: skip
    except AttributeError:
        raise UserError(f"{path}: [fx] and [compute] hold tables, one per month or model") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def store(db: Database, facts: Facts) -> None:
    """What was stored for the same customer, month or day is replaced. Raises UserError for a customer without account."""
    try:
        with db.transaction() as tx:
            write(tx, facts)
    except Conflict as error:
        raise UserError(f"the facts do not fit the books (an unknown customer, or a rate above 3 USD): {error}") from error


def write(tx: Transaction, facts: Facts) -> None:
    for customer, (entity, currency) in facts.billing.items():
        tx("INSERT INTO billing (customer, entity, currency) VALUES (?, ?, ?) ON CONFLICT (customer) "
           "DO UPDATE SET entity = excluded.entity, currency = excluded.currency", (customer, entity, currency))  # fmt: skip
    for (name, currency), nano in facts.fx.items():
        tx("INSERT INTO fx_rates (month, currency, nano_usd) VALUES (?, ?, ?) ON CONFLICT (month, currency) "
           "DO UPDATE SET nano_usd = excluded.nano_usd", (name, currency, nano))  # fmt: skip
    for (model, starts), nano in facts.compute.items():
        tx("INSERT INTO compute_rates (model, starts, nano_usd) VALUES (?, ?, ?) ON CONFLICT (model, starts) "
           "DO UPDATE SET nano_usd = excluded.nano_usd", (model, starts, nano))  # fmt: skip


def sell(tx: Transaction, term: Term, now: float | None = None) -> None:
    """`now`: when its fee is booked, if that may be later than its start: nothing is earned before."""
    columns = (*Term.__dataclass_fields__, "begins_s", "planned_s")
    tx.insert("plan_terms", columns, [(*term.__dict__.values(), floor(max(term.starts, now or 0)), floor(term.ends))])


def cut_short(tx: Transaction, reference: str, now: float, credited_nano: int = 0) -> None:
    """The term ends now (a second after its start at the earliest): it was given back, or another one takes its place, which
    so much of its price pays for."""
    tx("UPDATE plan_terms SET ends = CASE WHEN starts >= ? THEN starts + 1 ELSE ? END, "
       "cut_s = CASE WHEN starts >= ? THEN begins_s + 1 ELSE ? END, credited_nano = ? WHERE reference = ? AND ends > ?",
       (now, now, now, floor(now), credited_nano, reference, now))  # fmt: skip


def _pair(customer: str, pair: Any) -> tuple[str, str]:
    if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(word, str) and word for word in pair):
        raise UserError(f'billing {customer}: write ["entity", "currency"]')
    return pair[0], pair[1]


def _nano(where: str, usd: Any) -> int:
    nano = exact_nano(usd)
    if nano is not None:
        return nano
    raise UserError(f'{where}: {usd!r} is no amount; write it as a string that makes whole nano-USD, such as "0.1379"')


def _day(model: str, day: str) -> float:
    try:
        return datetime.strptime(day, "%Y-%m-%d").replace(tzinfo=UTC).timestamp()
    except ValueError:
        raise UserError(f"compute {model}: {day!r} is no day; write it like 2026-01-01") from None
