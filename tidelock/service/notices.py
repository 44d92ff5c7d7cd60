"""Messages to the webhooks of the operator and of organisations: written with what they tell of, sent until they are taken.

A notice is a row, so a crash loses none. Each attempt is claimed by one worker; a receiver that answers 2xx has it, and
may, when that answer gets lost, be told again under the same id. The signature is that of `signature`.
"""

from __future__ import annotations

import http.client
import json
import logging
import secrets
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

from tidelock.service.db import Database, Transaction
from tidelock.service.signature import sign
from tidelock.tokens.errors import UserError

log = logging.getLogger(__name__)

OPERATOR = ""  # whose webhook is the service's own
MOST_ATTEMPTS = 20  # within about two days
FIRST_RETRY_S, LONGEST_RETRY_S = 5.0, 4 * 3600.0
TIMEOUT_S = 10.0
AT_A_TIME = 20
KEPT_S = 30 * 86400.0  # delivered or given up


def set_webhook(db: Database, customer: str, url: str, now: float | None = None) -> str:
    """Where a customer's notices go from now on; returns the new secret they are signed with."""
    if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
        raise UserError(f"{url!r} is no http or https URL")
    secret = f"whsec_{secrets.token_urlsafe(24)}"
    with db.transaction() as tx:
        tx("INSERT INTO webhooks (customer, url, secret, created) VALUES (?, ?, ?, ?) ON CONFLICT (customer) "
           "DO UPDATE SET url = excluded.url, secret = excluded.secret",
           (customer, url, secret, time.time() if now is None else now))  # fmt: skip
    return secret


def put(tx: Transaction, customer: str, kind: str, notice_id: str, data: Mapping[str, Any], now: float) -> bool:
    """Within the caller's transaction. False, and nothing is kept, if the customer has no webhook or was told under this
    id before."""
    if tx("SELECT 1 FROM webhooks WHERE customer = ?", (customer,)).fetchone() is None:
        return False
    body = json.dumps({"id": notice_id, "type": kind, "created": int(now), "data": data})
    row = (notice_id, customer, kind, body, now, now)
    done = tx("INSERT INTO notices (id, customer, kind, body, attempts, due, created) VALUES (?, ?, ?, ?, 0, ?, ?) "
              "ON CONFLICT (id) DO NOTHING", row)  # fmt: skip
    return done.rowcount == 1


def deliver(db: Database, clock: Callable[[], float] = time.time) -> int:
    """Sends what is due, a few at a time; returns how many were taken."""
    now, taken = clock(), 0
    sql = ("SELECT n.id, n.kind, n.body, n.attempts, w.url, w.secret FROM notices n JOIN webhooks w ON w.customer = n.customer "
           "WHERE n.delivered IS NULL AND n.due <= ? ORDER BY n.due LIMIT ?")  # fmt: skip
    for notice_id, kind, body, attempts, url, secret in db.read(sql, (now, AT_A_TIME)):
        if not _claimed(db, notice_id, attempts, now):
            continue
        problem = _post(url, body.encode(), secret, int(now))
        if problem is None:
            taken += 1
            with db.transaction() as tx:
                tx("UPDATE notices SET delivered = ? WHERE id = ?", (now, notice_id))
        else:
            log.warning("notice %s (%s) was not taken, attempt %d: %s", notice_id, kind, attempts + 1, problem)
    return taken


def sweep(db: Database, now: float) -> None:
    with db.transaction() as tx:
        tx("DELETE FROM notices WHERE created < ?", (now - KEPT_S,))


def _claimed(db: Database, notice_id: str, attempts: int, now: float) -> bool:
    """This attempt is ours, and the next one is not before its time."""
    wait = min(FIRST_RETRY_S * 2**attempts, LONGEST_RETRY_S)
    due = now + wait if attempts + 1 < MOST_ATTEMPTS else float(2**53)  # never again
    with db.transaction() as tx:
        sql = "UPDATE notices SET attempts = attempts + 1, due = ? WHERE id = ? AND attempts = ? AND delivered IS NULL"
        return tx(sql, (due, notice_id, attempts)).rowcount == 1


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any) -> None:
        return None


_opener = urllib.request.build_opener(_NoRedirect)


def _post(url: str, body: bytes, secret: str, now: int) -> str | None:
    """None if it was taken, else why not."""
    headers = {"content-type": "application/json", "tidelock-signature": sign(body, secret, now)}
    request = urllib.request.Request(url, body, headers, method="POST")
    try:
        with _opener.open(request, timeout=TIMEOUT_S):
            return None
    except urllib.error.HTTPError as error:
        return f"status {error.code}"
    except (OSError, http.client.HTTPException, ValueError) as error:
        return type(error).__name__
