"""Laws of the payments: every event counts once in whatever order it comes, a forged one never, and invoices add up."""

from __future__ import annotations

import itertools
import json
import threading

import httpx2 as httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidelock.service import invoices
from tidelock.service.accounts import Accounts, UnknownId
from tidelock.service.db import Conflict, Database
from tidelock.service.ledger import Ledger
from tidelock.service.payments import NANO_PER_CENT, Changed, Payments
from tidelock.service.signature import Forged, read_secrets, sign, verify
from tidelock.tokens.errors import UserError

CENT = NANO_PER_CENT
NOW = 1_800_000_000.0


class Shop:
    def __init__(self, target: str) -> None:
        self.db = Database(target)
        self.ledger = Ledger(self.db, clock=lambda: NOW)
        self.accounts, self.payments = Accounts(self.db), Payments(self.ledger)
        self.accounts.ensure("ann")

    def cash(self) -> int:
        found = self.ledger.balances("ann")
        return found.get("cash", 0) + found.get("receivable", 0)

    def invoiced(self) -> tuple[int, int]:
        found = invoices.listed(self.db, "ann")
        return sum(i["net_nano"] for i in found), sum(i["tax_nano"] for i in found)


@pytest.fixture
def shop(target):
    shop = Shop(target)
    yield shop
    assert shop.ledger.audit().sound
    shop.db.close()


def event(name: str, kind: str, **thing) -> bytes:
    return json.dumps({"id": name, "type": kind, "data": {"object": {"currency": "usd", **thing}}}).encode()


def paid(cents: int = 1000, name: str = "evt_1", payment: str = "pi_1", who: str = "ann", tax: int = 0) -> bytes:
    about = {"organization": who, "tax_cents": str(tax)}
    return event(name, "payment_intent.succeeded", id=payment, amount_received=cents, metadata=about)


def refunded(cents: int, name: str = "evt_2", payment: str = "pi_1") -> bytes:
    return event(name, "charge.refunded", payment_intent=payment, amount_refunded=cents)


def disputed(step: str, status: str, cents: int = 400, name: str = "", dispute: str = "dp_1") -> bytes:
    return event(name or f"evt_{dispute}_{step}", f"charge.dispute.{step}", id=dispute, payment_intent="pi_1", amount=cents, status=status)


# ---- what events do ----------------------------------------------------------------------------------------------


def test_a_payment_is_credited_once_however_often_and_under_however_many_names_it_comes(shop):
    for _ in range(3):
        shop.payments.event(paid())
    shop.payments.event(paid(name="evt_again"))
    session = {"payment_intent": "pi_1", "payment_status": "paid", "amount_total": 1000, "client_reference_id": "ann"}
    shop.payments.event(event("evt_s", "checkout.session.completed", **session))
    assert shop.cash() == 1000 * CENT and shop.invoiced() == (1000 * CENT, 0)
    with pytest.raises(Changed):
        shop.payments.event(paid(cents=2000))
    with pytest.raises(UserError, match="another organisation"):
        shop.payments.event(paid(name="evt_x", who="bob"))


def test_every_order_of_events_comes_to_the_same_books(tmp_path):
    events = [paid(tax=77), refunded(100), refunded(300, "evt_3"), disputed("created", "needs_response"), disputed("closed", "won")]
    ends = set()
    for n, order in enumerate(itertools.permutations(events)):
        if n % 5:
            continue
        shop = Shop(":memory:")
        for body in order:
            shop.payments.event(body)
        shop.payments.event(order[0])
        ends.add((shop.cash(), *shop.invoiced()))
        assert shop.ledger.audit().sound
        shop.db.close()
    net = 1000 * CENT - 77 * CENT
    left = net - 300 * CENT * net // (1000 * CENT)
    assert ends == {(left, left, 700 * CENT - left)}


