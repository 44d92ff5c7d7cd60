"""One subscription, as rows and as moves of money and credits: what `plans` is made of.

A term is what is paid for at once, one month or twelve, by an anchor's anniversaries; credits are of each month in it, for
every seat that the customer has. All functions work in the books' own transaction, under the customer's lock.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tidelock.service.accounts import UnknownId
from tidelock.service.analytics.facts import Term, cut_short, sell
from tidelock.service.books import Books
from tidelock.service.ledger import BREAKAGE, CONTRA
from tidelock.service.windows import Allowance, anniversary
from tidelock.tokens.errors import UserError

CASH, FEES = ("cash", ""), ("fees", "")
COLUMNS = ("id", "customer", "plan", "next_plan", "cancelled", "anchor", "period", "grants", "state", "quantity",
           "next_quantity", "months", "term")  # fmt: skip
PLAN_COLUMNS = ("name", "price_nano", "credits_nano", "five_hours_nano", "week_nano", "seats", "months", "least", "most")


class SoldOut(UserError):
    """There is no seat, or others wait for it."""


@dataclass(frozen=True)
class Plan:
    """For each seat; `seats` is how many there are of it in all."""

    name: str
    price_nano: int  # a term
    credits_nano: int  # a month
    five_hours_nano: int | None
    week_nano: int | None
    seats: int
    months: int = 1  # of a term: 1, or 12 for a year paid at once
    least: int = 1  # seats of one customer
    most: int = 1

    def monthly_nano(self, quantity: int) -> int:
        return self.price_nano * quantity // self.months


@dataclass
class Subscription:
    id: str
    customer: str
    plan: str
    next_plan: str
    cancelled: int
    anchor: float
    period: int  # the month that runs, counted from the anchor
    grants: int
    state: str
    quantity: int = 1  # seats
    next_quantity: int = 0
    months: int = 1  # of the term that runs
    term: int = 0  # the month it began with

    @property
    def begins(self) -> float:
        return anniversary(self.anchor, self.term)

    @property
    def ends(self) -> float:
        """Of the term: until then all is paid."""
        return anniversary(self.anchor, self.term + self.months)

    @property
    def month_ends(self) -> float:
        """When these credits are over."""
        return anniversary(self.anchor, self.period + 1)

    @property
    def lot(self) -> str:
        return f"{self.id}/{self.grants}"


def prorated(price_nano: int, begins: float, ends: float, now: float) -> int:
    """The part of a month's price for what is left of the month, rounded down, in the customer's favour."""
    whole, rest = int((ends - begins) * 1000), int((ends - now) * 1000)
    return price_nano * min(max(rest, 0), whole) // whole


def unused(books: Books, sub: Subscription, plan: Plan) -> int:
    """Of the price of the present term: by time or by credits, whichever is less."""
    paid, monthly = plan.price_nano * sub.quantity, plan.credits_nano * sub.quantity
    by_time = prorated(paid, sub.begins, sub.ends, books.now)
    left = books.balance(sub.customer, ("plan", sub.lot)) + monthly * (sub.term + sub.months - 1 - sub.period)
    return min(by_time, paid * left // (monthly * sub.months))


def named(books: Books, name: str) -> Plan:
    sql = f"SELECT {', '.join(PLAN_COLUMNS)} FROM plans WHERE name = ?"
    row = books.execute(sql, (name,)).fetchone()
    if row is None:
        raise UnknownId(f"no plan {name!r}")
    return Plan(*row)


def known(books: Books, customer: str) -> None:
    if not books.exists(customer):
        raise UnknownId(f"no organization {customer!r}")


def active(books: Books, customer: str) -> Subscription | None:
    sql = f"SELECT {', '.join(COLUMNS)} FROM subscriptions WHERE customer = ? AND state = 'active'"
    row = books.execute(sql, (customer,)).fetchone()
    return Subscription(*row) if row else None


def require(books: Books, customer: str) -> Subscription:
    sub = active(books, customer)
    if sub is None:
        raise UnknownId(f"{customer!r} has no plan")
    return sub


def store(books: Books, sub: Subscription) -> None:
    fields = {name: getattr(sub, name) for name in COLUMNS if name not in ("id", "customer")}
    books.execute(f"UPDATE subscriptions SET {', '.join(f'{name} = ?' for name in fields)} WHERE id = ?", (*fields.values(), sub.id))


def seats(books: Books, customer: str, moves: Mapping[str, int]) -> None:
    """Takes and gives back seats, in one order for all, so that no two wait for each other. Raises SoldOut."""
    for plan, by in sorted(moves.items()):
        if by < 0:
            books.execute("UPDATE plans SET sold = sold + ? WHERE name = ?", (by, plan))
        elif by > 0:
            mine = "SELECT created FROM plan_queue WHERE plan = ? AND customer = ?"
            row = books.execute(mine, (plan, customer)).fetchone()
            ahead = "(SELECT COUNT(*) FROM plan_queue WHERE plan = ? AND customer <> ?" + (" AND created <= ?)" if row else ")")
            args = (by, plan, by, plan, customer, *([row[0]] if row else []))
            taken = books.execute(f"UPDATE plans SET sold = sold + ? WHERE name = ? AND sold + ? + {ahead} <= seats", args)
            if taken.rowcount != 1:
                raise SoldOut(f"plan {plan!r} is sold out; there is a waiting list")


def pay(books: Books, sub: Subscription, nano_usd: int) -> None:
    """For the allocation that comes next."""
    if books.balance(sub.customer, CASH) < nano_usd:
        raise UserError(f"{sub.customer!r} does not have the plan's price in cash; book a top-up first")
    reference = f"{sub.id}/{sub.grants + 1}"
    books.post(sub.customer, "plan_fee", reference, [(CASH, -nano_usd), (FEES, nano_usd)], sub.plan)


def begin_term(books: Books, sub: Subscription, plan: Plan, since: float, credited_nano: int = 0) -> None:
    """Takes the fee for the term that runs from `since`, less what was credited, and gives its first month's credits. The
    term is sold at the plan's whole price, as the analytics count it. Raises UserError if the cash does not cover it."""
    price = plan.price_nano * sub.quantity
    pay(books, sub, price - credited_nano)
    allocate(books, sub, plan)
    sell(books.execute, Term(sub.lot, sub.customer, plan.name, since, sub.ends, sub.months, price), books.now)


