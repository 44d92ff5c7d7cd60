"""Receipts: one request, what it used, what it cost and why it ended; settled ones and refused ones in one list, newest
first. A receipt's detail has every ledger entry of the request and its price computed again, line by line.

Everything is read from rows that settlements wrote; nothing here is an estimate.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tidelock.service.accounts import UnknownId
from tidelock.service.db import Database
from tidelock.service.keys import LIVE, Key
from tidelock.service.prices import Counts, Price, stored_book
from tidelock.service.rating import counts

NO_NUMBER = "CAST(NULL AS BIGINT)"
LATENCY = ("wait_ms", "first_ms", "total_ms", "queue_ms", "prefill_ms", "decode_ms")  # the last three are the engine's own
COLUMNS = (  # name, of a settled request (usage u), of one that was refused and cost nothing (refused u)
    ("settled", "1", "0"),
    *((name, f"u.{name}", f"u.{name}") for name in ("request_id", "created", "key_id", "model")),
    *((name, f"u.{name}", "''") for name in ("mode", "price_version", "finish_reason")),
    *((name, f"u.{name}", "0") for name in ("prompt_tokens", "cached_tokens", "cache_write_5m_tokens", "cache_write_1h_tokens",
                                            "completion_tokens", "nano_usd", "credit_nano")),
    ("tools", "u.tools", "'{}'"),
    *((name, f"u.{name}", NO_NUMBER) for name in LATENCY),
    ("held_nano", "h.nano_usd", NO_NUMBER),
    *((name, f"r.{name}", f"u.{name}") for name in ("cause", "status", "message")),
    ("key_name", "k.name", "k.name"), ("project", "k.project", "k.project"), ("project_name", "p.name", "p.name"),
)  # fmt: skip
WHOSE = "LEFT JOIN keys k ON k.id = u.key_id LEFT JOIN projects p ON p.id = k.project WHERE u.customer = ?"
# One that was cut short after its beginning is in both tables: it is a settled one, with a cause.
SETTLED = f"""SELECT {", ".join(f"{settled} AS {name}" for name, settled, _ in COLUMNS)}
FROM usage u LEFT JOIN holds h ON h.request_id = u.request_id LEFT JOIN refused r ON r.request_id = u.request_id {WHOSE}"""
REFUSED = f"""SELECT {", ".join(f"{refused} AS {name}" for name, _, refused in COLUMNS)}
FROM refused u {WHOSE} AND NOT EXISTS (SELECT 1 FROM usage s WHERE s.request_id = u.request_id)"""
FILTERS = {
    "model": "u.model",
    "api_key_id": "u.key_id",
    "project_id": "k.project",
    "start_time": "u.created >=",
    "end_time": "u.created <",
}
OUTCOMES = ("stop", "length", "abort", "lost", "refused")
NEWEST = "ORDER BY u.created DESC, u.request_id DESC"


def page(
    db: Database,
    customer: str,
    wanted: Mapping[str, Any],
    *,
    after: str | None = None,
    limit: int = 20,
    oldest_first: bool = False,
) -> tuple[list[dict[str, Any]], bool]:
    """(receipts from behind `after` on, whether there are more). `wanted`: values of FILTERS and an `outcome`.
    Raises UnknownId for an `after` that is no request of this customer."""
    where, args = "", [customer]
    for name, column in FILTERS.items():
        if wanted.get(name) is not None:
            where += f" AND {column} ?" if column.endswith(("=", "<")) else f" AND {column} = ?"
            args.append(wanted[name])
    if after is not None:
        created, sign = _when(db, customer, after), ">" if oldest_first else "<"
        where += f" AND u.created {sign}= ? AND (u.created {sign} ? OR u.request_id {sign} ?)"
        args += [created, created, after]
    order = f"{NEWEST.replace('DESC', 'ASC') if oldest_first else NEWEST} LIMIT {limit + 1}"
    outcome = wanted.get("outcome")
    rows: list[Any] = []
    if outcome != "refused":
        finish = ""
        if outcome in OUTCOMES:  # said and not bound, for the partial index of those that are rare
            finish = f" AND u.finish_reason = '{outcome}'"
        elif outcome:
            finish, args = " AND u.finish_reason = ?", [*args, outcome]
        rows += db.read(f"{SETTLED}{where}{finish} {order}", args)
    if outcome in (None, "refused"):
        rows += db.read(f"{REFUSED}{where} {order}", args)
    rows.sort(key=lambda row: (row["created"], row["request_id"]), reverse=not oldest_first)
    return [shown(row) for row in rows[:limit]], len(rows) > limit


LATELY = f"AND u.created > ? AND EXISTS ({LIVE} AND keys.id = ?) {NEWEST} LIMIT ?"
TAIL = f"SELECT * FROM ({SETTLED} {LATELY}) AS s UNION ALL SELECT * FROM ({REFUSED} {LATELY}) AS r"


async def since(db: Database, key: Key, created: float, most: int) -> list[dict[str, Any]]:
    """The newest receipts after a moment, newest first, in one query for both kinds; nothing once the key has ended."""
    rows = await db.fetch(TAIL, (key.customer, created, key.id, most) * 2)
    rows.sort(key=lambda row: (row["created"], row["request_id"]), reverse=True)
    return [shown(row) for row in rows[:most]]


def one(db: Database, customer: str, request_id: str) -> dict[str, Any]:
    """With the ledger's entries and the price, line by line. Raises UnknownId."""
    rows = db.read(f"{SETTLED} AND u.request_id = ?", (customer, request_id))
    if not rows:
        refused = db.read(f"{REFUSED} AND u.request_id = ?", (customer, request_id))
        if not refused:
            raise UnknownId(f"no receipt {request_id!r}")
        return {
            **shown(refused[0]),
            "price": None,
            "hold": None,
            "transactions": [],
            "sum_nano_usd": 0,
            "adjustments": [],
        }
    row = rows[0]
    adjusted = [
        {"price_version": r[0], "nano_usd": r[1], "created_at": int(r[2])}
        for r in db.read(
            "SELECT price_version, nano_usd, created FROM adjustments WHERE request_id = ? ORDER BY created",
            (request_id,),
        )
    ]
    moved = _transactions(db, customer, request_id, [a["price_version"] for a in adjusted])
    return {
        **shown(row),
        "price": priced(db, row),
        "hold": _hold(db, request_id),
        "transactions": moved,
        "sum_nano_usd": sum(entry["nano_usd"] for t in moved for entry in t["entries"]),
        "adjustments": adjusted,
    }


