"""One request's money in some customers' books: hold, extend, settle, lose, release, with the limits and budgets it meets.

Every rule about it is here, as plain arithmetic on integers, the same for both databases; `posting` reads, locks and writes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from tidelock.service.bookings import (
    BURN_ORDER, Admission, BudgetReached, Hold, InsufficientBalance, Latency, Metered, Upstream,
)  # fmt: skip
from tidelock.service.budgets import Budgets
from tidelock.service.db import Transaction
from tidelock.service.limiter import Limiter, Standing
from tidelock.service.posting import (
    CREDIT, HELD, OUTSIDE, RECEIVABLE, REFUNDS, REVENUE, WINDOWED, AccountName, Entry, Posting, take,
)  # fmt: skip
from tidelock.service.prices import Counts, Price, PriceBook, stored_book

__all__ = ["BURN_ORDER", "OUTSIDE", "RECEIVABLE", "REFUNDS", "REVENUE", "USAGE_COLUMNS", "AccountName", "Admission", "Books",
           "BudgetReached", "Hold", "InsufficientBalance", "Latency", "Metered", "Upstream", "take", "usage_detail"]  # fmt: skip

HOLD_COLUMNS = ("request_id", "customer", "key_id", "model", "price_version", "mode", "prompt_tokens", "max_tokens", "tools",
                "nano_usd", "parts", "steps", "progress", "worker", "state", "created", "expires", "project",
                "reserved", "budgets")  # fmt: skip
HOLD_CHANGES = ("max_tokens", "tools", "nano_usd", "parts", "steps", "progress", "state", "expires")
USAGE_COLUMNS = ("request_id", "customer", "key_id", "model", "price_version", "mode", "prompt_tokens", "cached_tokens",
                 "cache_write_5m_tokens", "cache_write_1h_tokens", "completion_tokens", "tools", "nano_usd", "credit_nano",
                 "finish_reason", "created", "upstream_prompt", "upstream_completion", "upstream_cached", "upstream",
                 "wait_ms", "first_ms", "total_ms", "queue_ms", "prefill_ms", "decode_ms")  # fmt: skip


class Books(Posting):
    """`requests` name the holds that will be touched; their customers are opened too."""

    def __init__(
        self, tx: Transaction, customers: Iterable[str], requests: Iterable[str] = (), *, now: float, worker: str = ""
    ) -> None:
        super().__init__(tx, customers, now=now)
        self._worker = worker
        self._holds = self._open_holds(sorted(set(requests)))
        self._new_holds: set[str] = set()
        self._changed_holds: set[str] = set()
        self._usage: list[tuple] = []
        self._prices: dict[str, PriceBook] = {}
        self._limiter = Limiter(tx, sorted(self._books), self.now)
        self._budgets = Budgets(tx, sorted(self._books), self.now)

    def _open_holds(self, requests: list[str]) -> dict[str, dict[str, Any]]:
        if not requests:
            return {}
        marks = ", ".join("?" * len(requests))
        sql = f"SELECT {', '.join(HOLD_COLUMNS)} FROM holds WHERE request_id IN ({marks})"
        return {row[0]: dict(zip(HOLD_COLUMNS, row, strict=True)) for row in self._tx(sql, requests).fetchall()}

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

        Raises InsufficientBalance if the tool calls are not covered, BudgetReached if a budget and not the money ended,
        KeyError if the hold is no longer open.
        """
        request_id, price = asked.request_id, asked.price
        hold = self._open_hold(request_id)
        customer, called = hold["customer"], json.loads(hold["tools"])
        for name, count in (tools or {}).items():
            called[name] = called.get(name, 0) + count
        purse = self.pockets(customer, asked.burn)
        pockets = self._within_budget(customer, hold["budgets"], purse)
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
        if not more and not tools and pockets != purse:
            self._budgets.refused(customer, hold["budgets"])
            raise BudgetReached(customer)
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
            took.wait_ms, took.first_ms, took.total_ms, took.queue_ms, took.prefill_ms, took.decode_ms,
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
        super().write()
        tx = self._tx
        tx.insert("holds", HOLD_COLUMNS, [tuple(self._holds[r][column] for column in HOLD_COLUMNS) for r in self._new_holds])
        changed = [self._holds[r] for r in self._changed_holds - self._new_holds]
        rows = [(h["request_id"], *(h[column] for column in HOLD_CHANGES)) for h in changed]
        tx.update("holds", ("request_id",), HOLD_CHANGES, rows)
        tx.insert("usage", USAGE_COLUMNS, self._usage)
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
    if not counts.tools:
        return Counts(prompt, cached, write_5m, write_1h, completion)
    covered = json.loads(hold["tools"])
    tools = {name: min(max(count, 0), covered.get(name, 0)) for name, count in counts.tools.items()}
    return Counts(prompt, cached, write_5m, write_1h, completion, {k: n for k, n in tools.items() if n})


def _merge(parts: list[Entry], more: list[Entry]) -> list[Entry]:
    merged = dict(parts)
    for name, nano in more:
        merged[name] = merged.get(name, 0) + nano
    return list(merged.items())


def _parts(hold: dict[str, Any]) -> list[Entry]:
    return [((kind, lot), nano) for kind, lot, nano in msgspec.json.decode(hold["parts"])]


def _parts_json(parts: list[Entry]) -> str:
    return _json([[*name, nano] for name, nano in parts])


_encode = msgspec.json.Encoder(order="deterministic").encode


def _json(value: Any) -> str:
    return _encode(value).decode() if value else "[]" if isinstance(value, list) else "{}"
