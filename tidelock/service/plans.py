"""Plans: credits for a month from anniversary to anniversary, paid from the cash balance, no more sold than there are seats.

A period's credits are a pocket that ends with it, so nothing rolls over; five-hour and seven-day windows bound how fast
they may be spent (`windows`, applied where money is held, in `books`). An upgrade counts at once: it begins a period of its
own and costs the new price less what is left of the old one, by time or by credits, whichever is less (by time alone, who
upgraded in the last hour of a month would get a month's credits for an hour's price). A downgrade takes its seat at once and
counts from the next period on. Every step is one transaction under the customer's lock.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tidelock.service.analytics.facts import Term, cut_short, sell
from tidelock.service.accounts import OPERATOR, UnknownId, log
from tidelock.service.books import Books
from tidelock.service.db import Conflict
from tidelock.service.ledger import BREAKAGE, CONTRA, Ledger
from tidelock.service.windows import Allowance, anniversary, period
from tidelock.tokens.errors import UserError

CASH, FEES = ("cash", ""), ("fees", "")
COLUMNS = ("id", "customer", "plan", "next_plan", "cancelled", "anchor", "period", "grants", "state")


class SoldOut(UserError):
    """There is no seat, or others wait for it."""


@dataclass(frozen=True)
class Plan:
    name: str
    price_nano: int  # a month
    credits_nano: int
    five_hours_nano: int | None
    week_nano: int | None
    seats: int


@dataclass
class Subscription:
    id: str
    customer: str
    plan: str
    next_plan: str
    cancelled: int
    anchor: float
    period: int
    grants: int
    state: str

    @property
    def begins(self) -> float:
        return anniversary(self.anchor, self.period)

    @property
    def ends(self) -> float:
        return anniversary(self.anchor, self.period + 1)

    @property
    def lot(self) -> str:
        return f"{self.id}/{self.grants}"


@dataclass(frozen=True)
class Preview:
    """What changing to a plan would do, if it were done now."""

    kind: str  # "subscribe" | "upgrade" | "downgrade" | "keep"
    charge_nano: int  # from the cash balance, at once
    unused_nano: int  # of the present period's price, already taken off the charge
    effective: float


class Plans:
    def __init__(self, ledger: Ledger) -> None:
        self._ledger, self._db = ledger, ledger.db

    # ---- what is sold ------------------------------------------------------------------------------------------

    def define(self, plan: Plan, actor: str = OPERATOR) -> None:
        """Makes or changes a plan; who has it gets the new terms with the next period. Raises UserError for nonsense,
        and for fewer seats than are sold."""
        row = tuple(asdict(plan).values())
        try:
            with self._db.transaction() as tx:
                tx("INSERT INTO plans (name, price_nano, credits_nano, five_hours_nano, week_nano, seats, sold) "
                   "VALUES (?, ?, ?, ?, ?, ?, 0) ON CONFLICT (name) DO UPDATE SET price_nano = excluded.price_nano, "
                   "credits_nano = excluded.credits_nano, five_hours_nano = excluded.five_hours_nano, "
                   "week_nano = excluded.week_nano, seats = excluded.seats", row)  # fmt: skip
                log(tx, "", actor, "plan.defined", plan.name, asdict(plan), self._ledger.clock())
        except Conflict:
            raise UserError(f"plan {plan.name!r} needs positive credits, no negative price, and seats for all that are sold") from None

    def plans(self) -> list[dict[str, Any]]:
        rows = self._db.read("SELECT * FROM plans ORDER BY price_nano, name")
        waiting = dict(map(tuple, self._db.read("SELECT plan, COUNT(*) FROM plan_queue GROUP BY plan")))
        return [{**{name: row[name] for name in row.keys()}, "waiting": waiting.get(row["name"], 0)} for row in rows]

    def waiting(self, plan: str) -> list[str]:
        """Who waits for a seat, first come first."""
        return [row[0] for row in self._db.read("SELECT customer FROM plan_queue WHERE plan = ? ORDER BY created, customer", (plan,))]

    def subscription(self, customer: str) -> Subscription | None:
        sql = f"SELECT {', '.join(COLUMNS)} FROM subscriptions WHERE customer = ? AND state = 'active'"
        rows = self._db.read(sql, (customer,))
        return Subscription(*rows[0]) if rows else None

    def allowances(self, customer: str) -> dict[tuple[str, str], Allowance]:
        """As they are now, by pocket and span."""
        sql = "SELECT pocket, span, limit_nano, anchor, started, ends, used_nano FROM allowances WHERE customer = ?"
        found = [Allowance(*row).at(self._ledger.clock()) for row in self._db.read(sql, (customer,))]
        return {(a.pocket, a.span): a for a in found}

    # ---- buying, changing, leaving -----------------------------------------------------------------------------

    def subscribe(self, customer: str, plan: str, actor: str = OPERATOR) -> Subscription:
        """Raises SoldOut, UserError if the cash does not cover the price, or there is a plan already."""
        with self._ledger.books([customer]) as books:
            _known(books, customer)
            if _active(books, customer) is not None:
                raise UserError(f"{customer!r} has a plan already; change that")
            wanted = _plan(books, plan)
            _seats(books, customer, {plan: 1})
            new = Subscription(f"sub_{secrets.token_hex(8)}", customer, plan, "", 0, books.now, 0, 0, "active")
            _pay(books, new, wanted.price_nano)
            _allocate(books, new, wanted, books.now)
            _windows(books, new, wanted, fresh=True)
            books.execute(f"INSERT INTO subscriptions ({', '.join(COLUMNS)}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                          tuple(asdict(new).values()))  # fmt: skip
            books.execute("DELETE FROM plan_queue WHERE customer = ?", (customer,))
            log(books.execute, customer, actor, "plan.subscribed", new.id, {"plan": plan}, books.now)
        return new

    def wait(self, customer: str, plan: str, actor: str = OPERATOR) -> int:
        """Joins the waiting list; returns the place on it, from 1."""
        with self._ledger.books([customer]) as books:
            _known(books, customer)
            _plan(books, plan)
            books.execute("INSERT INTO plan_queue (plan, customer, created) VALUES (?, ?, ?) ON CONFLICT (plan, customer) DO NOTHING",
                          (plan, customer, books.now))  # fmt: skip
            log(books.execute, customer, actor, "plan.waits", customer, {"plan": plan}, books.now)
        return self.waiting(plan).index(customer) + 1

    def change(self, customer: str, plan: str, actor: str = OPERATOR) -> Subscription:
        """Up at once, down with the next period. Back to the present plan takes a planned change back."""
        with self._ledger.books([customer]) as books:
            sub = _require(books, customer)
            old, new = _plan(books, sub.plan), _plan(books, plan)
            seats = {sub.next_plan: -1} if sub.next_plan else {}
            sub.next_plan, sub.cancelled = "", 0
            if new.name == old.name:
                _seats(books, customer, seats)
            elif new.price_nano > old.price_nano:
                moved = {**seats, old.name: -1}
                _seats(books, customer, {**moved, new.name: moved.get(new.name, 0) + 1})
                credited = _unused(books, sub, old)
                _pay(books, sub, new.price_nano - credited)
                _end_lot(books, sub, credited)
                sub.plan, sub.anchor, sub.period = new.name, books.now, 0
                _allocate(books, sub, new, books.now)
                _windows(books, sub, new, fresh=True)
            else:
                _seats(books, customer, {**seats, new.name: seats.get(new.name, 0) + 1})
                sub.next_plan = new.name
            _store(books, sub)
            log(books.execute, customer, actor, "plan.changed", sub.id, {"from": old.name, "to": new.name}, books.now)
        return sub

    def preview(self, customer: str, plan: str) -> Preview:
        """By the same arithmetic as `subscribe` and `change`; books nothing. Raises UnknownId."""
        with self._ledger.books([customer]) as books:
            _known(books, customer)
            new, sub = _plan(books, plan), _active(books, customer)
            if sub is None:
                return Preview("subscribe", new.price_nano, 0, books.now)
            old = _plan(books, sub.plan)
            if new.name == old.name:
                return Preview("keep", 0, 0, books.now)
            if new.price_nano > old.price_nano:
                unused = _unused(books, sub, old)
                return Preview("upgrade", new.price_nano - unused, unused, books.now)
            return Preview("downgrade", 0, 0, sub.ends)

    def cancel(self, customer: str, actor: str = OPERATOR) -> Subscription:
        """With the end of the period; until then all stays."""
        with self._ledger.books([customer]) as books:
            sub = _require(books, customer)
            if sub.next_plan:
                _seats(books, customer, {sub.next_plan: -1})
            sub.next_plan, sub.cancelled = "", 1
            _store(books, sub)
            log(books.execute, customer, actor, "plan.cancelled", sub.id, {}, books.now)
        return sub

    def cap_extra(self, customer: str, nano_usd: int | None, actor: str = OPERATOR) -> None:
        """The most of the extra-usage wallet that may be spent in a calendar month (UTC); None: all of it."""
        with self._ledger.books([customer]) as books:
            _known(books, customer)
            had = next((a for a in books.allowances(customer) if a.pocket == "extra"), None)
            if had is not None and nano_usd is not None:
                had.limit_nano, had.changed = nano_usd, True
            else:
                new = None if nano_usd is None else Allowance("extra", "month", nano_usd, 0.0)
                books.set_allowance(customer, new, "extra", "month")
            log(books.execute, customer, actor, "plan.extra_cap", customer, {"nano_usd": nano_usd}, books.now)

    # ---- what time does ----------------------------------------------------------------------------------------

    def turn(self) -> int:
        """Begins the periods that are due and gives freed seats to those who wait; returns how many subscriptions moved.
        A period that passed while nobody looked is not charged. Doing it again changes nothing."""
        moved, now = 0, self._ledger.clock()
        for (customer,) in self._db.read("SELECT customer FROM subscriptions WHERE state = 'active' ORDER BY customer"):
            moved += self._turn(customer, now)
        for (plan,) in self._db.read("SELECT DISTINCT plan FROM plan_queue ORDER BY plan"):
            moved += self._promote(plan)
        return moved

    def _turn(self, customer: str, now: float) -> bool:
        with self._ledger.books([customer]) as books:
            sub = _active(books, customer)
            if sub is None or sub.ends > now:
                return False
            _end_lot(books, sub)
            old, sub.plan, sub.next_plan = sub.plan, sub.next_plan or sub.plan, ""
            plan = _plan(books, sub.plan)
            sub.period = period(sub.anchor, now)
            broke = books.balance(customer, CASH) < plan.price_nano
            if sub.cancelled or broke:
                sub.state = "ended" if sub.cancelled else "lapsed"
                for span in ("5h", "7d"):
                    books.set_allowance(customer, None, "plan", span)
                _seats(books, customer, {old: -1} if old == sub.plan else {old: -1, sub.plan: -1})
            else:
                if old != sub.plan:  # the new one's seat was taken when it was chosen
                    _seats(books, customer, {old: -1})
                _pay(books, sub, plan.price_nano)
                _allocate(books, sub, plan, sub.begins)
                _windows(books, sub, plan, fresh=False)
            _store(books, sub)
            log(books.execute, customer, "clock", f"plan.{'renewed' if sub.state == 'active' else sub.state}", sub.id, {}, now)
        return True

    def _promote(self, plan: str) -> int:
        """A seat that is free goes to the first who can pay; who cannot loses the place."""
        served = 0
        for customer in self.waiting(plan):
            try:
                self.subscribe(customer, plan, "clock")
                served += 1
            except SoldOut:
                break
            except UserError:
                with self._db.transaction() as tx:
                    tx("DELETE FROM plan_queue WHERE plan = ? AND customer = ?", (plan, customer))
        return served


def prorated(price_nano: int, begins: float, ends: float, now: float) -> int:
    """The part of a month's price for what is left of the month, rounded down, in the customer's favour."""
    whole, rest = int((ends - begins) * 1000), int((ends - now) * 1000)
    return price_nano * min(max(rest, 0), whole) // whole


def _unused(books: Books, sub: Subscription, plan: Plan) -> int:
    """Of the price of the present period."""
    by_time = prorated(plan.price_nano, sub.begins, sub.ends, books.now)
    return min(by_time, plan.price_nano * books.balance(sub.customer, ("plan", sub.lot)) // plan.credits_nano)


def _plan(books: Books, name: str) -> Plan:
    sql = "SELECT name, price_nano, credits_nano, five_hours_nano, week_nano, seats FROM plans WHERE name = ?"
    row = books.execute(sql, (name,)).fetchone()
    if row is None:
        raise UnknownId(f"no plan {name!r}")
    return Plan(*row)


def _known(books: Books, customer: str) -> None:
    if not books.exists(customer):
        raise UnknownId(f"no organization {customer!r}")


def _active(books: Books, customer: str) -> Subscription | None:
    sql = f"SELECT {', '.join(COLUMNS)} FROM subscriptions WHERE customer = ? AND state = 'active'"
    row = books.execute(sql, (customer,)).fetchone()
    return Subscription(*row) if row else None


def _require(books: Books, customer: str) -> Subscription:
    sub = _active(books, customer)
    if sub is None:
        raise UnknownId(f"{customer!r} has no plan")
    return sub


def _store(books: Books, sub: Subscription) -> None:
    fields = {name: getattr(sub, name) for name in COLUMNS if name not in ("id", "customer")}
    books.execute(f"UPDATE subscriptions SET {', '.join(f'{name} = ?' for name in fields)} WHERE id = ?", (*fields.values(), sub.id))


def _seats(books: Books, customer: str, moves: Mapping[str, int]) -> None:
    """Takes and gives back seats, in one order for all, so that no two wait for each other. Raises SoldOut."""
    for plan, by in sorted(moves.items()):
        if by < 0:
            books.execute("UPDATE plans SET sold = sold - 1 WHERE name = ?", (plan,))
        elif by > 0:
            mine = "SELECT created FROM plan_queue WHERE plan = ? AND customer = ?"
            row = books.execute(mine, (plan, customer)).fetchone()
            ahead = "(SELECT COUNT(*) FROM plan_queue WHERE plan = ? AND customer <> ?" + (" AND created <= ?)" if row else ")")
            args = (plan, plan, customer, *([row[0]] if row else []))
            taken = books.execute(f"UPDATE plans SET sold = sold + 1 WHERE name = ? AND sold + {ahead} < seats", args)
            if taken.rowcount != 1:
                raise SoldOut(f"plan {plan!r} is sold out; there is a waiting list")


def _pay(books: Books, sub: Subscription, nano_usd: int) -> None:
    """For the allocation that comes next."""
    if books.balance(sub.customer, CASH) < nano_usd:
        raise UserError(f"{sub.customer!r} does not have the plan's price in cash; book a top-up first")
    reference = f"{sub.id}/{sub.grants + 1}"
    books.post(sub.customer, "plan_fee", reference, [(CASH, -nano_usd), (FEES, nano_usd)], sub.plan)


def _allocate(books: Books, sub: Subscription, plan: Plan, since: float) -> None:
    """Credits until the period's end, and the term as the analytics count it: at the plan's monthly price, from `since`."""
    sub.grants += 1
    sell(books.execute, Term(sub.lot, sub.customer, plan.name, since, sub.ends, 1, plan.price_nano))
    books.open_pocket(sub.customer, ("plan", sub.lot), sub.ends)
    books.post(sub.customer, "plan_grant", sub.lot, [(CONTRA, -plan.credits_nano), (("plan", sub.lot), plan.credits_nano)], plan.name)


def _end_lot(books: Books, sub: Subscription, credited_nano: int = 0) -> None:
    """What is left of the credits is gone; what a running request brings back later goes the same way. `credited_nano`: of
    the price, what pays for the plan that comes now."""
    name = ("plan", sub.lot)
    cut_short(books.execute, sub.lot, books.now, credited_nano)
    left = books.balance(sub.customer, name)
    books.end_pocket(sub.customer, name)
    if left:
        books.post(sub.customer, "expire", f"plan/{sub.lot}/end", [(name, -left), (BREAKAGE, left)])


def _windows(books: Books, sub: Subscription, plan: Plan, *, fresh: bool) -> None:
    """The plan's windows; what was used in the present ones stays used, unless the allocation starts them afresh."""
    for span, limit in (("5h", plan.five_hours_nano), ("7d", plan.week_nano)):
        had = next((a for a in books.allowances(sub.customer) if (a.pocket, a.span) == ("plan", span)), None)
        if limit is not None and had is not None and not fresh:
            had.limit_nano, had.changed = limit, True
        else:
            books.set_allowance(sub.customer, None if limit is None else Allowance("plan", span, limit, sub.anchor), "plan", span)