@settings(max_examples=40, deadline=None)
@given(
    cents=st.integers(2, 5000), tax=st.integers(0, 400), events=st.lists(st.tuples(
        st.sampled_from(["refund", "open", "won", "lost", "paid"]), st.integers(1, 6000), st.integers(1, 2)), max_size=12),
)  # fmt: skip
def test_whatever_comes_the_customer_has_what_was_paid_less_what_went_back(cents, tax, events):
    tax = min(tax, cents - 1)
    shop = Shop(":memory:")
    said, open_, over, heard = 0, {}, {}, False
    for n, (what, amount, dispute) in enumerate(events):
        if what == "paid":
            heard |= shop.payments.event(paid(cents, tax=tax)) is not None
        elif what == "refund":
            shop.payments.event(refunded(amount, f"e{n}"))
            said = max(said, amount)
        else:
            step, status = ("created", "needs_response") if what == "open" else ("closed", what)
            shop.payments.event(disputed(step, status, amount, f"e{n}", f"dp_{dispute}"))
            if dispute not in over:
                (open_ if what == "open" else over)[dispute] = (amount, status)
    if heard:
        standing = {**open_, **over}
        back = min(said + sum(a for a, status in standing.values() if status != "won"), cents) * CENT
        net = (cents - tax) * CENT
        left = net - back * net // (cents * CENT)
        assert shop.cash() == left and shop.invoiced() == (left, cents * CENT - back - left)
        numbers = [i["number"] for i in invoices.listed(shop.db, "ann")]
        assert numbers == list(range(len(numbers), 0, -1))
    else:
        assert shop.cash() == 0 and shop.invoiced() == (0, 0)
    assert shop.ledger.audit().sound
    shop.db.close()


def test_what_goes_back_and_is_used_already_is_owed_and_paid_first(shop):
    shop.payments.event(paid(1000))
    shop.ledger.refund("ann", 900 * CENT, "spent elsewhere")
    shop.payments.event(disputed("created", "needs_response", 400))
    assert shop.ledger.balance("ann") == 0 and shop.cash() == -300 * CENT
    shop.payments.event(paid(500, "evt_9", "pi_2"))
    assert shop.ledger.balance("ann") == shop.cash() == 200 * CENT
    shop.payments.event(disputed("closed", "won", 400))
    assert shop.ledger.balance("ann") == 600 * CENT


