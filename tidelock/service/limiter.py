"""Rate limits as part of the books: admission and give-back happen under the customer's lock, in the transaction of the
hold, so they hold across workers and nothing is checked that is not also taken.

Each count is a bucket that drains at limit per period: a request is admitted if what is in it and what the request may
use, prompt and the most of answer it may get, fit under the limit. At the end the unused part comes out again, less what
has drained meanwhile anyway. How many requests run is not a counter: it is the number of open holds.
All in integers: a level is tokens times the period's milliseconds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import msgspec
from msgspec import Struct

from tidelock.service.db import Transaction
from tidelock.service.ladder import NONE, Ladder, Limits

PERIOD_MS = {"requests": 60_000, "tokens": 60_000, "day_tokens": 86_400_000}
SHORT = {"concurrency": "concurrency", "requests": "RPM", "tokens": "TPM", "day_tokens": "TPD"}
# Clocks of several workers differ by less. One that is behind by more was put right since, and buckets drain from there on:
# otherwise nobody's would until it has caught up.
SKEW_MS = 60_000
RETRY_WHEN_FULL_S = 1  # nobody knows when a running request ends


class RateLimited(Exception):
    """`retry_s` is None if waiting does not help: the request is larger than the limit."""

    def __init__(self, which: str, current: int, limit: int, retry_s: int | None, standing: Standing) -> None:
        super().__init__(f"{SHORT[which]} {current} of {limit}")
        self.which, self.current, self.limit, self.retry_s, self.standing = which, current, limit, retry_s, standing


class Gauge(Struct, frozen=True, gc=False):
    limit: int
    remaining: int
    reset_ms: int  # until all of it is free again


class Standing(Struct, frozen=True, gc=False):
    """The scarcest of each kind that counts for a key, as of now."""

    requests: Gauge | None = None
    tokens: Gauge | None = None


@dataclass
class _Use:
    levels: dict[str, int]
    at_ms: int
    stored: bool
    changed: bool = False


_limits = lru_cache(maxsize=4096)(Limits)  # most customers have the same


class Limiter:
    """For one transaction over some customers, whose rows are locked. Reads nothing until it is asked."""

    def __init__(self, tx: Transaction, customers: Sequence[str], now: float) -> None:
        self._tx, self._names, self._now_ms = tx, list(customers), int(now * 1000)
        self._use_of: dict[str, dict[str, _Use]] | None = None  # by scope
        self._caps_of: dict[str, dict[str, tuple[int | None, Limits]]] | None = None
        self._open_of: dict[str, Counter[str]] | None = None  # holds in the database
        self._marks = ", ".join("?" * len(self._names))
        self._moved: dict[str, Counter[str]] = {}  # holds opened and closed in this transaction

    # ---- a request begins --------------------------------------------------------------------------------------

    def admit(
        self, customer: str, project: str, key: str, ladder: Ladder, recharged_nano: int, tokens: int
    ) -> tuple[str, Standing]:
        """Takes one request of `tokens` in all from every bucket it falls into, or raises RateLimited and takes nothing.
        Returns what a hold must remember, and how things stand now."""
        limited = self._limits(customer, project, key, ladder, recharged_nano)
        if not limited:
            return "", Standing()
        for scope, limits in limited.items():
            running = self._running(customer, scope) if limits.concurrency is not None else 0
            if limits.concurrency is not None and running >= limits.concurrency:
                standing = self._standing(customer, limited)
                raise RateLimited("concurrency", running, limits.concurrency, RETRY_WHEN_FULL_S, standing)
        for scope, limits in limited.items():
            use = self._use(customer, scope, limits)
            for which, need in (("requests", 1), ("tokens", tokens), ("day_tokens", tokens)):
                limit = getattr(limits, which)
                if limit is None:
                    continue
                over = use.levels[which] + (need - limit) * PERIOD_MS[which]
                if over > 0:
                    current = -(-use.levels[which] // PERIOD_MS[which]) + need
                    retry = None if need > limit else max(1, -(-over // (limit * 1000)))
                    raise RateLimited(which, current, limit, retry, self._standing(customer, limited))
        for scope, limits in limited.items():
            use = self._use(customer, scope, limits)
            for which, need in (("requests", 1), ("tokens", tokens), ("day_tokens", tokens)):
                if getattr(limits, which) is not None:
                    use.levels[which] += need * PERIOD_MS[which]
                    use.changed = True
        scopes = {scope: [limits.tokens, limits.day_tokens] for scope, limits in limited.items()}
        memo = msgspec.json.encode({"tokens": tokens, "at_ms": self._now_ms, "scopes": scopes}).decode()
        return memo, self._standing(customer, limited)

    def opened(self, customer: str, project: str, key: str, by: int = 1) -> None:
        """A hold was opened (or, by -1, closed) in this transaction."""
        moved = self._moved.setdefault(customer, Counter())
        for scope in {"", project, key}:
            moved[scope] += by

    # ---- a request ends ----------------------------------------------------------------------------------------

    def give_back(self, customer: str, memo: str, used_tokens: int) -> None:
        """What a hold reserved and did not use, so far as it has not drained by itself: so that what was truly used never
        exceeds the limit and what drains in the time."""
        if not memo:
            return
        kept = msgspec.json.decode(memo)
        unused, elapsed_ms = max(kept["tokens"] - used_tokens, 0), max(self._now_ms - kept["at_ms"], 0)
        for scope, rates in kept["scopes"].items():
            for which, rate in zip(("tokens", "day_tokens"), rates, strict=True):
                back = unused * PERIOD_MS[which] - (rate or 0) * elapsed_ms
                if rate is not None and back > 0:
                    self._reduce(customer, scope, which, back)

    # ---- in between --------------------------------------------------------------------------------------------

    def write(self) -> None:
        if self._use_of is None:
            return
        columns = (*PERIOD_MS, "at_ms")
        rows: dict[bool, list[tuple]] = {False: [], True: []}
        for name, used in self._use_of.items():
            for scope, use in used.items():
                if use.changed:
                    rows[use.stored].append((name, scope, *use.levels.values(), use.at_ms))
        self._tx.insert("limit_use", ("customer", "scope", *columns), rows[False])
        self._tx.update("limit_use", ("customer", "scope"), columns, rows[True])

    def _caps(self, customer: str) -> dict[str, tuple[int | None, Limits]]:
        """(tier set by hand, limits) by scope."""
        if self._caps_of is None:
            self._caps_of = {name: {} for name in self._names}
            sql = f"SELECT customer, scope, tier, concurrency, requests, tokens, day_tokens FROM caps WHERE customer IN ({self._marks})"
            for name, scope, tier, *limits in self._tx(sql, self._names).fetchall():
                self._caps_of[name][scope] = (tier, _limits(*limits))
        return self._caps_of[customer]

    def _uses(self, customer: str) -> dict[str, _Use]:
        if self._use_of is None:
            self._use_of = {name: {} for name in self._names}
            sql = f"SELECT customer, scope, requests, tokens, day_tokens, at_ms FROM limit_use WHERE customer IN ({self._marks})"
            for name, scope, requests, tokens, day_tokens, at_ms in self._tx(sql, self._names).fetchall():
                levels = {"requests": requests, "tokens": tokens, "day_tokens": day_tokens}
                self._use_of[name][scope] = _Use(levels, at_ms, stored=True)
        return self._use_of[customer]

    def _limits(self, customer: str, project: str, key: str, ladder: Ladder, recharged_nano: int) -> dict[str, Limits]:
        """By scope, widest first; only what limits anything."""
        caps = self._caps(customer)
        tier, own = caps.get("", (None, NONE))
        found = {"": own.over(ladder.limits(recharged_nano, tier))}
        found |= {scope: caps[scope][1] for scope in (project, key) if scope and scope in caps}
        return {scope: limits for scope, limits in found.items() if not limits.none}

    def _use(self, customer: str, scope: str, limits: Limits) -> _Use:
        """Drained up to now."""
        uses = self._uses(customer)
        use = uses.setdefault(scope, _Use(dict.fromkeys(PERIOD_MS, 0), self._now_ms, stored=False))
        if self._now_ms < use.at_ms - SKEW_MS:
            use.at_ms, use.changed = self._now_ms, True
        elapsed = max(self._now_ms - use.at_ms, 0)
        if elapsed:
            for which in PERIOD_MS:
                limit = getattr(limits, which)  # what is not limited is not counted
                use.levels[which] = 0 if limit is None else max(use.levels[which] - limit * elapsed, 0)
            use.at_ms = self._now_ms
        return use

    def _reduce(self, customer: str, scope: str, which: str, back: int) -> None:
        """Taking out before draining comes to the same as after, because both stop at zero."""
        use = self._uses(customer).get(scope)
        if use is not None:
            use.levels[which] = max(use.levels[which] - back, 0)
            use.changed = True

    def _running(self, customer: str, scope: str) -> int:
        if self._open_of is None:  # for all customers at once: they come in batches
            self._open_of = {name: Counter() for name in self._names}
            sql = (f"SELECT customer, project, key_id, COUNT(*) FROM holds WHERE state = 'open' AND customer IN ({self._marks}) "
                   "GROUP BY customer, project, key_id")  # fmt: skip
            for name, project, key, count in self._tx(sql, self._names).fetchall():
                self._open_of[name].update({place: count for place in {"", project, key}})
        moved = self._moved.get(customer)
        return self._open_of[customer][scope] + (moved[scope] if moved else 0)

    def _standing(self, customer: str, limited: dict[str, Limits]) -> Standing:
        gauges: dict[str, Gauge] = {}
        for scope, limits in limited.items():
            use = self._use(customer, scope, limits)
            for which in ("requests", "tokens"):
                limit = getattr(limits, which)
                if limit is None:
                    continue
                level = use.levels[which]
                gauge = Gauge(limit, max(limit + -level // PERIOD_MS[which], 0), -(-level // limit) if limit else 60_000)
                if which not in gauges or gauge.remaining < gauges[which].remaining:
                    gauges[which] = gauge
        return Standing(**gauges)
