"""Prepaid money: top-up, hold, settle, release, sweep and audit, in integer nano-USD.

Double entry over four kinds of account: cash (the outside world), revenue, and per customer a wallet (free to spend)
and held (promised to running requests). Every transaction sums to zero. A hold covers the worst case of a request
before the first token is sampled, so a customer can never spend more than was paid in.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from tidelock.service.db import Database
from tidelock.service.prices import Price
from tidelock.tokens.errors import UserError

CASH, REVENUE = 1, 2  # account ids fixed by the schema
MAX_NANO = 2**62  # far from SQLite's 64-bit overflow, which would silently turn an integer into a float


class InsufficientBalance(Exception):
    """The wallet does not even cover the prompt and one token."""


@dataclass(frozen=True)
class Hold:
    """Money set aside for one request: the prompt at full input price plus `max_tokens` at output price."""

    request_id: str
    customer: str
    key_id: str
    model: str
    price: Price
    price_version: str
    prompt_tokens: int
    max_tokens: int  # what the wallet covers; at most what was asked for
    nano_usd: int


@dataclass(frozen=True)
class Audit:
    """What `tidelock doctor` and the report show. A sound ledger has zeros everywhere but in the first two."""

    transactions: int
    entries: int
    sum_nano: int  # of all entries
    unbalanced: int  # transactions whose entries do not sum to zero
    wrong_balances: int  # accounts whose balance is not the sum of their entries
    overspend_nano: int  # charged beyond what was paid in, summed over customers
    unmetered: int  # settlements whose usage row is missing or charges another amount
    held_nano: int  # promised to holds, minus the open holds themselves

    @property
    def sound(self) -> bool:
        faults = (self.sum_nano, self.unbalanced, self.wrong_balances, self.overspend_nano, self.unmetered)
        return not any(faults) and self.held_nano == 0


class Ledger:
    def __init__(self, db: Database, clock: Callable[[], float] = time.time) -> None:
        self.db = db
        self._clock = clock

    def open_account(self, customer: str) -> None:
        """Creates the customer's wallet; does nothing if it exists."""
        with self.db.transaction() as write:
            for kind in ("wallet", "held"):
                write("INSERT OR IGNORE INTO accounts (kind, customer) VALUES (?, ?)", (kind, customer))

    def topup(self, customer: str, nano_usd: int, reference: str | None = None) -> bool:
        """Books money paid in. `reference` is the payment's id: booking it twice changes nothing and returns False.
        Raises UserError for an amount that is not positive or an unknown customer."""
        if not 0 < nano_usd < MAX_NANO:
            raise UserError(f"a top-up needs a positive amount below {MAX_NANO} nano-USD, got {nano_usd}")
        reference = reference or f"topup_{uuid.uuid4().hex}"
        with self.db.transaction() as write:
            booked = write("SELECT 1 FROM transactions WHERE kind = 'topup' AND reference = ?", (reference,))
            if booked.fetchone():
                return False
            self._post(write, "topup", reference, [(CASH, -nano_usd), (_account(write, "wallet", customer), nano_usd)])
        return True

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
        """Sets aside the prompt plus as many of `max_tokens` as the wallet covers.

        The admission is one conditional insert: the database reads the wallet and decides in the same statement.
        Raises InsufficientBalance if the wallet does not cover the prompt and one token.
        """
        prompt_nano = price.cost_nano(prompt_tokens, 0, 0)
        now = self._clock()
        with self.db.transaction() as write:
            row = write(
                """
                INSERT INTO holds (request_id, customer, key_id, model, price_version, prompt_tokens, max_tokens,
                                   nano_usd, created, expires)
                SELECT :request_id, customer, :key_id, :model, :price_version, :prompt_tokens, granted,
                       :prompt_nano + granted * :output_nano, :now, :expires
                FROM (SELECT customer, MIN(:max_tokens, (balance_nano - :prompt_nano) / :output_nano) AS granted
                      FROM accounts WHERE kind = 'wallet' AND customer = :customer
                      AND balance_nano >= :prompt_nano + :output_nano)
                RETURNING max_tokens, nano_usd
                """,
                {
                    "request_id": request_id,
                    "customer": customer,
                    "key_id": key_id,
                    "model": model,
                    "price_version": price_version,
                    "prompt_tokens": prompt_tokens,
                    "max_tokens": max_tokens,
                    "prompt_nano": prompt_nano,
                    "output_nano": price.output_nano,
                    "now": now,
                    "expires": now + lifetime_s,
                },
            ).fetchone()
            if row is None:
                raise InsufficientBalance(customer)
            granted, nano_usd = row
            wallet, held = _account(write, "wallet", customer), _account(write, "held", customer)
            self._post(write, "hold", request_id, [(wallet, -nano_usd), (held, nano_usd)])
        return Hold(
            request_id, customer, key_id, model, price, price_version, prompt_tokens, granted, nano_usd
        )

    def settle(self, hold: Hold, *, cached_tokens: int, completion_tokens: int, finish_reason: str) -> int:
        """Charges what was used, gives the rest back and writes the usage row, in one transaction.

        Returns the charge in nano-USD. Counts are clamped to what the hold covers. A hold that is no longer open
        (settled before, or swept after its expiry) is charged nothing and gets no second usage row.
        """
        cached = min(max(cached_tokens, 0), hold.prompt_tokens)
        completion = min(max(completion_tokens, 0), hold.max_tokens)
        cost = hold.price.cost_nano(hold.prompt_tokens, cached, completion)
        with self.db.transaction() as write:
            if not _close(write, hold.request_id, "settled"):
                return 0
            wallet, held = _account(write, "wallet", hold.customer), _account(write, "held", hold.customer)
            entries = [(held, -hold.nano_usd), (REVENUE, cost), (wallet, hold.nano_usd - cost)]
            self._post(write, "settle", hold.request_id, entries)
            write(
                "INSERT INTO usage VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    hold.request_id, hold.customer, hold.key_id, hold.model, hold.price_version,
                    hold.prompt_tokens, cached, completion, cost, finish_reason, self._clock(),
                ),
            )  # fmt: skip
        return cost

    def release(self, request_id: str) -> bool:
        """Gives a whole hold back. False if it was not open."""
        with self.db.transaction() as write:
            return self._release(write, request_id)

    def sweep(self) -> int:
        """Releases every expired hold; returns how many."""
        return self._release_where("expires <= ?", (self._clock(),))

    def recover(self) -> int:
        """Releases every open hold. For start-up of the one server of this database: whoever held them is dead."""
        return self._release_where("TRUE", ())

    def balance(self, customer: str) -> int:
        """Free to spend, in nano-USD; 0 for an unknown customer."""
        rows = self.db.read("SELECT balance_nano FROM accounts WHERE kind = 'wallet' AND customer = ?", (customer,))
        return rows[0][0] if rows else 0

    def audit(self) -> Audit:
        """Recomputes everything from the entries; believes no projection."""

        def one(sql: str) -> int:
            return self.db.read(sql)[0][0]

        return Audit(
            transactions=one("SELECT COUNT(*) FROM transactions"),
            entries=one("SELECT COUNT(*) FROM entries"),
            sum_nano=one("SELECT COALESCE(SUM(nano_usd), 0) FROM entries"),
            unbalanced=one(
                "SELECT COUNT(*) FROM (SELECT 1 FROM transactions t LEFT JOIN entries e ON e.transaction_id = t.id "
                "GROUP BY t.id HAVING COALESCE(SUM(e.nano_usd), 1) != 0)"
            ),
            wrong_balances=one(
                "SELECT COUNT(*) FROM (SELECT 1 FROM accounts a LEFT JOIN entries e ON e.account_id = a.id "
                "GROUP BY a.id HAVING a.balance_nano != COALESCE(SUM(e.nano_usd), 0))"
            ),
            overspend_nano=one(
                "SELECT COALESCE(SUM(MAX(0, -paid)), 0) FROM (SELECT SUM(e.nano_usd) AS paid FROM entries e "
                "JOIN accounts a ON a.id = e.account_id WHERE a.kind IN ('wallet', 'held') GROUP BY a.customer)"
            ),
            unmetered=one(
                "SELECT COUNT(*) FROM transactions t JOIN entries e ON e.transaction_id = t.id AND e.account_id = 2 "
                "LEFT JOIN usage u ON u.request_id = t.reference "
                "WHERE t.kind = 'settle' AND (u.nano_usd IS NULL OR u.nano_usd != e.nano_usd)"
            ),
            held_nano=one(
                "SELECT (SELECT COALESCE(SUM(e.nano_usd), 0) FROM entries e JOIN accounts a ON a.id = e.account_id "
                "WHERE a.kind = 'held') - (SELECT COALESCE(SUM(nano_usd), 0) FROM holds WHERE state = 'open')"
            ),
        )

    def statement(self) -> list[dict[str, Any]]:
        """Per customer: paid in, spent, held and free nano-USD, requests and tokens by class."""
        rows = self.db.read(
            """
            SELECT w.customer, w.balance_nano AS free_nano, h.balance_nano AS held_nano,
                   COUNT(u.request_id) AS requests, COALESCE(SUM(u.nano_usd), 0) AS spent_nano,
                   COALESCE(SUM(u.prompt_tokens), 0) AS prompt_tokens,
                   COALESCE(SUM(u.cached_tokens), 0) AS cached_tokens,
                   COALESCE(SUM(u.completion_tokens), 0) AS completion_tokens,
                   (SELECT COALESCE(SUM(e.nano_usd), 0) FROM entries e JOIN transactions t ON t.id = e.transaction_id
                    WHERE t.kind = 'topup' AND e.account_id = w.id) AS paid_nano
            FROM accounts w JOIN accounts h ON h.customer = w.customer AND h.kind = 'held'
            LEFT JOIN usage u ON u.customer = w.customer
            WHERE w.kind = 'wallet' GROUP BY w.id ORDER BY w.customer
            """
        )
        return [dict(row) for row in rows]

    def _post(self, write: Any, kind: str, reference: str, entries: Iterable[tuple[int, int]]) -> None:
        entries = list(entries)
        if sum(nano_usd for _, nano_usd in entries) != 0:
            raise AssertionError(f"transaction {kind} {reference} does not sum to zero: {entries}")
        cursor = write(
            "INSERT INTO transactions (kind, reference, created) VALUES (?, ?, ?)", (kind, reference, self._clock())
        )
        for account, nano_usd in entries:
            write(
                "INSERT INTO entries (transaction_id, account_id, nano_usd) VALUES (?, ?, ?)",
                (cursor.lastrowid, account, nano_usd),
            )

    def _release(self, write: Any, request_id: str) -> bool:
        row = _close(write, request_id, "released")
        if row is None:
            return False
        customer, nano_usd = row
        wallet, held = _account(write, "wallet", customer), _account(write, "held", customer)
        self._post(write, "release", request_id, [(held, -nano_usd), (wallet, nano_usd)])
        return True

    def _release_where(self, condition: str, args: tuple[float, ...]) -> int:
        with self.db.transaction() as write:
            rows = write(f"SELECT request_id FROM holds WHERE state = 'open' AND {condition}", args).fetchall()
            return sum(self._release(write, row[0]) for row in rows)


def _account(write: Any, kind: str, customer: str) -> int:
    row = write("SELECT id FROM accounts WHERE kind = ? AND customer = ?", (kind, customer)).fetchone()
    if row is None:
        raise UserError(f"no account for customer {customer!r}; create a key for it first")
    return row[0]


def _close(write: Any, request_id: str, state: str) -> Any:
    """Takes the hold out of the open state; None if somebody else already did."""
    return write(
        "UPDATE holds SET state = ? WHERE request_id = ? AND state = 'open' RETURNING customer, nano_usd",
        (state, request_id),
    ).fetchone()
