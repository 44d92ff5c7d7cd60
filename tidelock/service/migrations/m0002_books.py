"""Books per customer: pockets that burn in order, a hash chain, holds that belong to a worker, prices as documents.

An old file's transactions are booked again, entry for entry, under the new account names and chained.
"""

from __future__ import annotations

import json
from typing import Any

from tidelock.service.chain import link
from tidelock.service.migrations import script

SCHEMA = """
CREATE TABLE customers (
    customer TEXT PRIMARY KEY,
    seq BIGINT NOT NULL,  -- of the newest transaction; a write must name the one it follows
    hash TEXT NOT NULL,   -- of the newest transaction
    created DOUBLE PRECISION NOT NULL
);

CREATE TABLE accounts (
    customer TEXT NOT NULL REFERENCES customers (customer),
    kind TEXT NOT NULL CHECK (kind IN ('cash', 'extra', 'plan', 'voucher', 'held', 'revenue', 'breakage', 'refunds',
                                       'outside', 'contra', 'receivable')),
    lot TEXT NOT NULL,  -- which voucher or plan period; '' for accounts there is one of
    expires DOUBLE PRECISION,
    -- projection of the sum of its entries; what a customer has can never be less than nothing
    balance_nano BIGINT NOT NULL,
    PRIMARY KEY (customer, kind, lot),
    CONSTRAINT balance_nano_not_negative CHECK (kind IN ('outside', 'contra', 'receivable') OR balance_nano >= 0)
);

CREATE TABLE transactions (
    customer TEXT NOT NULL REFERENCES customers (customer),
    seq BIGINT NOT NULL,
    kind TEXT NOT NULL,
    reference TEXT NOT NULL,  -- the payment's id for money that comes in, the request's for money that moves
    detail TEXT NOT NULL,     -- of a settlement: what was metered, as in the usage row
    created DOUBLE PRECISION NOT NULL,
    hash TEXT NOT NULL,       -- over all of the above, the entries, and the hash of the transaction before
    PRIMARY KEY (customer, seq),
    UNIQUE (kind, reference)
);

CREATE TABLE entries (
    customer TEXT NOT NULL,
    seq BIGINT NOT NULL,
    n BIGINT NOT NULL,
    kind TEXT NOT NULL,
    lot TEXT NOT NULL,
    nano_usd BIGINT NOT NULL,
    PRIMARY KEY (customer, seq, n),
    FOREIGN KEY (customer, seq) REFERENCES transactions (customer, seq)
);

CREATE TABLE holds (
    request_id TEXT PRIMARY KEY,
    customer TEXT NOT NULL REFERENCES customers (customer),
    key_id TEXT NOT NULL,
    model TEXT NOT NULL,
    price_version TEXT NOT NULL,
    mode TEXT NOT NULL,            -- which factors of the price book apply, e.g. 'batch'
    prompt_tokens BIGINT NOT NULL CHECK (prompt_tokens >= 0),
    max_tokens BIGINT NOT NULL CHECK (max_tokens >= 0),  -- of answer that the hold covers so far
    tools TEXT NOT NULL,           -- calls of paid tools that it covers, JSON {name: count}
    nano_usd BIGINT NOT NULL CHECK (nano_usd >= 0),
    parts TEXT NOT NULL,           -- where the money came from, JSON [[kind, lot, nano], ...] in burn order
    steps BIGINT NOT NULL,         -- transactions so far: the hold and its extensions
    progress BIGINT NOT NULL,      -- tokens of answer the client is known to have been sent
    worker TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('open', 'settled', 'released', 'lost')),
    created DOUBLE PRECISION NOT NULL,
    expires DOUBLE PRECISION NOT NULL
);
CREATE INDEX open_holds ON holds (expires) WHERE state = 'open';
CREATE INDEX open_holds_of_customer ON holds (customer) WHERE state = 'open';

CREATE TABLE usage (
    request_id TEXT PRIMARY KEY,
    customer TEXT NOT NULL REFERENCES customers (customer),
    key_id TEXT NOT NULL,
    model TEXT NOT NULL,
    price_version TEXT NOT NULL,
    mode TEXT NOT NULL,
    prompt_tokens BIGINT NOT NULL,  -- all of them, cached and written to the cache included
    cached_tokens BIGINT NOT NULL CHECK (cached_tokens >= 0),
    cache_write_5m_tokens BIGINT NOT NULL CHECK (cache_write_5m_tokens >= 0),
    cache_write_1h_tokens BIGINT NOT NULL CHECK (cache_write_1h_tokens >= 0),
    completion_tokens BIGINT NOT NULL CHECK (completion_tokens >= 0),
    tools TEXT NOT NULL,
    nano_usd BIGINT NOT NULL CHECK (nano_usd >= 0),
    credit_nano BIGINT NOT NULL CHECK (credit_nano BETWEEN 0 AND nano_usd),  -- the part paid by vouchers and plan credits
    finish_reason TEXT NOT NULL,
    created DOUBLE PRECISION NOT NULL,
    CHECK (cached_tokens + cache_write_5m_tokens + cache_write_1h_tokens <= prompt_tokens)
);
CREATE INDEX usage_by_customer ON usage (customer, created);

CREATE TABLE price_versions (
    version TEXT PRIMARY KEY,
    effective DOUBLE PRECISION NOT NULL,  -- from when on, seconds since 1970
    book TEXT NOT NULL                    -- the prices, JSON
);

CREATE TABLE workers (
    id TEXT PRIMARY KEY,
    machine TEXT NOT NULL,   -- boot and process namespace: within one, a process id says who lives
    process TEXT NOT NULL,   -- process id and its start time
    beats BIGINT NOT NULL,   -- grows while the worker lives
    created DOUBLE PRECISION NOT NULL
);

CREATE TABLE idempotency (
    customer TEXT NOT NULL,
    key TEXT NOT NULL,
    digest TEXT NOT NULL,      -- of the request's body
    worker TEXT NOT NULL,
    request_id TEXT NOT NULL,
    status BIGINT,             -- of the stored response; NULL while the request runs
    response TEXT,
    expires DOUBLE PRECISION NOT NULL,
    PRIMARY KEY (customer, key)
);
CREATE INDEX idempotency_by_expiry ON idempotency (expires);
"""

