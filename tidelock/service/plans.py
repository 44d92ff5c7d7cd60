"""Plans: credits for a month from anniversary to anniversary, paid from the cash balance by the month or for a year at once,
for one seat or many; no more sold than there are.

A month's credits are a pocket that ends with it, so nothing rolls over; five-hour and seven-day windows bound how fast
they may be spent (`windows`, applied where money is held, in `books`). An upgrade (to what costs more a month, or to more
seats) counts at once: it begins a term of its own and costs the new price less what is left of the old one, by time or by
credits, whichever is less (by time alone, who upgraded in the last hour of a month would get a month's credits for an
hour's price). A downgrade takes its seats at once and counts from the next term on. Every step is one transaction under the
customer's lock.
"""

from __future__ import annotations

import secrets
from dataclasses import asdict, dataclass
from typing import Any

from tidelock.service.accounts import OPERATOR, log
from tidelock.service.db import Conflict
from tidelock.service.ledger import ACTIVE, Ledger
from tidelock.service.subscriptions import (
    CASH, COLUMNS, PLAN_COLUMNS, Plan, SoldOut, Subscription, active, allocate, begin_term, end_lot, end_term, known, lasts,
    named, prorated, require, seats, store, unused, windows,
)  # fmt: skip
from tidelock.service.suspension import is_suspended
from tidelock.service.windows import Allowance, anniversary, period
from tidelock.tokens.errors import UserError

__all__ = ["Plan", "Plans", "SoldOut", "Subscription", "prorated"]


@dataclass(frozen=True)
class Preview:
    """What changing to a plan would do, if it were done now."""

    kind: str  # "subscribe" | "upgrade" | "downgrade" | "keep"
    charge_nano: int  # from the cash balance, at once
    unused_nano: int  # of the present term's price, already taken off the charge
    effective: float
    quantity: int  # seats
    ends: float  # of the term it is about


