"""Suspending an organisation, and lifting that: one row says so, and whoever acts for the organisation looks at it.

Its keys are refused everywhere within `keys.REMEMBER_S`; requests that run then go to their end and are charged; batches
stop between two lines and go on afterwards. Nothing is charged that no request asks for: no automatic top-up is made and no
term of a plan is renewed; where one ended meanwhile, the next begins, whole, when the suspension is lifted. Nothing is lost
either: plan, seats and the place on a waiting list stay, a paid year's months go on bringing credits, and vouchers and
credits do not run out: when it is lifted, each may be spent for as much longer as the suspension took.
"""

from __future__ import annotations

from typing import Any

from tidelock.service import notices
from tidelock.service.accounts import OPERATOR, UnknownId, log
from tidelock.service.db import Transaction
from tidelock.service.ledger import Ledger
from tidelock.service.subscriptions import wait_until_now
from tidelock.tokens.errors import UserError

MOST_WORDS = 200


def suspend(ledger: Ledger, customer: str, reason: str, actor: str = OPERATOR) -> dict[str, Any]:
    """`reason`: in one line; the organisation is told it. Doing it again changes the reason and nothing else. Raises
    UserError, UnknownId."""
    if not 0 < len(reason.strip()) <= MOST_WORDS or not reason.isprintable():
        raise UserError(f"a suspension needs a reason: one line of at most {MOST_WORDS} characters, which its keys are told")
    with ledger.books([customer]) as books:  # under the customer's lock: nothing that time does is under way
        since, _ = _row(books.execute, customer)
        began = books.now if since is None else since
        row = (began, reason.strip(), customer)
        books.execute("UPDATE organizations SET suspended = ?, suspended_for = ? WHERE id = ?", row)
        log(books.execute, customer, actor, "organization.suspended", customer, {"reason": reason.strip()}, books.now)
        _tell(books.execute, customer, "organization.suspended", {"reason": reason.strip()}, books.now)
    return {"id": customer, "suspended": began, "suspended_for": reason.strip()}


def resume(ledger: Ledger, customer: str, actor: str = OPERATOR) -> dict[str, Any]:
    """Raises UserError if it is not suspended, UnknownId."""
    with ledger.books([customer]) as books:
        since, reason = _row(books.execute, customer)
        if since is None:
            raise UserError(f"{customer!r} is not suspended")
        took = max(books.now - since, 0.0)
        books.execute("UPDATE organizations SET suspended = NULL, suspended_for = '' WHERE id = ?", (customer,))
        books.execute("UPDATE accounts SET expires = expires + ? "
                      "WHERE customer = ? AND kind IN ('voucher', 'plan') AND expires > ?", (took, customer, since))  # fmt: skip
        wait_until_now(books, customer)
        detail = {"suspended_s": round(took), "reason": reason}
        log(books.execute, customer, actor, "organization.resumed", customer, detail, books.now)
        _tell(books.execute, customer, "organization.resumed", detail, books.now)
    return {"id": customer, "suspended": None, "suspended_for": "", "suspended_s": took}


def is_suspended(tx: Transaction, customer: str) -> bool:
    row = tx("SELECT suspended FROM organizations WHERE id = ?", (customer,)).fetchone()
    return row is not None and row[0] is not None


def _row(tx: Transaction, customer: str) -> tuple[float | None, str]:
    row = tx(f"SELECT suspended, suspended_for FROM organizations WHERE id = ?{tx.for_update}", (customer,)).fetchone()
    if row is None:
        raise UnknownId(f"no organization {customer!r}")
    return row[0], row[1]


def _tell(tx: Transaction, customer: str, kind: str, data: dict[str, Any], now: float) -> None:
    notices.put(tx, customer, kind, f"{kind}/{customer}/{int(now * 1e6)}", {"organization": customer, **data}, now)
