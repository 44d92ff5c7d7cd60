"""Some customers' accounts, opened for one transaction: read and locked once, posted to in memory, written in one go.

A batch costs a handful of statements, whatever its size. Two nets lie under the arithmetic: a transaction's primary key is
its position in the customer's chain, so nothing can be applied to accounts that changed since they were read, and the
schema refuses a balance below zero. What requests do with the money is in `books`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from tidelock.service.bookings import BURN_ORDER
from tidelock.service.chain import link
from tidelock.service.db import Transaction
from tidelock.service.windows import Allowance, left
from tidelock.tokens.errors import UserError

WINDOWED = ("plan", "extra")  # pockets that may be bounded by windows of time
CREDIT = ("voucher", "plan")  # not money that was paid for this usage
HELD, REVENUE, OUTSIDE, RECEIVABLE = ("held", ""), ("revenue", ""), ("outside", ""), ("receivable", "")
REFUNDS = ("refunds", "")

MOST_NANO = 2**63  # beyond it SQLite would count in floats

AccountName = tuple[str, str]  # kind, lot
Entry = tuple[AccountName, int]
TRANSACTION_COLUMNS = ("customer", "seq", "kind", "reference", "detail", "created", "hash")


@dataclass
class _Account:
    balance: int
    expires: float | None
    stored: bool
    changed: bool = False


@dataclass
class _Book:
    seq: int
    hash: str
    new: bool  # has no row yet
    wanted: bool = False  # gets one even without a transaction
    moved: bool = False
    accounts: dict[AccountName, _Account] = field(default_factory=dict)
    allowances: list[Allowance] | None = None  # read when they are needed


class Posting:
    def __init__(self, tx: Transaction, customers: Iterable[str], *, now: float) -> None:
        self._tx, self.now = tx, float(now)
        self._books = self._open(sorted(set(customers)))
        self._transactions: list[tuple] = []
        self._entries: list[tuple] = []
        self._booked: set[tuple[str, str]] = set()

    # ---- reading, under the lock -------------------------------------------------------------------------------

    def _open(self, customers: list[str]) -> dict[str, _Book]:
        if not customers:
            return {}
        marks = ", ".join("?" * len(customers))
        heads = self._tx(
            f"SELECT customer, seq, hash FROM customers WHERE customer IN ({marks}) ORDER BY customer{self._tx.for_update}",
            customers,
        ).fetchall()
        books = {customer: _Book(0, "", new=True) for customer in customers}
        books |= {customer: _Book(seq, hashed, new=False) for customer, seq, hashed in heads}
        rows = self._tx(
            f"SELECT customer, kind, lot, balance_nano, expires FROM accounts WHERE customer IN ({marks}) "
            "AND (balance_nano <> 0 OR lot = '' OR expires > ?)",
            [*customers, self.now],
        ).fetchall()
        for customer, kind, lot, balance, expires in rows:
            books[customer].accounts[kind, lot] = _Account(balance, expires, stored=True)
        return books

    def _account(self, customer: str, name: AccountName) -> _Account:
        accounts = self._books[customer].accounts
        if name not in accounts:
            row = None
            if name[1]:  # an emptied voucher or plan period was not read
                sql = "SELECT balance_nano, expires FROM accounts WHERE customer = ? AND kind = ? AND lot = ?"
                row = self._tx(sql, (customer, *name)).fetchone()
            accounts[name] = _Account(row[0], row[1], stored=True) if row else _Account(0, None, stored=False)
        return accounts[name]

    @property
    def execute(self) -> Transaction:
        """The transaction itself, for rows that must be written with ours or not at all."""
        return self._tx

    def pockets(self, customer: str, burn: Sequence[str] = BURN_ORDER) -> list[tuple[AccountName, int]]:
        """What may be spent, in burn order: (account, nano-USD)."""
        found = [
            (burn.index(name[0]), account.expires or float("inf"), name, account.balance)
            for name, account in self._books[customer].accounts.items()
            if name[0] in burn and account.balance > 0 and (account.expires is None or account.expires > self.now)
        ]
        pockets = []
        free: dict[str, int | None] = {}
        for _, _, name, balance in sorted(found):
            if name[0] in WINDOWED:  # all its lots share what its windows leave
                left_nano = free.setdefault(name[0], left(self.allowances(customer), name[0], self.now))
                if left_nano is not None:
                    balance = min(balance, left_nano)
                    free[name[0]] = left_nano - balance
            if balance:
                pockets.append((name, balance))
        return pockets

    def allowances(self, customer: str) -> list[Allowance]:
        """What may be spent of which pocket within which window."""
        book = self._books[customer]
        if book.allowances is None:
            sql = "SELECT pocket, span, limit_nano, anchor, started, ends, used_nano FROM allowances WHERE customer = ?"
            book.allowances = [Allowance(*row) for row in self._tx(sql, (customer,)).fetchall()]
        return book.allowances

    def set_allowance(self, customer: str, allowance: Allowance | None, pocket: str, span: str) -> None:
        """Instead of the one there may be; None: none."""
        kept = [a for a in self.allowances(customer) if (a.pocket, a.span) != (pocket, span)]
        self._tx("DELETE FROM allowances WHERE customer = ? AND pocket = ? AND span = ?", (customer, pocket, span))
        if allowance is not None:
            self._tx("INSERT INTO allowances (customer, pocket, span, limit_nano, anchor, started, ends, used_nano) "
                     "VALUES (?, ?, ?, ?, ?, 0, 0, 0)", (customer, pocket, span, allowance.limit_nano, allowance.anchor))  # fmt: skip
            kept.append(allowance)
        self._books[customer].allowances = kept

    def end_pocket(self, customer: str, name: AccountName) -> None:
        """It expires now."""
        self._account(customer, name).expires = self.now
        self._tx("UPDATE accounts SET expires = ? WHERE customer = ? AND kind = ? AND lot = ?", (self.now, customer, *name))

    def exists(self, customer: str) -> bool:
        book = self._books[customer]
        return not book.new or book.wanted

    def create(self, customer: str) -> None:
        self._books[customer].wanted = True

    # ---- posting -----------------------------------------------------------------------------------------------

    def post(self, customer: str, kind: str, reference: str, entries: Iterable[Entry], detail: str = "") -> None:
        """Books one transaction. Its entries must sum to zero, and no pocket may fall below it."""
        book, rows = self._books[customer], [(name, nano) for name, nano in entries if nano]
        if sum(nano for _, nano in rows) != 0:
            raise AssertionError(f"transaction {kind} {reference} does not sum to zero: {rows}")
        seq = book.seq + 1
        named = [(*name, nano) for name, nano in rows]
        hashed = link(book.hash, customer, seq, kind, reference, detail, self.now, named)
        for n, (name, nano) in enumerate(rows):
            account = self._account(customer, name)
            account.balance += nano
            account.changed = True
            if not -MOST_NANO < account.balance < MOST_NANO:
                raise UserError(f"{customer!r} would have more than the books can hold in {'/'.join(filter(None, name))}")
            self._entries.append((customer, seq, n, *name, nano))
        self._booked.add((kind, reference))
        self._transactions.append((customer, seq, kind, reference, detail, self.now, hashed))
        book.seq, book.hash, book.moved = seq, hashed, True

    def booked(self, kind: str, reference: str) -> bool:
        """Whether there is a transaction of this kind with this reference, of whatever customer."""
        if (kind, reference) in self._booked:
            return True
        sql = "SELECT 1 FROM transactions WHERE kind = ? AND reference = ?"
        return self._tx(sql, (kind, reference)).fetchone() is not None

    def open_pocket(self, customer: str, name: AccountName, expires: float | None) -> None:
        account = self._account(customer, name)
        if not account.stored:
            account.expires, account.changed = expires, True

    def balance(self, customer: str, name: AccountName) -> int:
        return self._account(customer, name).balance

    # ---- writing -----------------------------------------------------------------------------------------------

    def write(self) -> None:
        """Writes everything. Raises Conflict, and the transaction must be abandoned, if the books changed meanwhile."""
        tx, now = self._tx, self.now
        new = [(c, b.seq, b.hash, now) for c, b in self._books.items() if b.new and (b.seq or b.wanted)]
        tx.insert("customers", ("customer", "seq", "hash", "created"), new)
        moved = [(c, b.seq, b.hash) for c, b in self._books.items() if not b.new and b.moved]
        tx.update("customers", ("customer",), ("seq", "hash"), moved)
        fresh, known = [], []
        for customer, book in self._books.items():
            for name, account in book.accounts.items():
                if account.changed and account.stored:
                    known.append((customer, *name, account.balance))
                elif account.changed:
                    fresh.append((customer, *name, account.expires, account.balance))
        tx.insert("accounts", ("customer", "kind", "lot", "expires", "balance_nano"), fresh)
        tx.update("accounts", ("customer", "kind", "lot"), ("balance_nano",), known)
        tx.insert("transactions", TRANSACTION_COLUMNS, self._transactions)
        tx.insert("entries", ("customer", "seq", "n", "kind", "lot", "nano_usd"), self._entries)
        spent = [
            (customer, a.pocket, a.span, a.limit_nano, a.started, a.ends, a.used_nano)
            for customer, book in self._books.items() for a in book.allowances or () if a.changed
        ]  # fmt: skip
        tx.update("allowances", ("customer", "pocket", "span"), ("limit_nano", "started", "ends", "used_nano"), spent)


def take(pockets: list[Entry], nano_usd: int) -> list[Entry]:
    """What each pocket gives, in order, until there is enough or there are no more."""
    taken = []
    for name, balance in pockets:
        if nano_usd <= 0:
            break
        taken.append((name, min(balance, nano_usd)))
        nano_usd -= taken[-1][1]
    return taken
