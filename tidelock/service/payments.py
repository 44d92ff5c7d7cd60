"""Money that comes in and goes back, by hand or told by a payment provider's events, each booked exactly once.

Events come twice, late and in any order. So a payment's row keeps what has been said of it (the payment, how much is
refunded in all, how each dispute stands), every event only adds to that, and the books are then brought to what is
said. What was paid back and is already used is owed, and the next payment pays it first. Amounts of events are cents.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tidelock.service import charges, invoices
from tidelock.service.accounts import OPERATOR, UnknownId, log
from tidelock.service.books import OUTSIDE, RECEIVABLE, REFUNDS, Books
from tidelock.service.db import Transaction
from tidelock.service.ledger import MAX_NANO, Ledger
from tidelock.tokens.errors import UserError

NANO_PER_CENT = 10_000_000
COLUMNS = ("id", "customer", "pocket", "net_nano", "tax_nano", "refunded_nano", "disputes", "taken_nano", "steps", "created")
OVER = ("won", "lost", "warning_closed")  # how a dispute ends; a lost one stays taken
ASKED_ONLY = "warning_"  # begins the states of an inquiry: nobody has taken any money yet
TOO_MUCH = "a refund is positive and, with those before it, at most the payment"


class Changed(UserError):
    """An event's id has come before with other content."""


@dataclass(frozen=True)
class Said:
    """What one event says of a payment; None says nothing."""

    payment: str
    customer: str | None = None
    net_nano: int = 0
    tax_nano: int = 0
    pocket: str = "cash"
    refunded_nano: int = 0  # in all
    more_nano: int = 0  # refunded beside what was before
    disputes: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    charge: str = ""  # the automatic top-up it is of (`charges`)
    failed: bool = False  # there will be no money: nothing else is said


class Payments:
    def __init__(self, ledger: Ledger) -> None:
        self._ledger, self._db = ledger, ledger.db

    def manual(
        self, customer: str, net_nano: int, reference: str, *, tax_nano: int | None = None, pocket: str = "cash",
        actor: str = OPERATOR,
    ) -> bool:  # fmt: skip
        """Books money that came another way; False if this reference was booked before. `tax_nano`: paid on top; None: by the
        organisation's rate."""
        if not 0 < net_nano < MAX_NANO or not 0 <= (tax_nano or 0) < MAX_NANO or pocket not in ("cash", "extra"):
            raise UserError("a payment needs a positive amount, no negative tax, and goes to cash or extra")
        if tax_nano is None:
            rows = self._db.read("SELECT tax_bps FROM organizations WHERE id = ?", (customer,))
            tax_nano = invoices.tax(net_nano, rows[0][0]) if rows else 0
        said = Said(reference, customer, net_nano, tax_nano, pocket)
        return self._hear(f"manual/{reference}", "manual", said, json.dumps([customer, net_nano, tax_nano, pocket]), actor)

    def refund(self, payment: str, nano_usd: int, reference: str, actor: str = OPERATOR) -> bool:
        """Books that this much more of a payment, tax included, was paid back by hand."""
        self.payment(payment)
        if nano_usd <= 0:
            raise UserError(TOO_MUCH)
        said = Said(payment, more_nano=nano_usd)
        return self._hear(f"refund/{reference}", "manual", said, json.dumps([payment, nano_usd]), actor)

    def event(self, body: bytes) -> bool:
        """Books a provider's event, whose signature was checked; False if it was heard before or means nothing to us.
        Raises UserError (nothing is kept, so it may be sent again), Changed, UnknownId for an unknown organisation."""
        try:
            event = json.loads(body)
            name, kind, thing = event["id"], event["type"], event["data"]["object"]
            if not all(isinstance(x, str) and x for x in (name, kind)) or not isinstance(thing, dict):
                raise TypeError
            said = _said(kind, thing)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise UserError("the event is not one that can be read") from None
        return self._hear(name, kind, said, json.dumps(event, sort_keys=True), "provider")

    def payment(self, payment: str, customer: str | None = None) -> dict[str, Any]:
        """Raises UnknownId."""
        rows = self._db.read(f"SELECT {', '.join(COLUMNS)} FROM payments WHERE id = ?", (payment,))
        if not rows or (customer is not None and rows[0]["customer"] != customer):
            raise UnknownId(f"no payment {payment!r}")
        return _shown(rows[0])

    def payments(self, customer: str) -> list[dict[str, Any]]:
        sql = f"SELECT {', '.join(COLUMNS)} FROM payments WHERE customer = ? ORDER BY created, id"
        return [_shown(row) for row in self._db.read(sql, (customer,))]

    # ---- one event, one transaction ----------------------------------------------------------------------------

    def _hear(self, event: str, kind: str, said: Said | None, content: str, actor: str) -> bool:
        digest, now = hashlib.sha256(content.encode()).hexdigest(), self._ledger.clock()
        with self._db.transaction() as tx:
            first = tx(
                "INSERT INTO payment_events (id, type, payment, digest, received) VALUES (?, ?, ?, ?, ?) ON CONFLICT (id) DO NOTHING",
                (event, kind, said.payment if said else "", digest, now),
            )
            if first.rowcount != 1:
                before = tx("SELECT digest FROM payment_events WHERE id = ?", (event,)).fetchone()
                if before[0] != digest:
                    raise Changed(f"event {event!r} has come before with other content")
                return False
            if said is None:
                return False
            if said.charge:
                charges.told(tx, said.charge, said.payment, said.failed, now)
            if said.failed:
                return bool(said.charge)
            row = _heard(tx, said, now)
            if row["customer"]:
                books = Books(tx, [row["customer"]], now=now)
                if not books.exists(row["customer"]):
                    raise UnknownId(f"no organization {row['customer']!r}")
                _settle(books, row)
                log(tx, row["customer"], actor, f"payment.{kind}", said.payment, {"event": event}, now)
                books.write()
            fields = {name: row[name] for name in COLUMNS if name not in ("id", "created")}
            fields["disputes"] = json.dumps(row["disputes"], sort_keys=True)
            tx(f"UPDATE payments SET {', '.join(f'{name} = ?' for name in fields)} WHERE id = ?", (*fields.values(), said.payment))
        return True


