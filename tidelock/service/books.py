"""Some customers' books, opened for one transaction: read and locked once, changed in memory, written in one go.

Every rule about money is here, as plain arithmetic on integers, the same for both databases. A batch of requests costs a
handful of statements, whatever its size. Two nets lie under the arithmetic: a transaction's primary key is its position
in the customer's chain, so nothing can be applied to books that changed since they were read, and the schema refuses a
balance below zero.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tidelock.service.budgets import Budgets
from tidelock.service.chain import link
from tidelock.service.db import Transaction
from tidelock.service.ladder import Ladder
from tidelock.service.limiter import Limiter, Standing
from tidelock.service.prices import Counts, Price, PriceBook, stored_book
from tidelock.service.windows import Allowance, left
from tidelock.tokens.errors import UserError

BURN_ORDER = ("voucher", "plan", "extra", "cash")  # within a kind: what expires first, first
WINDOWED = ("plan", "extra")  # pockets that may be bounded by windows of time
CREDIT = ("voucher", "plan")  # not money that was paid for this usage
HELD, REVENUE, OUTSIDE, RECEIVABLE = ("held", ""), ("revenue", ""), ("outside", ""), ("receivable", "")
REFUNDS = ("refunds", "")

AccountName = tuple[str, str]  # kind, lot
Entry = tuple[AccountName, int]


class InsufficientBalance(Exception):
    """The customer's pockets do not cover what was asked for."""


class BudgetReached(InsufficientBalance):
    """They do, and a hard budget does not."""


@dataclass(frozen=True)
class Admission:
    """What a request wants admitted: the prompt whole, and of `max_tokens` of answer as many as the pockets cover."""

    request_id: str
    customer: str
    key_id: str
    model: str
    price: Price
    price_version: str
    prompt_tokens: int
    max_tokens: int
    lifetime_s: float
    mode: str = ""
    least_tokens: int = 1  # of answer, or it is not worth beginning
    tools: Mapping[str, int] = field(default_factory=dict)
    burn: tuple[str, ...] = BURN_ORDER  # which pockets may pay, in order
    project: str = ""
    ladder: Ladder | None = None  # whose limits count; None: none do
    reserve: int = 0  # tokens, prompt and answer, that count against them
    budgeted: bool = False  # somebody has budgets: look whether they apply


@dataclass(frozen=True)
class Hold:
    """Money set aside for one request. It covers `max_tokens` of answer so far; `extend` covers more."""

    request_id: str
    customer: str
    key_id: str
    model: str
    price: Price
    price_version: str
    prompt_tokens: int
    max_tokens: int
    nano_usd: int
    mode: str = ""
    burn: tuple[str, ...] = BURN_ORDER
    standing: Standing = Standing()  # of the limits, right after this was admitted


@dataclass(frozen=True)
class Upstream:
    """Whose work a request was and what they say it used; stored beside the bill, to be compared with it. None: unsaid."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    name: str | None = None  # None: the engine in this process


@dataclass(frozen=True)
class Latency:
    """Milliseconds from a request's arrival: until the model was asked, until its first token, until the bill."""

    wait_ms: int | None = None
    first_ms: int | None = None
    total_ms: int | None = None


@dataclass(frozen=True)
class Metered:
    """What a request turned out to use, and why it ended."""

    counts: Counts
    finish_reason: str
    upstream: Upstream = Upstream()
    latency: Latency = Latency()


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


HOLD_COLUMNS = ("request_id", "customer", "key_id", "model", "price_version", "mode", "prompt_tokens", "max_tokens", "tools",
                "nano_usd", "parts", "steps", "progress", "worker", "state", "created", "expires", "project",
                "reserved", "budgets")  # fmt: skip
HOLD_CHANGES = ("max_tokens", "tools", "nano_usd", "parts", "steps", "progress", "state", "expires")
USAGE_COLUMNS = ("request_id", "customer", "key_id", "model", "price_version", "mode", "prompt_tokens", "cached_tokens",
                 "cache_write_5m_tokens", "cache_write_1h_tokens", "completion_tokens", "tools", "nano_usd", "credit_nano",
                 "finish_reason", "created", "upstream_prompt", "upstream_completion", "upstream_cached", "upstream",
                 "wait_ms", "first_ms", "total_ms")  # fmt: skip
TRANSACTION_COLUMNS = ("customer", "seq", "kind", "reference", "detail", "created", "hash")


