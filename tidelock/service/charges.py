"""Automatic top-ups: when an organisation's cash falls below what it said, the payment provider is asked to charge it.

A charge is a row, made under the customer's lock, one at a time, within so many a day and so much a month. Asking is
retried under the row's id as the provider's idempotency key, so a lost answer never charges twice. Only the provider's signed
event books money (`payments`), and it closes the row in the same transaction. Three failures in a row end the rule. Nobody
who is suspended is charged; a charge that was due waits.
"""

from __future__ import annotations

import http.client
import json
import logging
import secrets
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from tidelock.service import notices
from tidelock.service.accounts import OPERATOR, log as audit_log
from tidelock.service.db import Transaction
from tidelock.service.ledger import ACTIVE, Ledger
from tidelock.tokens.errors import UserError

log = logging.getLogger(__name__)

NANO_PER_CENT = 10_000_000
DAY_S = 86_400.0
MOST_FAILURES = 3
FIRST_RETRY_S, LONGEST_RETRY_S = 10.0, 3600.0
GIVEN_UP_S = 2 * DAY_S  # a charge of which nothing was heard for so long is closed; if the event comes after all, it books


@dataclass(frozen=True)
class Rule:
    below_nano: int
    charge_nano: int
    per_day: int
    month_nano: int
    method: str  # the provider's name for whom it charges


class Refused(Exception):
    """The provider says no: this charge will not be made."""


class Provider(Protocol):
    def charge(self, charge: str, customer: str, method: str, cents: int, tax_cents: int) -> str:
        """Asks for `cents`, of which so many are tax; returns the payment's id. Safe to repeat. Raises Refused, or OSError
        where nobody knows."""


class HttpProvider:
    """The shape of the usual provider: `POST /v1/payment_intents`, form-encoded, confirmed off session."""

    def __init__(self, url: str, secret: str, timeout_s: float = 20.0) -> None:
        self._url, self._secret, self._timeout_s = url.rstrip("/") + "/v1/payment_intents", secret, timeout_s

    @staticmethod
    def read(path: Path) -> HttpProvider | None:
        """From a file of two lines, URL and secret; None without one."""
        try:
            lines = path.read_text().split()
        except FileNotFoundError:
            return None
        if len(lines) != 2 or not lines[0].startswith(("http://", "https://")):
            raise UserError(f"{path} should hold two lines: the payment provider's URL and our secret there")
        return HttpProvider(*lines)

    def charge(self, charge: str, customer: str, method: str, cents: int, tax_cents: int) -> str:
        asked = {"amount": cents, "currency": "usd", "customer": method, "confirm": "true", "off_session": "true",
                 "metadata[organization]": customer, "metadata[auto_topup]": charge,
                 "metadata[tax_cents]": tax_cents}  # fmt: skip
        headers = {"authorization": f"Bearer {self._secret}", "idempotency-key": charge,
                   "content-type": "application/x-www-form-urlencoded"}  # fmt: skip
        request = urllib.request.Request(self._url, urllib.parse.urlencode(asked).encode(), headers, method="POST")
        try:
            with urllib.request.urlopen(request, timeout=self._timeout_s) as answer:
                intent = json.loads(answer.read())
        except urllib.error.HTTPError as error:
            if error.code in (400, 401, 402, 403, 404):
                raise Refused(f"status {error.code}") from None
            raise
        except (http.client.HTTPException, ValueError) as error:
            raise OSError(type(error).__name__) from None
        if not isinstance(intent, dict) or not isinstance(intent.get("id"), str):
            raise OSError("no payment intent")
        if intent.get("status") not in ("succeeded", "processing"):
            raise Refused(f"the intent {str(intent.get('status'))[:40]}")
        return intent["id"]


def set_rule(ledger: Ledger, customer: str, rule: Rule | None, actor: str = OPERATOR) -> None:
    """None: no more. Raises UserError."""
    if rule is not None and (rule.charge_nano % NANO_PER_CENT or not rule.method):
        raise UserError("a charge is in whole cents, and needs the provider's name of whom to charge")
    if rule is not None and not (min(rule.below_nano, rule.charge_nano, rule.per_day) > 0 and rule.month_nano >= rule.charge_nano):
        raise UserError("amounts are positive and a month's cap covers at least one charge")
    with ledger.books([customer]) as books:
        if not books.exists(customer):
            raise UserError(f"no organization {customer!r}")
        books.execute("DELETE FROM auto_topups WHERE customer = ?", (customer,))
        if rule is not None:
            row = (customer, rule.below_nano, rule.charge_nano, rule.per_day, rule.month_nano, rule.method, books.now)
            books.execute("INSERT INTO auto_topups (customer, below_nano, charge_nano, per_day, month_nano, method, active, "
                          "failures, created) VALUES (?, ?, ?, ?, ?, ?, 1, 0, ?)", row)  # fmt: skip
        audit_log(books.execute, customer, actor, "auto_topup.set", customer, rule.__dict__ if rule else {}, books.now)