def takes(status: str) -> bool:
    """Whether a dispute in this state keeps the money."""
    return status != "won" and not status.startswith(ASKED_ONLY)


def _heard(tx: Transaction, said: Said, now: float) -> dict[str, Any]:
    """The payment's row, locked, with what is now said of it."""
    tx("INSERT INTO payments (id, customer, pocket, net_nano, tax_nano, refunded_nano, disputes, taken_nano, steps, created) "
       "VALUES (?, '', 'cash', 0, 0, 0, '{}', 0, 0, ?) ON CONFLICT (id) DO NOTHING", (said.payment, now))  # fmt: skip
    row = _shown(tx(f"SELECT {', '.join(COLUMNS)} FROM payments WHERE id = ?{tx.for_update}", (said.payment,)).fetchone())
    if said.customer is not None and not row["customer"]:
        row |= {"customer": said.customer, "net_nano": said.net_nano, "tax_nano": said.tax_nano, "pocket": said.pocket}
    elif said.customer not in (None, row["customer"]):
        raise UserError(f"payment {said.payment!r} is another organisation's")
    row["refunded_nano"] = max(row["refunded_nano"], said.refunded_nano) + said.more_nano
    if said.more_nano and row["refunded_nano"] > row["net_nano"] + row["tax_nano"]:
        raise UserError(TOO_MUCH)
    for dispute, (nano, status) in said.disputes.items():
        before = row["disputes"].get(dispute, [0, ASKED_ONLY])[1]
        late = status.startswith(ASKED_ONLY) and not before.startswith(ASKED_ONLY)  # it has become more than an inquiry
        if before not in OVER and not late:
            row["disputes"][dispute] = [nano, status]
    return row