class Books:
    """`requests` name the holds that will be touched; their customers are opened too."""

    def __init__(
        self, tx: Transaction, customers: Iterable[str], requests: Iterable[str] = (), *, now: float, worker: str = ""
    ) -> None:
        self._tx, self.now, self._worker = tx, float(now), worker
        self._books = self._open(sorted(set(customers)))
        self._holds = self._open_holds(sorted(set(requests)))
        self._new_holds: set[str] = set()
        self._changed_holds: set[str] = set()
        self._transactions: list[tuple] = []
        self._entries: list[tuple] = []
        self._usage: list[tuple] = []
        self._prices: dict[str, PriceBook] = {}
        self._booked: set[tuple[str, str]] = set()
        self._limiter = Limiter(tx, sorted(self._books), self.now)
        self._budgets = Budgets(tx, sorted(self._books), self.now)

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

    def _open_holds(self, requests: list[str]) -> dict[str, dict[str, Any]]:
        if not requests:
            return {}
        marks = ", ".join("?" * len(requests))
        sql = f"SELECT {', '.join(HOLD_COLUMNS)} FROM holds WHERE request_id IN ({marks})"
        return {row[0]: dict(zip(HOLD_COLUMNS, row, strict=True)) for row in self._tx(sql, requests).fetchall()}

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

    # ---- one request's life ------------------------------------------------------------------------------------

    def hold(self, ask: Admission) -> Hold:
        """Raises InsufficientBalance if the pockets do not cover the prompt, the tools and `least_tokens`, BudgetReached if
        only a budget does not, RateLimited if a limit is reached."""
        if ask.request_id in self._holds:
            raise AssertionError(f"request {ask.request_id} already has a hold")
        budgets = self._budgets.of(ask.customer, ask.project, ask.key_id) if ask.budgeted else ""
        pockets = self.pockets(ask.customer, ask.burn)
        covered = self._within_budget(ask.customer, budgets, pockets)
        affordable = ask.price.tokens_within(sum(nano for _, nano in covered), ask.prompt_tokens, ask.tools)
        if affordable < ask.least_tokens:
            if ask.price.tokens_within(sum(nano for _, nano in pockets), ask.prompt_tokens, ask.tools) < ask.least_tokens:
                raise InsufficientBalance(ask.customer)
            self._budgets.refused(ask.customer, budgets)
            raise BudgetReached(ask.customer)
        reserved, standing = "", Standing()
        if ask.ladder is not None:
            recharged = -self.balance(ask.customer, OUTSIDE) - self.balance(ask.customer, REFUNDS)
            reserved, standing = self._limiter.admit(
                ask.customer, ask.project, ask.key_id, ask.ladder, recharged, ask.reserve
            )
        self._limiter.opened(ask.customer, ask.project, ask.key_id)
        tokens = min(ask.max_tokens, affordable)
        nano_usd = ask.price.ceiling_nano(ask.prompt_tokens, tokens, ask.tools)
        parts = take(covered, nano_usd)
        self._holds[ask.request_id] = {
            "request_id": ask.request_id, "customer": ask.customer, "key_id": ask.key_id, "model": ask.model,
            "price_version": ask.price_version, "mode": ask.mode, "prompt_tokens": ask.prompt_tokens,
            "max_tokens": tokens, "tools": _json(ask.tools), "nano_usd": nano_usd, "parts": _parts_json(parts), "steps": 1,
            "progress": 0, "worker": self._worker, "state": "open", "created": self.now,
            "expires": self.now + ask.lifetime_s, "project": ask.project, "reserved": reserved,
            "budgets": budgets,
        }  # fmt: skip
        self._new_holds.add(ask.request_id)
        self._budgets.hold(ask.customer, budgets, nano_usd)
        self._set_aside(ask.customer, "hold", ask.request_id, parts)
        return Hold(
            ask.request_id, ask.customer, ask.key_id, ask.model, ask.price, ask.price_version, ask.prompt_tokens, tokens,
            nano_usd, ask.mode, ask.burn, standing,
        )  # fmt: skip

    def extend(
        self, asked: Hold, tokens: int, *, progress: int = 0, tools: Mapping[str, int] | None = None
    ) -> int:
        """Covers up to `tokens` more of answer and the tool calls; returns how many tokens more, 0 at the end of the
        money. `progress`: tokens the client has been sent so far; a crash after this is charged at least those.

        Raises InsufficientBalance if the tool calls are not covered, KeyError if the hold is no longer open.
        """
        request_id, price = asked.request_id, asked.price
        hold = self._open_hold(request_id)
        customer, called = hold["customer"], json.loads(hold["tools"])
        for name, count in (tools or {}).items():
            called[name] = called.get(name, 0) + count
        pockets = self._within_budget(customer, hold["budgets"], self.pockets(customer, asked.burn))
        within = hold["nano_usd"] + sum(nano for _, nano in pockets)
        more = min(tokens, price.tokens_within(within, hold["prompt_tokens"], called) - hold["max_tokens"])
        if more < 0 and tools:
            raise InsufficientBalance(customer)
        more = max(more, 0)
        hold["progress"] = max(hold["progress"], min(progress, hold["max_tokens"]))
        if more or tools:
            nano = price.ceiling_nano(hold["prompt_tokens"], hold["max_tokens"] + more, called) - hold["nano_usd"]
            parts = take(pockets, nano)
            hold["max_tokens"] += more
            hold["nano_usd"] += nano
            hold["tools"] = _json(called)
            hold["parts"] = _parts_json(_merge(_parts(hold), parts))
            hold["steps"] += 1
            self._budgets.hold(customer, hold["budgets"], nano)
            self._set_aside(customer, "extend", f"{request_id}/{hold['steps']}", parts)
        self._changed_holds.add(request_id)
        return more

    def settle(self, request_id: str, price: Price, metered: Metered) -> int:
        """Charges what was used, gives the rest back and writes the usage row; returns the charge.

        Counts are clamped to what the hold covers. A hold that is no longer open is charged nothing more: then this
        returns what it was charged (after an outage nobody knows whether the first attempt was written).
        """
        hold = self._holds.get(request_id)
        if hold is None:
            return 0
        if hold["state"] != "open":
            charged = self._tx("SELECT nano_usd FROM usage WHERE request_id = ?", (request_id,)).fetchone()
            return charged[0] if charged else 0
        used = _clamped(metered.counts, hold)
        return self._settle(hold, used, price.cost_nano(used), metered.finish_reason, "settled", metered.upstream, metered.latency)

    def lose(self, request_id: str) -> int | None:
        """Settles for a request whose server died: what is known to have been sent is charged, the rest is free.
        None if the hold is no longer open."""
        hold = self._holds.get(request_id)
        if hold is None or hold["state"] != "open":
            return None
        if hold["progress"]:
            used = Counts(hold["prompt_tokens"], completion=hold["progress"])
            return self._settle(hold, used, self._price(hold).cost_nano(used), "lost", "lost")
        return self._settle(hold, Counts(0), 0, "lost", "lost")

    def release(self, request_id: str) -> bool:
        """Gives a whole hold back. False if it is no longer open."""
        hold = self._holds.get(request_id)
        if hold is None or hold["state"] != "open":
            return False
        self._close(hold, "released", 0, 0)
        back = [(name, nano) for name, nano in _parts(hold)]
        self._give_back(hold, back)
        self.post(hold["customer"], "release", request_id, [(HELD, -hold["nano_usd"]), *back])
        return True

    def _settle(
        self, hold: dict[str, Any], used: Counts, cost: int, finish_reason: str, state: str,
        said: Upstream = Upstream(), took: Latency = Latency(),
    ) -> int:  # fmt: skip
        cost = min(cost, hold["nano_usd"])
        left, credit, back = cost, 0, []
        for name, nano in _parts(hold):
            spent = min(nano, left)
            left -= spent
            credit += spent if name[0] in CREDIT else 0
            back.append((name, nano - spent))
        self._give_back(hold, back)
        row = (
            hold["request_id"], hold["customer"], hold["key_id"], hold["model"], hold["price_version"], hold["mode"],
            used.prompt, used.cached, used.cache_write_5m, used.cache_write_1h, used.completion, _json(used.tools), cost,
            credit, finish_reason, self.now, said.prompt_tokens, said.completion_tokens, said.cached_tokens, said.name,
            took.wait_ms, took.first_ms, took.total_ms,
        )  # fmt: skip
        self._usage.append(row)
        self._close(hold, state, used.prompt + used.completion, cost)
        entries = [(HELD, -hold["nano_usd"]), (REVENUE, cost), *back]
        self.post(hold["customer"], "settle", hold["request_id"], entries, usage_detail(row))
        return cost

    def _within_budget(self, customer: str, budgets: str, pockets: list[Entry]) -> list[Entry]:
        left = self._budgets.left(customer, budgets)
        return pockets if left is None else take(pockets, left)

    def _close(self, hold: dict[str, Any], state: str, used_tokens: int, cost: int) -> None:
        hold["state"] = state
        self._changed_holds.add(hold["request_id"])
        self._limiter.opened(hold["customer"], hold["project"], hold["key_id"], by=-1)
        self._limiter.give_back(hold["customer"], hold["reserved"], used_tokens)
        self._budgets.close(hold["customer"], hold["budgets"], hold["nano_usd"], cost)

    def _set_aside(self, customer: str, kind: str, reference: str, parts: list[Entry]) -> None:
        total = sum(nano for _, nano in parts)
        for name, nano in parts:
            for allowance in self.allowances(customer) if name[0] in WINDOWED else ():
                if allowance.pocket == name[0]:
                    allowance.spend(nano, self.now)
        self.post(customer, kind, reference, [*((name, -nano) for name, nano in parts), (HELD, total)])

    def _give_back(self, hold: dict[str, Any], back: list[Entry]) -> None:
        """To the windows what comes back to the pockets."""
        for name, nano in back:
            for allowance in self.allowances(hold["customer"]) if nano and name[0] in WINDOWED else ():
                if allowance.pocket == name[0]:
                    allowance.give_back(nano, hold["created"], self.now)

    def _open_hold(self, request_id: str) -> dict[str, Any]:
        hold = self._holds[request_id]
        if hold["state"] != "open":
            raise KeyError(request_id)
        return hold

    def _price(self, hold: dict[str, Any]) -> Price:
        version = hold["price_version"]
        if version not in self._prices:
            sql = "SELECT version, effective, book FROM price_versions WHERE version = ?"
            self._prices[version] = stored_book(self._tx(sql, (version,)).fetchall(), version)
        return self._prices[version].price(hold["model"], hold["mode"])

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
        tx.insert("holds", HOLD_COLUMNS, [tuple(self._holds[r][column] for column in HOLD_COLUMNS) for r in self._new_holds])
        changed = [self._holds[r] for r in self._changed_holds - self._new_holds]
        rows = [(h["request_id"], *(h[column] for column in HOLD_CHANGES)) for h in changed]
        tx.update("holds", ("request_id",), HOLD_CHANGES, rows)
        tx.insert("transactions", TRANSACTION_COLUMNS, self._transactions)
        tx.insert("entries", ("customer", "seq", "n", "kind", "lot", "nano_usd"), self._entries)
        tx.insert("usage", USAGE_COLUMNS, self._usage)
        spent = [
            (customer, a.pocket, a.span, a.limit_nano, a.started, a.ends, a.used_nano)
            for customer, book in self._books.items() for a in book.allowances or () if a.changed
        ]  # fmt: skip
        tx.update("allowances", ("customer", "pocket", "span"), ("limit_nano", "started", "ends", "used_nano"), spent)
        self._limiter.write()
        self._budgets.write()


