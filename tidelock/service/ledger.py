"""Prepaid money: top-up, grant, hold, extend, settle, release, in integer nano-USD. Double entry, append-only.

Every customer (the organisation that pays) has accounts of its own, so customers never wait for each other:
    cash, extra, voucher/LOT, plan/LOT   pockets that can be spent, in the order of `books.BURN_ORDER`
    held                                 promised to running requests
    revenue, breakage, refunds           what became of money: used, expired, paid back
    outside, contra, receivable          where it came from: paid in, given away, owed by the customer
All of a customer's accounts sum to zero, as every transaction does. This is the synchronous face, for the command line
and background jobs; the server's requests go through `till.Till`, which batches them.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tidelock.service.audit import Audit, audit, statement
from tidelock.service.books import OUTSIDE, RECEIVABLE, REFUNDS, AccountName, Admission, Books, Hold, InsufficientBalance, Metered
from tidelock.service.db import Conflict, Database
from tidelock.service.prices import Counts, Price
from tidelock.tokens.errors import UserError

__all__ = ["MAX_NANO", "Audit", "Hold", "InsufficientBalance", "Ledger"]

MAX_NANO = 2**62  # far from the 64-bit overflow, which SQLite would silently turn into a float
PRUNED_AT_A_TIME = 500
CONTRA, BREAKAGE = ("contra", ""), ("breakage", "")
# Of a query over rows with a `customer`: those that are not suspended (`suspension`).
ACTIVE = "NOT EXISTS (SELECT 1 FROM organizations WHERE organizations.id = customer AND organizations.suspended IS NOT NULL)"


class Ledger:
    def __init__(self, db: Database, clock: Callable[[], float] = time.time, worker: str = "") -> None:
        """`worker`: whose holds are opened through here (`workers.Worker.id`)."""
        self.db = db
        self.clock = clock
        self.worker = worker

    @contextmanager
    def books(self, customers: Sequence[str], requests: Sequence[str] = ()) -> Iterator[Books]:
        """The customers' books, locked; what the block did to them is written at its end, or nothing."""
        with self.db.transaction() as tx:
            books = Books(tx, customers, requests, now=self.clock(), worker=self.worker)
            yield books
            books.write()

    # ---- money in and out --------------------------------------------------------------------------------------

    def open_account(self, customer: str) -> None:
        """Makes the customer known; does nothing if it is."""
        try:
            with self.books([customer]) as books:
                books.create(customer)
        except Conflict:  # somebody else did so at the same moment
            pass

    def topup(self, customer: str, nano_usd: int, reference: str | None = None, *, pocket: str = "cash") -> bool:
        """Books money paid in; what the customer owes is paid first. `reference` is the payment's id: booking it twice
        changes nothing and returns False. Raises UserError for an amount that is not positive or an unknown customer."""
        if pocket not in ("cash", "extra"):
            raise UserError(f"money is paid into cash or extra, not {pocket!r}")

        def entries(books: Books) -> list[tuple[AccountName, int]]:
            owed = min(nano_usd, -books.balance(customer, RECEIVABLE))
            return [(OUTSIDE, -nano_usd), (RECEIVABLE, owed), ((pocket, ""), nano_usd - owed)]

        return self._once(customer, "topup", nano_usd, reference, entries)

    def grant(
        self, customer: str, nano_usd: int, *, kind: str = "voucher", lot: str, expires: float | None = None,
        also: Callable[[Books], None] | None = None,
    ) -> bool:  # fmt: skip
        """Gives a voucher, or the credits of a plan period. `lot` names it, and is granted once; `also` is done with it, in the
        same transaction."""
        if kind not in ("voucher", "plan"):
            raise UserError(f"a grant is a voucher or of a plan, not {kind!r}")

        def entries(books: Books) -> list[tuple[AccountName, int]]:
            books.open_pocket(customer, (kind, lot), expires)
            if also is not None:
                also(books)
            return [(CONTRA, -nano_usd), ((kind, lot), nano_usd)]

        return self._once(customer, f"{kind}_grant", nano_usd, lot, entries)

    def refund(self, customer: str, nano_usd: int, reference: str, *, pocket: str = "cash") -> bool:
        """Books money paid back to the customer. Raises UserError if the pocket does not hold that much."""

        def entries(books: Books) -> list[tuple[AccountName, int]]:
            if books.balance(customer, (pocket, "")) < nano_usd:
                raise UserError(f"{customer!r} does not have that much in {pocket}")
            return [((pocket, ""), -nano_usd), (REFUNDS, nano_usd)]

        return self._once(customer, "refund", nano_usd, reference, entries)

    def _once(self, customer: str, kind: str, nano_usd: int, reference: str | None, entries: Callable) -> bool:
        if not 0 < nano_usd < MAX_NANO:
            what = kind.replace("_", " ").replace("topup", "top-up")
            raise UserError(f"a {what} needs a positive amount below {MAX_NANO} nano-USD, got {nano_usd}")
        reference = reference or f"{kind}_{uuid.uuid4().hex}"
        with self.books([customer]) as books:
            if not books.exists(customer):
                raise UserError(f"no account for customer {customer!r}; create a key for it first")
            if books.booked(kind, reference):
                return False
            books.post(customer, kind, reference, entries(books))
        return True

    def expire_pockets(self) -> int:
        """Books what is left in expired vouchers and plan periods as breakage; returns how many there were. Those of who is
        suspended wait: they may get more time."""
        now = self.clock()
        over = f"expires <= ? AND balance_nano > 0 AND {ACTIVE}"
        expired = self.db.read(f"SELECT customer, kind, lot FROM accounts WHERE {over} ORDER BY customer", (now,))
        for customer, kind, lot in expired:
            with self.books([customer]) as books:
                left = books.balance(customer, (kind, lot))
                if left:
                    reference = f"{kind}/{lot}/{uuid.uuid4().hex[:12]}"  # a hold may bring some back and expire again
                    books.post(customer, "expire", reference, [((kind, lot), -left), (BREAKAGE, left)])
        return len(expired)

    # ---- one request -------------------------------------------------------------------------------------------

    def hold(
        self,
        customer: str,
        key_id: str,
        request_id: str,
        *,
        model: str,
        price: Price,
        price_version: str,
        prompt_tokens: int,
        max_tokens: int,
        lifetime_s: float,
    ) -> Hold:
        """Sets aside the prompt plus as many of `max_tokens` as the pockets cover. Raises InsufficientBalance if they
        do not cover the prompt and one token."""
        ask = Admission(request_id, customer, key_id, model, price, price_version, prompt_tokens, max_tokens, lifetime_s)
        with self.books([customer]) as books:
            return books.hold(ask)

    def extend(self, hold: Hold, tokens: int, progress: int = 0) -> int:
        with self.books([hold.customer], [hold.request_id]) as books:
            return books.extend(hold, tokens, progress=progress)

    def settle(self, hold: Hold, *, cached_tokens: int, completion_tokens: int, finish_reason: str) -> int:
        counts = Counts(hold.prompt_tokens, cached_tokens, completion=completion_tokens)
        with self.books([hold.customer], [hold.request_id]) as books:
            return books.settle(hold.request_id, hold.price, Metered(counts, finish_reason))

    def release(self, request_id: str) -> bool:
        """Gives a whole hold back. False if it was not open."""
        rows = self.db.read("SELECT customer FROM holds WHERE request_id = ?", (request_id,))
        with self.books([row[0] for row in rows], [request_id]) as books:
            return books.release(request_id)

    # ---- requests whose server died ----------------------------------------------------------------------------

    def sweep(self, running: Container[str] = ()) -> int:
        """Settles the expired holds of this worker, and those that no worker has, for what is known to have been sent;
        returns how many. Not those of `running` requests: after a machine has slept, or its clock was put forward, the holds
        of requests that live have expired too. What another worker has is its own to sweep, and `recover`'s when it is dead."""
        mine = "expires <= ? AND (worker = ? OR worker NOT IN (SELECT id FROM workers))"
        return self._lose(mine, (self.clock(), self.worker), running)

    def recover(self, workers: Sequence[str]) -> int:
        """The same for the open holds of workers that are dead."""
        return self._lose(f"worker IN ({', '.join('?' * len(workers))})", workers) if workers else 0

    def _lose(self, condition: str, args: Sequence[Any], spared: Container[str] = ()) -> int:
        sql = (f"SELECT customer, request_id FROM holds WHERE state = 'open' AND {condition} AND request_id > ? "
               "ORDER BY request_id LIMIT 200")  # fmt: skip
        lost, after = 0, ""
        while rows := self.db.read(sql, (*args, after)):
            after = rows[-1][1]
            dead = [(customer, request_id) for customer, request_id in rows if request_id not in spared]
            with self.books([customer for customer, _ in dead], [request_id for _, request_id in dead]) as books:
                lost += sum(books.lose(request_id) is not None for _, request_id in dead)
        return lost

    def prune(self, older_than_s: float, most: int = 50_000) -> int:
        """Removes holds that were closed and are older than this, a few at a time so that nobody waits long; returns how
        many. Nothing is rated from them: what was metered is in the usage rows and the transactions, which stay."""
        cutoff, pruned = self.clock() - older_than_s, 0
        sql = f"SELECT request_id FROM {self.db.oldest('holds', PRUNED_AT_A_TIME)} AS h WHERE h.state <> 'open' AND h.created < ? LIMIT ?"
        while pruned < most:
            old = [row[0] for row in self.db.read(sql, (cutoff, PRUNED_AT_A_TIME))]
            if not old:
                break
            with self.db.transaction() as tx:
                tx(f"DELETE FROM holds WHERE state <> 'open' AND request_id IN ({', '.join('?' * len(old))})", old)
            pruned += len(old)
        return pruned

    # ---- reading -----------------------------------------------------------------------------------------------

    def balance(self, customer: str) -> int:
        """Free to spend, in nano-USD, over all pockets; 0 for an unknown customer."""
        return sum(nano for kind, nano in self.balances(customer).items() if kind in ("cash", "extra", "voucher", "plan"))

    def balances(self, customer: str) -> dict[str, int]:
        """nano-USD by kind of account; expired vouchers and plan credits no longer count."""
        sql = (
            "SELECT kind, CAST(SUM(balance_nano) AS BIGINT) FROM accounts WHERE customer = ? "
            "AND (expires IS NULL OR expires > ?) GROUP BY kind"
        )
        return {row[0]: row[1] for row in self.db.read(sql, (customer, self.clock()))}

    def audit(self) -> Audit:
        return audit(self.db)

    def statement(self) -> list[dict[str, Any]]:
        return statement(self.db)