def _settle(books: Books, row: dict[str, Any]) -> None:
    """Brings the customer's books to what is said of the payment."""
    customer, pocket, net, total = row["customer"], (row["pocket"], ""), row["net_nano"], row["net_nano"] + row["tax_nano"]
    if not books.booked("topup", row["id"]):
        owed = min(net, -books.balance(customer, RECEIVABLE))
        books.post(customer, "topup", row["id"], [(OUTSIDE, -net), (RECEIVABLE, owed), (pocket, net - owed)])
        line = {"text": "top-up", "quantity": 1, "nano_usd": net}
        invoices.write(books, customer, "topup", row["id"], [line], row["tax_nano"])
    disputed = sum(nano for nano, status in row["disputes"].values() if takes(status))
    back, before = min(row["refunded_nano"] + disputed, total), row["taken_nano"]  # tax included
    if back == before:
        return
    more = back * net // total - before * net // total
    row["steps"] += 1
    row["taken_nano"] = back
    reference = f"{row['id']}/{row['steps']}"
    if more > 0:
        has = min(more, books.balance(customer, pocket))
        books.post(customer, "refund", reference, [(pocket, -has), (RECEIVABLE, has - more), (REFUNDS, more)])
    else:
        owed = min(-more, -books.balance(customer, RECEIVABLE))
        books.post(customer, "refund", reference, [(REFUNDS, more), (RECEIVABLE, owed), (pocket, -more - owed)])
    line = {"text": "paid back" if back > before else "dispute won", "quantity": 1, "nano_usd": -more}
    invoices.write(books, customer, "credit", reference, [line], -(back - before - more))


def _said(kind: str, thing: dict[str, Any]) -> Said | None:
    """Raises UserError, or whatever a shape that is not the provider's leads to."""
    if kind not in ("payment_intent.succeeded", "payment_intent.payment_failed", "checkout.session.completed", "charge.refunded", "charge.dispute.created",
                    "charge.dispute.updated", "charge.dispute.closed"):  # fmt: skip
        return None
    if thing["currency"].lower() != "usd":
        raise UserError(f"payments are in usd here, not {thing['currency']}")
    about = thing.get("metadata") or {}
    charge = about.get("auto_topup", "")
    if kind == "payment_intent.payment_failed":
        return Said(_text(thing["id"]), charge=charge, failed=True)
    if kind == "payment_intent.succeeded":
        paid, tax = _nano(thing["amount_received"]), _nano(int(about.get("tax_cents", 0)))
        return Said(_text(thing["id"]), _text(about["organization"]), _positive(paid - tax), tax, _pocket(about),
                    charge=charge)  # fmt: skip
    if kind == "checkout.session.completed":
        if thing.get("payment_status") != "paid":
            return None
        paid, tax = _nano(thing["amount_total"]), _nano((thing.get("total_details") or {}).get("amount_tax", 0))
        whose = thing.get("client_reference_id") or about["organization"]
        return Said(_text(thing["payment_intent"]), _text(whose), _positive(paid - tax), tax, _pocket(about))
    if kind == "charge.refunded":
        return Said(_text(thing["payment_intent"]), refunded_nano=_nano(thing["amount_refunded"]))
    dispute = {_text(thing["id"]): (_nano(thing["amount"]), _text(thing["status"]))}
    return Said(_text(thing["payment_intent"]), disputes=dispute)


def _nano(cents: Any) -> int:
    if isinstance(cents, bool) or not isinstance(cents, int) or not 0 <= cents < MAX_NANO // NANO_PER_CENT:
        raise UserError(f"{cents!r} is no amount in cents")
    return cents * NANO_PER_CENT


def _positive(nano: int) -> int:
    if nano <= 0:
        raise UserError("a payment is more than its tax")
    return nano


def _pocket(about: dict[str, Any]) -> str:
    pocket = about.get("pocket", "cash")
    if pocket not in ("cash", "extra"):
        raise UserError(f"money is paid into cash or extra, not {pocket!r}")
    return pocket


def _text(value: Any) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= 255:
        raise TypeError
    return value


def _shown(row: Any) -> dict[str, Any]:
    return {**{name: row[name] for name in COLUMNS}, "disputes": json.loads(row["disputes"])}