def tick(ledger: Ledger, provider: Provider | None) -> int:
    """Makes the charges that are due and asks for them; returns how many were asked for."""
    if provider is None:
        return 0
    sql = ("SELECT r.customer FROM auto_topups r LEFT JOIN accounts a ON a.customer = r.customer AND a.kind = 'cash' AND a.lot = '' "
           "WHERE r.active = 1 AND COALESCE(a.balance_nano, 0) < r.below_nano ORDER BY r.customer")  # fmt: skip
    for (customer,) in ledger.db.read(sql):
        _make(ledger, customer)
    asked, now = 0, ledger.clock()
    sql = ("SELECT c.id, c.customer, c.nano_usd, c.attempts, r.method, COALESCE(o.tax_bps, 0) FROM auto_charges c "
           "JOIN auto_topups r ON r.customer = c.customer LEFT JOIN organizations o ON o.id = c.customer "
           "WHERE c.state = 'due' AND c.due <= ? ORDER BY c.due")  # fmt: skip
    for row in ledger.db.read(sql, (now,)):
        asked += _ask(ledger, provider, row, now)
    with ledger.db.transaction() as tx:
        tx("UPDATE auto_charges SET state = 'failed', error = 'nothing was heard of it' WHERE state = 'asked' AND created < ?",
           (now - GIVEN_UP_S,))  # fmt: skip
    return asked


def told(tx: Transaction, charge: str, payment: str, failed: bool, now: float) -> None:
    """What the provider's event says of a charge, in the event's own transaction."""
    row = tx(f"SELECT customer, state FROM auto_charges WHERE id = ?{tx.for_update}", (charge,)).fetchone()
    if row is None or row[1] == "paid":  # a failure that is told after the success is of an earlier attempt
        return
    state = "failed" if failed else "paid"
    tx("UPDATE auto_charges SET state = ?, payment = ?, error = ? WHERE id = ?", (state, payment, "declined" if failed else "", charge))
    if failed:
        _failed(tx, row[0], charge, "declined", now)
    else:
        tx("UPDATE auto_topups SET failures = 0 WHERE customer = ?", (row[0],))


def _make(ledger: Ledger, customer: str) -> None:
    """A charge, if the rule still asks for one: looked at again under the customer's lock."""
    with ledger.books([customer]) as books:
        sql = ("SELECT below_nano, charge_nano, per_day, month_nano FROM auto_topups "
               f"WHERE customer = ? AND active = 1 AND {ACTIVE}")  # fmt: skip
        rule = books.execute(sql, (customer,)).fetchone()
        if rule is None or books.balance(customer, ("cash", "")) >= rule[0]:
            return
        begun = datetime.fromtimestamp(books.now, UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0).timestamp()
        since = min(begun, books.now - DAY_S)
        today = month = 0
        for nano, state, created in books.execute(
            "SELECT nano_usd, state, created FROM auto_charges WHERE customer = ? AND created >= ?", (customer, since)
        ).fetchall():
            if state in ("due", "asked"):
                return
            today += created > books.now - DAY_S
            month += nano if created >= begun and state != "failed" else 0
        if today >= rule[2] or month + rule[1] > rule[3]:
            return
        row = (f"auto_{secrets.token_hex(12)}", customer, rule[1], books.now, books.now)
        books.execute("INSERT INTO auto_charges (id, customer, nano_usd, state, attempts, due, payment, error, created) "
                      "VALUES (?, ?, ?, 'due', 0, ?, '', '', ?)", row)  # fmt: skip


def _ask(ledger: Ledger, provider: Provider, row: Any, now: float) -> bool:
    """Claims the attempt, asks, writes down what came of it."""
    charge, customer, nano, attempts, method, bps = row
    net, tax = nano // NANO_PER_CENT, (nano // NANO_PER_CENT * bps + 5000) // 10_000
    with ledger.db.transaction() as tx:
        wait = min(FIRST_RETRY_S * 2**attempts, LONGEST_RETRY_S)
        claim = ("UPDATE auto_charges SET attempts = attempts + 1, due = ? "
                 f"WHERE id = ? AND attempts = ? AND state = 'due' AND {ACTIVE}")  # fmt: skip
        if tx(claim, (now + wait, charge, attempts)).rowcount != 1:
            return False
    try:
        payment = provider.charge(charge, customer, method, net + tax, tax)
    except Refused as refusal:
        with ledger.db.transaction() as tx:
            closed = tx("UPDATE auto_charges SET state = 'failed', error = ? WHERE id = ? AND state = 'due'", (str(refusal), charge))
            if closed.rowcount == 1:
                _failed(tx, customer, charge, str(refusal), now)
        return True
    except OSError as error:
        log.warning("automatic top-up %s: the provider does not answer (%s); it is asked again", charge, type(error).__name__)
        return True
    with ledger.db.transaction() as tx:  # the event may have come before this answer
        tx("UPDATE auto_charges SET state = 'asked', payment = ? WHERE id = ? AND state = 'due'", (payment, charge))
    return True


def _failed(tx: Transaction, customer: str, charge: str, why: str, now: float) -> None:
    tx("UPDATE auto_topups SET failures = failures + 1, active = CASE WHEN failures + 1 >= ? THEN 0 ELSE active END "
       "WHERE customer = ?", (MOST_FAILURES, customer))  # fmt: skip
    for whose in (customer, notices.OPERATOR):
        data = {"organization": customer, "charge": charge, "reason": why}
        notices.put(tx, whose, "auto_topup.failed", f"auto_topup/{charge}/{whose or 'operator'}", data, now)