class Plans:
    def __init__(self, ledger: Ledger) -> None:
        self._ledger, self._db = ledger, ledger.db

    # ---- what is sold ------------------------------------------------------------------------------------------

    def define(self, plan: Plan, actor: str = OPERATOR) -> None:
        """Makes or changes a plan; who has it gets the new terms with the next period. Raises UserError for nonsense,
        and for fewer seats than are sold."""
        if plan.months not in (1, 12) or not 1 <= plan.least <= plan.most:
            raise UserError("a plan's term is 1 or 12 months, and a customer has from 1 seat on, the least not above the most")
        try:
            with self._db.transaction() as tx:
                values = ", ".join(f"{name} = excluded.{name}" for name in PLAN_COLUMNS[1:])
                tx(f"INSERT INTO plans ({', '.join(PLAN_COLUMNS)}, sold) VALUES ({', '.join('?' * len(PLAN_COLUMNS))}, 0) "
                   f"ON CONFLICT (name) DO UPDATE SET {values}", tuple(asdict(plan).values()))  # fmt: skip
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

    def subscribe(self, customer: str, plan: str, actor: str = OPERATOR, quantity: int | None = None) -> Subscription:
        """`quantity`: seats; default: the least the plan is sold with. Raises SoldOut, UserError if the cash does not cover
        the price, or there is a plan already."""
        with self._ledger.books([customer]) as books:
            known(books, customer)
            if active(books, customer) is not None:
                raise UserError(f"{customer!r} has a plan already; change that")
            wanted = named(books, plan)
            count = _count(wanted, quantity)
            seats(books, customer, {plan: count})
            new = Subscription(f"sub_{secrets.token_hex(8)}", customer, plan, "", 0, books.now, 0, 0, "active", count, 0, wanted.months)
            begin_term(books, new, wanted, books.now)
            windows(books, new, wanted, fresh=True)
            books.execute(f"INSERT INTO subscriptions ({', '.join(COLUMNS)}) VALUES ({', '.join('?' * len(COLUMNS))})",
                          tuple(asdict(new).values()))  # fmt: skip
            books.execute("DELETE FROM plan_queue WHERE customer = ?", (customer,))
            log(books.execute, customer, actor, "plan.subscribed", new.id, {"plan": plan, "quantity": count}, books.now)
        return new

    def wait(self, customer: str, plan: str, actor: str = OPERATOR) -> int:
        """Joins the waiting list; returns the place on it, from 1."""
        with self._ledger.books([customer]) as books:
            known(books, customer)
            named(books, plan)
            books.execute("INSERT INTO plan_queue (plan, customer, created) VALUES (?, ?, ?) ON CONFLICT (plan, customer) DO NOTHING",
                          (plan, customer, books.now))  # fmt: skip
            log(books.execute, customer, actor, "plan.waits", customer, {"plan": plan}, books.now)
        return self.waiting(plan).index(customer) + 1

    def change(self, customer: str, plan: str, actor: str = OPERATOR, quantity: int | None = None) -> Subscription:
        """Up (more money a month, or as much for more seats) at once, down with the next term. Back to what there is takes a
        planned change back. `quantity`: seats; default: as many as now, as far as the plan has them."""
        with self._ledger.books([customer]) as books:
            sub = require(books, customer)
            old, new = named(books, sub.plan), named(books, plan)
            count = _changed(new, sub, quantity)
            moves = {sub.next_plan: -sub.next_quantity} if sub.next_plan else {}
            sub.next_plan, sub.next_quantity, sub.cancelled = "", 0, 0
            if (new.name, count) == (old.name, sub.quantity):
                seats(books, customer, moves)
            elif _is_up(new, count, old, sub):
                moves[old.name] = moves.get(old.name, 0) - sub.quantity
                moves[new.name] = moves.get(new.name, 0) + count
                seats(books, customer, moves)
                credited = unused(books, sub, old)
                end_term(books, sub, credited)
                end_lot(books, sub)
                sub.plan, sub.anchor, sub.period, sub.term = new.name, books.now, 0, 0
                sub.quantity, sub.months = count, new.months
                begin_term(books, sub, new, books.now, credited)
                windows(books, sub, new, fresh=True)
            else:
                moves[new.name] = moves.get(new.name, 0) + count
                seats(books, customer, moves)
                sub.next_plan, sub.next_quantity = new.name, count
            store(books, sub)
            detail = {"from": old.name, "to": new.name, "quantity": count}
            log(books.execute, customer, actor, "plan.changed", sub.id, detail, books.now)
        return sub

    def preview(self, customer: str, plan: str, quantity: int | None = None) -> Preview:
        """By the same arithmetic as `subscribe` and `change`; books nothing. Raises UnknownId."""
        with self._ledger.books([customer]) as books:
            known(books, customer)
            new, sub = named(books, plan), active(books, customer)
            if sub is None:
                count = _count(new, quantity)
                return Preview("subscribe", new.price_nano * count, 0, books.now, count, anniversary(books.now, new.months))
            old, count = named(books, sub.plan), _changed(new, sub, quantity)
            if (new.name, count) == (old.name, sub.quantity):
                return Preview("keep", 0, 0, books.now, count, sub.ends)
            if _is_up(new, count, old, sub):
                credited, ends = unused(books, sub, old), anniversary(books.now, new.months)
                return Preview("upgrade", new.price_nano * count - credited, credited, books.now, count, ends)
            ends = anniversary(sub.anchor, sub.term + sub.months + new.months)
            return Preview("downgrade", 0, 0, sub.ends, count, ends)

    def cancel(self, customer: str, actor: str = OPERATOR) -> Subscription:
        """With the end of the term; until then all stays."""
        with self._ledger.books([customer]) as books:
            sub = require(books, customer)
            if sub.next_plan:
                seats(books, customer, {sub.next_plan: -sub.next_quantity})
            sub.next_plan, sub.next_quantity, sub.cancelled = "", 0, 1
            store(books, sub)
            log(books.execute, customer, actor, "plan.cancelled", sub.id, {}, books.now)
        return sub

    def cap_extra(self, customer: str, nano_usd: int | None, actor: str = OPERATOR) -> None:
        """The most of the extra-usage wallet that may be spent in a calendar month (UTC); None: all of it."""
        with self._ledger.books([customer]) as books:
            known(books, customer)
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
        A period that passed while nobody looked is not charged. Doing it again changes nothing. Who is suspended gets the
        months that are paid, and no new term."""
        moved, now = 0, self._ledger.clock()
        for (customer,) in self._db.read("SELECT customer FROM subscriptions WHERE state = 'active' ORDER BY customer"):
            moved += self._turn(customer, now)
        for (plan,) in self._db.read("SELECT DISTINCT plan FROM plan_queue ORDER BY plan"):
            moved += self._promote(plan)
        return moved

    def _turn(self, customer: str, now: float) -> bool:
        with self._ledger.books([customer]) as books:
            sub = active(books, customer)
            if sub is None or sub.month_ends > now:
                return False
            suspended, present = is_suspended(books.execute, customer), period(sub.anchor, now)
            if suspended and present >= sub.term + sub.months:
                return False
            if not suspended and not lasts(books, sub):
                end_lot(books, sub)
            sub.period = present
            if sub.period < sub.term + sub.months:  # another month of what is paid
                allocate(books, sub, named(books, sub.plan))
                store(books, sub)
                return True
            old, had = sub.plan, sub.quantity
            if sub.next_plan:
                sub.plan, sub.quantity = sub.next_plan, sub.next_quantity
            moved, sub.next_plan, sub.next_quantity = bool(sub.next_plan), "", 0
            plan = named(books, sub.plan)
            if sub.cancelled or books.balance(customer, CASH) < plan.price_nano * sub.quantity:
                sub.state = "ended" if sub.cancelled else "lapsed"
                for span in ("5h", "7d"):
                    books.set_allowance(customer, None, "plan", span)
                freed = {old: -had}
                if moved:
                    freed[sub.plan] = freed.get(sub.plan, 0) - sub.quantity
                seats(books, customer, freed)
            else:
                if moved:  # the new one's seats were taken when it was chosen
                    seats(books, customer, {old: -had})
                sub.term, sub.months = sub.period, plan.months
                begin_term(books, sub, plan, sub.begins)
                windows(books, sub, plan, fresh=False)
            store(books, sub)
            log(books.execute, customer, "clock", f"plan.{'renewed' if sub.state == 'active' else sub.state}", sub.id, {}, now)
        return True

    def _promote(self, plan: str) -> int:
        """A seat that is free goes to the first who can pay; who cannot loses the place. Who is suspended keeps it."""
        served = 0
        for customer in self.waiting(plan):
            if not self._db.read(f"SELECT 1 FROM customers WHERE customer = ? AND {ACTIVE}", (customer,)):
                continue
            try:
                self.subscribe(customer, plan, "clock")
                served += 1
            except SoldOut:
                break
            except UserError:
                with self._db.transaction() as tx:
                    tx("DELETE FROM plan_queue WHERE plan = ? AND customer = ?", (plan, customer))
        return served


def _count(plan: Plan, quantity: int | None) -> int:
    count = plan.least if quantity is None else quantity
    if not plan.least <= count <= plan.most:
        raise UserError(f"plan {plan.name!r} is sold with {plan.least} to {plan.most} seats, not {count}")
    return count


def _changed(new: Plan, sub: Subscription, quantity: int | None) -> int:
    """Seats after a change; default: as many as now, as far as the plan has them."""
    return _count(new, max(new.least, min(sub.quantity, new.most)) if quantity is None else quantity)


def _is_up(new: Plan, count: int, old: Plan, sub: Subscription) -> bool:
    return (new.monthly_nano(count), count) > (old.monthly_nano(sub.quantity), sub.quantity)