def allocate(books: Books, sub: Subscription, plan: Plan) -> None:
    """Credits of every seat until the month's end."""
    sub.grants += 1
    credits = plan.credits_nano * sub.quantity
    books.open_pocket(sub.customer, ("plan", sub.lot), sub.month_ends)
    books.post(sub.customer, "plan_grant", sub.lot, [(CONTRA, -credits), (("plan", sub.lot), credits)], plan.name)


def end_term(books: Books, sub: Subscription, credited_nano: int) -> None:
    """Cuts it short: of its price, `credited_nano` pays for the term that comes now."""
    # one that was cut short already stays as it was cut, though it may last into this very second
    sql = "SELECT reference FROM plan_terms WHERE customer = ? AND starts <= ? AND ends > ? AND cut_s IS NULL"
    for (reference,) in books.execute(sql, (sub.customer, books.now, books.now)).fetchall():
        if reference.startswith(f"{sub.id}/"):
            cut_short(books.execute, reference, books.now, credited_nano)


def end_lot(books: Books, sub: Subscription) -> None:
    """What is left of the month's credits is gone; what a running request brings back later goes the same way."""
    name = ("plan", sub.lot)
    left = books.balance(sub.customer, name)
    books.end_pocket(sub.customer, name)
    if left:
        books.post(sub.customer, "expire", f"plan/{sub.lot}/end", [(name, -left), (BREAKAGE, left)])


def wait_until_now(books: Books, customer: str) -> None:
    """A term that is over was not followed by another, because nobody could have used it: the next one is due now."""
    sub = active(books, customer)
    if sub is not None and sub.ends <= books.now:
        sub.anchor, sub.period, sub.term = books.now, -1, -sub.months
        store(books, sub)


def lasts(books: Books, sub: Subscription) -> bool:
    """Whether the month's credits may be spent for longer than the month: after a suspension they may."""
    sql = "SELECT 1 FROM accounts WHERE customer = ? AND kind = 'plan' AND lot = ? AND expires > ?"
    return books.execute(sql, (sub.customer, sub.lot, books.now)).fetchone() is not None


def windows(books: Books, sub: Subscription, plan: Plan, *, fresh: bool) -> None:
    """The plan's windows; what was used in the present ones stays used, unless the allocation starts them afresh."""
    for span, each in (("5h", plan.five_hours_nano), ("7d", plan.week_nano)):
        limit = None if each is None else each * sub.quantity
        had = next((a for a in books.allowances(sub.customer) if (a.pocket, a.span) == ("plan", span)), None)
        if limit is not None and had is not None and not fresh:
            had.limit_nano, had.changed = limit, True
        else:
            books.set_allowance(sub.customer, None if limit is None else Allowance("plan", span, limit, sub.anchor), "plan", span)