KEYS = """
CREATE TABLE keys (
    id TEXT PRIMARY KEY,
    hash TEXT NOT NULL UNIQUE,
    hint TEXT NOT NULL,
    customer TEXT NOT NULL,
    name TEXT NOT NULL,
    role TEXT NOT NULL CHECK (role IN ('user', 'admin')),
    training_consent INTEGER NOT NULL,
    may_grant INTEGER NOT NULL,
    created DOUBLE PRECISION NOT NULL,
    revoked DOUBLE PRECISION
);
"""

OLD = ("accounts", "transactions", "entries", "holds", "usage")
KINDS = {"cash": "outside", "wallet": "cash", "held": "held", "revenue": "revenue"}  # of the first release


def up(tx: Any, backend: Any) -> None:
    old = _take_old(tx) if backend.name == "sqlite" else None
    script(tx, SCHEMA)
    if old is None:
        script(tx, KEYS)
    else:
        _carry_over(tx, old)
    for table in ("transactions", "entries"):
        for statement in backend.append_only(table):
            tx(statement)


def _take_old(tx: Any) -> dict[str, list[Any]]:
    old = {table: tx(f"SELECT * FROM {table} ORDER BY rowid").fetchall() for table in (*OLD, "prices")}
    for trigger in ("entry_moves_balance", "entries_never_change", "entries_never_leave"):
        tx(f"DROP TRIGGER {trigger}")
    for table in ("usage", "entries", "transactions", "holds", "accounts", "prices"):
        tx(f"DROP TABLE {table}")
    return old


def _carry_over(tx: Any, old: dict[str, list[Any]]) -> None:
    owner = {account["id"]: account["customer"] for account in old["accounts"]}
    kind = {account["id"]: KINDS[account["kind"]] for account in old["accounts"]}
    balances = {(c, k): 0 for c in owner.values() if c for k in ("cash", "held", "outside", "revenue")}
    heads: dict[str, tuple[int, str]] = {c: (0, "") for c in owner.values() if c}
    moved: dict[int, list[tuple[str, int]]] = {}
    whose: dict[int, str] = {}
    for entry in old["entries"]:
        moved.setdefault(entry["transaction_id"], []).append((kind[entry["account_id"]], entry["nano_usd"]))
        whose[entry["transaction_id"]] = owner[entry["account_id"]] or whose.get(entry["transaction_id"], "")
    usage = {row["request_id"]: row for row in old["usage"]}
    transactions, entries = [], []
    for t in old["transactions"]:
        customer, parts = whose[t["id"]], moved[t["id"]]
        seq, before = heads[customer]
        detail = _detail(usage[t["reference"]]) if t["kind"] == "settle" else ""
        rows = [(k, "", nano) for k, nano in parts]
        hashed = link(before, customer, seq + 1, t["kind"], t["reference"], detail, t["created"], rows)
        transactions.append((customer, seq + 1, t["kind"], t["reference"], detail, t["created"], hashed))
        for n, (k, lot, nano) in enumerate(rows):
            entries.append((customer, seq + 1, n, k, lot, nano))
            balances[customer, k] += nano
        heads[customer] = (seq + 1, hashed)
    tx.insert("customers", ("customer", "seq", "hash", "created"), [(c, *head, 0.0) for c, head in heads.items()])
    tx.insert("accounts", ("customer", "kind", "lot", "expires", "balance_nano"),
              [(c, k, "", None, nano) for (c, k), nano in balances.items()])  # fmt: skip
    tx.insert("transactions", ("customer", "seq", "kind", "reference", "detail", "created", "hash"), transactions)
    tx.insert("entries", ("customer", "seq", "n", "kind", "lot", "nano_usd"), entries)
    for hold in old["holds"]:
        tx("INSERT INTO holds VALUES (?, ?, ?, ?, ?, '', ?, ?, '{}', ?, ?, 1, 0, '', ?, ?, ?)",
           (*hold[:7], hold["nano_usd"], json.dumps([["cash", "", hold["nano_usd"]]]), *hold[8:]))  # fmt: skip
    for row in old["usage"]:
        tx("INSERT INTO usage VALUES (?, ?, ?, ?, ?, '', ?, ?, 0, 0, ?, '{}', ?, 0, ?, ?)", tuple(row))
    books: dict[str, dict[str, Any]] = {}
    for p in old["prices"]:
        numbers = {"input": p["input_nano"], "cached_input": p["cached_input_nano"], "output": p["output_nano"]}
        books.setdefault(p["version"], {"models": {}, "modes": {"batch": [1, 2]}, "tools": {}})["models"][p["model"]] = numbers
    for version, book in books.items():
        tx("INSERT INTO price_versions VALUES (?, 0, ?)", (version, json.dumps(book, sort_keys=True)))


def _detail(u: Any) -> str:
    """What `books.Metered.detail` says of a usage row, as it stood when this step was written."""
    counts = (u["prompt_tokens"], u["cached_tokens"], 0, 0, u["completion_tokens"])
    return "|".join([u["model"], u["price_version"], "", *map(str, counts), "{}", str(u["nano_usd"]), "0"])