def usage_detail(row: Sequence[Any]) -> str:
    """The metered part of a usage row (in USAGE_COLUMNS' order) as text: it goes into the hash chain, so a usage row
    that is edited later no longer fits its transaction."""
    return "|".join(str(row[n]) for n in (3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13))


def _clamped(counts: Counts, hold: dict[str, Any]) -> Counts:
    """Absurd counts (negative, or more than was held) must never become a refund or an overdraft."""
    prompt = min(max(counts.prompt, 0), hold["prompt_tokens"])
    cached = min(max(counts.cached, 0), prompt)
    write_5m = min(max(counts.cache_write_5m, 0), prompt - cached)
    write_1h = min(max(counts.cache_write_1h, 0), prompt - cached - write_5m)
    completion = min(max(counts.completion, 0), hold["max_tokens"])
    covered = json.loads(hold["tools"])
    tools = {name: min(max(count, 0), covered.get(name, 0)) for name, count in counts.tools.items()}
    return replace(Counts(prompt, cached, write_5m, write_1h, completion), tools={k: n for k, n in tools.items() if n})


def take(pockets: list[Entry], nano_usd: int) -> list[Entry]:
    """What each pocket gives, in order, until there is enough or there are no more."""
    taken = []
    for name, balance in pockets:
        if nano_usd <= 0:
            break
        taken.append((name, min(balance, nano_usd)))
        nano_usd -= taken[-1][1]
    return taken


def _merge(parts: list[Entry], more: list[Entry]) -> list[Entry]:
    merged = dict(parts)
    for name, nano in more:
        merged[name] = merged.get(name, 0) + nano
    return list(merged.items())


def _parts(hold: dict[str, Any]) -> list[Entry]:
    return [((kind, lot), nano) for kind, lot, nano in json.loads(hold["parts"])]


def _parts_json(parts: list[Entry]) -> str:
    return _json([[*name, nano] for name, nano in parts])


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