def priced(db: Database, row: Any) -> dict[str, Any]:
    """What the row's version of the price book says that it costs: list price per line, factor, total."""
    version = row["price_version"]
    book = stored_book(
        db.read("SELECT version, effective, book FROM price_versions WHERE version = ?", (version,)), version
    )
    price, used = book.price(row["model"], row["mode"]), counts(row)
    lines = [
        {"item": item, "quantity": quantity, "nano_usd_each": each, "nano_usd": quantity * each}
        for item, quantity, each in _lines(price, used)
        if quantity
    ]
    total = price.cost_nano(used)
    return {
        "version": version,
        "lines": lines,
        "list_nano_usd": sum(line["nano_usd"] for line in lines),
        "factor": list(price.factor),
        "total_nano_usd": total,
        "agrees": total == row["nano_usd"],
    }


def _lines(price: Price, used: Counts) -> list[tuple[str, int, int]]:
    """(item, how many, nano-USD each), as `Price.cost_nano` adds them up."""
    write_5m = price.input_nano if price.cache_write_5m_nano is None else price.cache_write_5m_nano
    write_1h = price.input_nano if price.cache_write_1h_nano is None else price.cache_write_1h_nano
    return [
        ("input", used.fresh, price.input_nano),
        ("cached input", used.cached, price.cached_input_nano),
        ("cache write, 5 minutes", used.cache_write_5m, write_5m),
        ("cache write, 1 hour", used.cache_write_1h, write_1h),
        ("output", used.completion, price.output_nano),
        *((f"call of {name}", count, price.tools[name]) for name, count in sorted(used.tools.items())),
    ]