def test_the_same_event_at_the_same_moment_counts_once(shop):
    threads = [threading.Thread(target=shop.payments.event, args=(paid(),)) for _ in range(6)]
    threads += [threading.Thread(target=shop.payments.event, args=(refunded(250),)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert shop.cash() == 750 * CENT and len(invoices.listed(shop.db, "ann")) == 2


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{}", b"[1]", b"null", b"[" * 100_000, b'{"id": 1, "type": "charge.refunded", "data": {"object": {}}}',
        event("e", "payment_intent.succeeded", id="p", amount_received=100),
        event("e", "payment_intent.succeeded", id="p", amount_received=-1, metadata={"organization": "ann"}),
        event("e", "payment_intent.succeeded", id="p", amount_received=1.5, metadata={"organization": "ann"}),
        event("e", "payment_intent.succeeded", id="p", amount_received=10**17, metadata={"organization": "ann"}),
        event("e", "payment_intent.succeeded", id="p", amount_received=5, metadata={"organization": "ann", "tax_cents": 5}),
        event("e", "payment_intent.succeeded", id="p", amount_received=5, currency="eur", metadata={"organization": "ann"}),
        event("e", "payment_intent.succeeded", id="p", amount_received=5, metadata={"organization": "nobody"}),
    ],
)  # fmt: skip
def test_an_event_that_makes_no_sense_is_refused_and_leaves_nothing(shop, body):
    with pytest.raises(UserError):
        shop.payments.event(body)
    assert shop.db.read("SELECT * FROM payments") == shop.db.read("SELECT * FROM payment_events") == []


def test_events_that_mean_nothing_to_us_are_taken_note_of(shop):
    assert shop.payments.event(event("e", "customer.created", id="c")) is False
    assert shop.payments.event(event("f", "checkout.session.completed", payment_status="unpaid")) is False
    assert shop.db.read("SELECT COUNT(*) FROM payment_events")[0][0] == 2


# ---- signatures --------------------------------------------------------------------------------------------------


def test_only_a_fresh_signature_of_a_secret_in_force_is_believed():
    body, old, new = b'{"a": 1}', "whsec_old_0123456789", "whsec_new_0123456789"
    good = sign(body, new, int(NOW))
    for header in (good, sign(body, old, int(NOW)), f"{good},v1=00", f"t={int(NOW)},v0=x,{good.split(',')[1]}"):
        verify(body, header, (old, new), NOW + 299)
    forged = [
        (b'{"a": 2}', good, (new,), NOW), (body, good, (old,), NOW), (body, good, (), NOW), (body, good, (new,), NOW + 301),
        (body, good, (new,), NOW - 301), (body, good.replace(f"t={int(NOW)}", f"t={int(NOW) + 1}"), (new,), NOW), (body, "", (new,), NOW),
        (body, "t=,v1=", (new,), NOW), (body, good + f",t={int(NOW)}", (new,), NOW), (body, "v1=" + good[-64:], (new,), NOW),
        (body, f"t={int(NOW)},v1=é", (new,), NOW),
    ]  # fmt: skip
    for case in forged:
        with pytest.raises(Forged):
            verify(*case)


def test_the_webhook_books_what_is_signed_and_nothing_else(service, tmp_path):
    service.key("ann", nano_usd=0)
    url = service.running.base_url.removesuffix("/v1") + "/webhooks/payments"
    secret, now = "whsec_0123456789abcdef", int(service.state.ledger.clock())

    def post(body: bytes, header: str, name: str = "stripe-signature") -> httpx.Response:
        return httpx.post(url, content=body, headers={name: header})

    body = paid(2500)
    assert post(body, sign(body, secret, now)).status_code == 400  # no secrets, no events
    service.state.webhook_secrets.write_text(f"whsec_another_one_000\n{secret}\n")
    assert read_secrets(service.state.webhook_secrets)[1] == secret
    assert post(body, sign(body, "whsec_wrong_wrong_wrong", now)).status_code == 400
    assert post(body, sign(body, secret, now - 1000)).status_code == 400
    assert service.state.ledger.balance("ann") == 0
    first, again = post(body, sign(body, secret, now)), post(body, sign(body, secret, now), "tidelock-signature")
    assert first.json() == {"received": True, "booked": True} and again.json() == {"received": True, "booked": False}
    other = paid(9999)
    assert post(other, sign(other, secret, now)).status_code == 409
    assert service.state.ledger.balance("ann") == 2500 * CENT


# ---- by hand, and invoices ---------------------------------------------------------------------------------------


def test_a_payment_booked_by_hand_counts_once_and_can_be_paid_back_in_parts(shop):
    shop.accounts.set_tax("ann", 1900, "DE123", "operator")
    assert shop.payments.manual("ann", 100 * CENT, "wire-7") and not shop.payments.manual("ann", 100 * CENT, "wire-7")
    with pytest.raises(Changed):
        shop.payments.manual("ann", 101 * CENT, "wire-7")
    (invoice,) = invoices.listed(shop.db, "ann")
    assert (invoice["net_nano"], invoice["tax_nano"], invoice["total_nano"]) == (100 * CENT, 19 * CENT, 119 * CENT)
    assert (invoice["tax_id"], invoice["number"]) == ("DE123", 1)
    for n in range(7):
        assert shop.payments.refund("wire-7", 17 * CENT, f"r{n}")
    assert shop.cash() == 0 and shop.invoiced() == (0, 0)
    for refused in (
        lambda: shop.payments.refund("wire-7", 1, "r9"), lambda: shop.payments.refund("none", 1, "r"),
        lambda: shop.payments.manual("ann", 0, "z"), lambda: shop.payments.manual("nobody", 1, "z"),
        lambda: shop.payments.payment("wire-7", "bob"),
    ):  # fmt: skip
        with pytest.raises(UserError):
            refused()


def test_the_invoice_on_a_month_s_use_is_the_sum_of_its_usage_and_written_once(service):
    secret = service.key("ann", nano_usd=10**9)
    ledger, ask = service.state.ledger, {"model": "tide", "messages": [{"role": "user", "content": "hi"}]}
    charge = sum(service.client(secret).chat.completions.create(**ask).usage.cost_nano_usd for _ in range(2))
    from datetime import UTC, datetime

    month = f"{datetime.fromtimestamp(ledger.clock(), UTC):%Y-%m}"
    with pytest.raises(UserError, match="not over"):
        invoices.bill_month(ledger, "ann", month)
    later = Ledger(ledger.db, clock=lambda: ledger.clock() + 40 * 86400)
    first, again = (invoices.bill_month(later, "ann", month) for _ in range(2))
    assert first == again and first["net_nano"] == first["total_nano"] == charge and first["lines"][0]["quantity"] == 2
    headers = {"authorization": f"Bearer {secret}"}
    (seen,) = httpx.get(service.running.base_url + "/organization/invoices", headers=headers).json()["data"]
    assert seen["id"] == first["id"] and seen["total_nano_usd"] == charge
    with pytest.raises(UnknownId):
        invoices.one(ledger.db, "bob", first["id"])
    with pytest.raises(Conflict), ledger.db.transaction() as tx:
        tx("UPDATE invoices SET net_nano = 0, total_nano = 0")


@given(net=st.integers(-(10**15), 10**15), bps=st.integers(0, 10_000))
def test_tax_is_the_nearest_nano(net, bps):
    assert abs(10_000 * invoices.tax(net, bps) - net * bps) <= 5000 and invoices.tax(-net, bps) == -invoices.tax(net, bps)


def test_an_inquiry_takes_no_money_until_it_becomes_a_dispute(shop):
    """The provider withdraws nothing while a bank only asks; customers were short of what nobody had taken."""
    shop.payments.event(paid(1000))
    shop.payments.event(disputed("created", "warning_needs_response"))
    shop.payments.event(disputed("updated", "warning_under_review"))
    assert shop.cash() == 1000 * CENT and len(invoices.listed(shop.db, "ann")) == 1
    shop.payments.event(disputed("updated", "needs_response", name="evt_more"))
    assert shop.cash() == 600 * CENT
    shop.payments.event(disputed("updated", "warning_under_review", name="evt_late"))  # told late
    assert shop.cash() == 600 * CENT
    shop.payments.event(disputed("closed", "lost"))
    assert shop.cash() == 600 * CENT
    shop.payments.event(disputed("closed", "warning_closed", dispute="dp_2"))
    assert shop.cash() == 600 * CENT


def test_two_refunds_by_hand_at_the_same_moment_are_two_refunds(shop):
    """Both read what was refunded before, and one of them was lost."""
    shop.payments.manual("ann", 1000 * CENT, "wire")
    refused: list[UserError] = []

    def refund(n: int) -> None:
        try:
            shop.payments.refund("wire", 150 * CENT, f"back_{n}")
        except UserError as error:
            refused.append(error)

    threads = [threading.Thread(target=refund, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 2 and shop.cash() == 100 * CENT
    assert shop.payments.payment("wire")["refunded_nano"] == 900 * CENT
    with pytest.raises(UserError):
        shop.payments.refund("wire", 101 * CENT, "too much")


def test_money_for_a_pocket_that_is_none_is_refused(shop):
    about = {"organization": "ann", "pocket": "trousers"}
    with pytest.raises(UserError):
        shop.payments.event(event("e", "payment_intent.succeeded", id="p", amount_received=5, metadata=about))
    assert shop.db.read("SELECT COUNT(*) FROM payments")[0][0] == 0