def shown(row: Any) -> dict[str, Any]:
    settled = bool(row["settled"])
    receipt = {
        "object": "organization.receipt",
        "id": row["request_id"],
        "created_at": int(row["created"]),
        "created_ms": int(row["created"] * 1000),
        "status": "settled" if settled else "refused",
        "model": row["model"],
        "api_key_id": row["key_id"],
        "api_key_name": row["key_name"],
        "project_id": row["project"],
        "project_name": row["project_name"],
        "cause": row["cause"],
        "http_status": row["status"],
        "message": row["message"] or None,
    }
    if not settled:
        return {
            **receipt,
            "mode": None,
            "price_version": None,
            "tokens": None,
            "tools": {},
            "cost_nano_usd": 0,
            "credit_nano_usd": 0,
            "held_nano_usd": None,
            "finish_reason": None,
            "latency": None,
        }
    used = counts(row)
    return {
        **receipt,
        "mode": row["mode"] or None,
        "price_version": row["price_version"],
        "tokens": {
            "fresh": used.fresh,
            "cached": used.cached,
            "cache_write_5m": used.cache_write_5m,
            "cache_write_1h": used.cache_write_1h,
            "output": used.completion,
        },
        "tools": json.loads(row["tools"]),
        "cost_nano_usd": row["nano_usd"],
        "credit_nano_usd": row["credit_nano"],
        "held_nano_usd": row["held_nano"],
        "finish_reason": row["finish_reason"],
        "latency": None if row["total_ms"] is None else {n: row[n] for n in LATENCY},
    }


def _when(db: Database, customer: str, request_id: str) -> float:
    sql = (
        "SELECT created FROM usage WHERE customer = ? AND request_id = ? UNION ALL "
        "SELECT created FROM refused WHERE customer = ? AND request_id = ?"
    )
    rows = db.read(sql, (customer, request_id, customer, request_id))
    if not rows:
        raise UnknownId(f"no receipt {request_id!r}")
    return rows[0][0]


def _hold(db: Database, request_id: str) -> dict[str, Any] | None:
    rows = db.read(
        "SELECT nano_usd, max_tokens, steps, state, created, expires, parts FROM holds WHERE request_id = ?",
        (request_id,),
    )
    if not rows:
        return None
    row = rows[0]
    parts = [{"account": kind, "lot": lot, "nano_usd": nano} for kind, lot, nano in json.loads(row["parts"])]
    return {
        "nano_usd": row["nano_usd"],
        "max_tokens": row["max_tokens"],
        "steps": row["steps"],
        "state": row["state"],
        "created_at": int(row["created"]),
        "expires_at": int(row["expires"]),
        "from": parts,
    }


def _transactions(db: Database, customer: str, request_id: str, versions: list[str]) -> list[dict[str, Any]]:
    """All that the books did for this request, oldest first."""
    steps = db.read("SELECT steps FROM holds WHERE request_id = ?", (request_id,))
    names = [("hold", request_id), ("settle", request_id), ("release", request_id)]
    names += [("extend", f"{request_id}/{n}") for n in range(2, (steps[0][0] if steps else 1) + 1)]
    names += [("rerate", f"{request_id}/{version}") for version in versions]
    found: dict[int, dict[str, Any]] = {}
    for start in range(0, len(names), 100):  # an answer in very many stretches has as many extensions
        part = names[start : start + 100]
        where = " OR ".join("(t.kind = ? AND t.reference = ?)" for _ in part)
        rows = db.read(
            "SELECT t.seq, t.kind, t.reference, t.created, t.hash, e.kind AS account, e.lot, e.nano_usd FROM transactions t "
            f"JOIN entries e ON e.customer = t.customer AND e.seq = t.seq WHERE t.customer = ? AND ({where}) ORDER BY t.seq, e.n",
            [customer, *(word for name in part for word in name)],
        )
        for row in rows:
            t = found.setdefault(
                row["seq"],
                {
                    "seq": row["seq"],
                    "kind": row["kind"],
                    "reference": row["reference"],
                    "created_ms": int(row["created"] * 1000),
                    "hash": row["hash"],
                    "entries": [],
                },
            )
            t["entries"].append({"account": row["account"], "lot": row["lot"], "nano_usd": row["nano_usd"]})
    return [found[seq] for seq in sorted(found)]
