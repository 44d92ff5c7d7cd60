"""Upstreams, ledger and papers compared: sound books give nothing, each fault gives exactly itself."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx2 as httpx
import pytest
from conftest import forced
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tidelock.cli.main import main
from tidelock.service import invoices, notices, signature, upkeep
from tidelock.service.books import Metered, Upstream
from tidelock.service.db import Database
from tidelock.service.ledger import Ledger
from tidelock.service.metrics import Metrics
from tidelock.service.payments import Payments
from tidelock.service.prices import Counts, Price, PriceBook
from tidelock.service.rating import rerate
from tidelock.service.reconciliation import kinds
from tidelock.service.reconciliation.job import Job, last, reconcile
from tidelock.tokens.journal import read_kind
from tidelock.tokens.message import Message
from tidelock.tokens.template import get_template
from tidelock.tokens.tokenizer import ByteTokenizer
from tidelock.tokens.trace import Node, Served, TraceStore

OLD = PriceBook("v1", {"tide": Price(300, 30, 1500)})
NEW = PriceBook("v2", {"tide": Price(200, 20, 1600)})
NOVEMBER, DECEMBER = 1_793_491_200.0, 1_796_083_200.0  # 2026
ALL = (0.0, 2e9)


class Clock:
    now = NOVEMBER + 3600

    def __call__(self):
        self.now += 1
        return self.now


def request(ledger, customer, name, completion, said=None, reason="stop"):
    hold = ledger.hold(customer, "k", name, model="tide", price=OLD.price("tide"), price_version="v1", prompt_tokens=20,
                       max_tokens=50, lifetime_s=60.0)  # fmt: skip
    with ledger.books([customer], [name]) as books:
        books.settle(name, hold.price, Metered(Counts(20, 4, completion=completion), reason, said or Upstream()))


def world(db, tmp_path):
    """A month of business with everything in it: credits, upstreams, re-rating, payments that went back, invoices, traces."""
    for book in (OLD, NEW):
        book.register(db)
    clock = Clock()
    ledger = Ledger(db, clock)
    payments = Payments(ledger)
    for customer in ("ann", "bob"):
        ledger.open_account(customer)
        assert payments.manual(customer, 10**9, f"wire-{customer}", tax_nano=190_000_000)
        assert payments.manual(customer, 10**8, f"wire2-{customer}", tax_nano=0)
    payments.refund("wire-ann", 238_000_000, "back-1")
    ledger.grant("ann", 20_000, lot="welcome")  # runs out within the second request
    for n in range(6):
        request(ledger, "ann" if n % 2 == 0 else "bob", f"r{n}", 5 + n, Upstream(20, 5 + n, 4, "big") if n < 3 else None)
    request(ledger, "bob", "cut", 3, Upstream(name="big"), "abort")
    rerate(ledger, NOVEMBER, clock.now + 1, "v2", model="tide")
    clock.now = DECEMBER + 60
    for customer in ("ann", "bob"):
        invoices.bill_month(ledger, customer, "2026-11")
    request(ledger, "ann", "later", 7)
    template = get_template("xtml", ByteTokenizer())
    traces = TraceStore(tmp_path / "trace.jsonl", template)
    for n in (3, 4):
        said = Message("assistant", f"answer {n}")
        node = Node.of(None, said, range(20), scope="s", sampled=5 + n, logprobs=(0.0,) * (5 + n), weights_versions=((1, 5 + n),))
        traces.add_many([node], [Served(f"r{n}", (node.id,), 5 + n, True, NOVEMBER)])
    traces.close()
    return ledger


def compared(db, tmp_path, **options):
    return reconcile(db, *options.pop("window", ALL), tmp_path / "trace.jsonl", **options)[0]


def revenue_of(request_id):
    return f"(SELECT seq FROM transactions WHERE kind = 'settle' AND reference = '{request_id}')"


SETTLED = "(SELECT seq FROM transactions WHERE kind = '{0}' AND reference = '{1}') AND customer = '{2}'"


def gone(kind, reference, customer):
    where = SETTLED.format(kind, reference, customer)
    return [f"DELETE FROM entries WHERE seq = {where}", f"DELETE FROM transactions WHERE seq = {where}"]


# name -> (statements, the kind, the id, the difference) of the one discrepancy that must be found
FAULTS = {
    "a usage row is gone": (["DELETE FROM usage WHERE request_id = 'later'"], "usage_missing", "later", 16 * 300 + 120 + 7 * 1500),
    "an answer's count is raised": (["UPDATE usage SET completion_tokens = completion_tokens + 2 WHERE request_id = 'later'"],
                                    "debit_wrong", "later", -3000),
    "a prompt's count is lowered": (["UPDATE usage SET prompt_tokens = prompt_tokens - 1 WHERE request_id = 'later'"],
                                    "debit_wrong", "later", 300),
    "a charge is written over": (["UPDATE usage SET nano_usd = nano_usd + 9 WHERE request_id = 'later'"], "charge_wrong", "later", 9),
    "a row changes hands of money": (["UPDATE usage SET credit_nano = 1 WHERE request_id = 'later'"], "usage_changed", "later", 0),
    "a debit is gone": (gone("settle", "later", "ann"), "debit_missing", "later", -(16 * 300 + 120 + 7 * 1500)),
    "a debit is altered": ([f"UPDATE entries SET nano_usd = nano_usd - 5 WHERE kind = 'revenue' AND customer = 'ann' AND seq = {revenue_of('later')}"],
                           "debit_wrong", "later", -5),
    "a price changes under a version": (["UPDATE price_versions SET book = '{\"models\": {\"tide\": {\"input\": 300, "
        "\"cached_input\": 30, \"output\": 1500}}, \"modes\": {}, \"tools\": {}}' WHERE version = 'v2'"], "adjustment_wrong", None, None),
    "an upstream reports more": (["UPDATE usage SET upstream_completion = 99 WHERE request_id = 'r1'"], "upstream_completion", "r1", 93),
    "an upstream reports fewer": (["UPDATE usage SET upstream_prompt = 11 WHERE request_id = 'r0'"], "upstream_prompt", "r0", -9),
    "an upstream's cache": (["UPDATE usage SET upstream_cached = 0 WHERE request_id = 'r2'"], "upstream_cached", "r2", -4),
    "an adjustment's row is gone": (["DELETE FROM adjustments WHERE request_id = 'r5'"], "adjustment_missing", "r5/v2", None),
    "an adjustment is altered": (["UPDATE adjustments SET nano_usd = nano_usd + 1 WHERE request_id = 'r5'"], "adjustment_wrong", "r5/v2", -1),
    "an invoice loses a line": (["UPDATE invoices SET lines = '[]' WHERE kind = 'usage' AND customer = 'bob'"], "invoice_lines", None, None),
    "an invoice is cheaper": (["UPDATE invoices SET net_nano = 7, total_nano = 7 + tax_nano, lines = '[{\"nano_usd\": 7}]' "
                               "WHERE kind = 'usage' AND customer = 'bob'"], "invoice_wrong", None, None),
    "a top-up's invoice is gone": (["DELETE FROM invoices WHERE reference = 'wire-bob'"], "invoice_missing", "wire-bob", -(10**9)),
    "a credit note is gone": (["DELETE FROM invoices WHERE kind = 'credit'"], "invoice_missing", "wire-ann/1", 200_000_000),
    "a payment was not credited": (gone("topup", "wire2-bob", "bob"), "credit_missing", "wire2-bob", -(10**8)),
    "a payment was credited twice over": ([f"UPDATE entries SET nano_usd = 2 * nano_usd WHERE seq = {SETTLED.format('topup', 'wire2-bob', 'bob')}"],
                                          "credit_wrong", "wire2-bob", 10**8),
    "a refund was not booked back": (["UPDATE payments SET taken_nano = 0 WHERE id = 'wire-ann'"], "payback_wrong", "wire-ann", 200_000_000),
}  # fmt: skip


def test_sound_books_reconcile_to_nothing(db, tmp_path):
    world(db, tmp_path)
    found = compared(db, tmp_path)
    assert found.total == found.drift_nano == found.missing == 0 and found.listed == []
    assert found.checked == {"usage": 8, "adjustments": 7, "invoices": 7, "payments": 4, "traces": 2}
    assert found.upstreams["big"]["requests"] == 3 and found.upstreams["big"]["reported_completion"] == 5 + 6 + 7
    assert not found.unbacked


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_found_and_nothing_else(db, tmp_path, fault):
    world(db, tmp_path)
    statements, kind, name, difference = FAULTS[fault]
    forced(db, *statements)
    found = compared(db, tmp_path)
    if fault == "a price changes under a version":  # every re-rating under it is then wrong
        assert found.by_kind == {kind: 7}
        return
    assert found.by_kind == {kind: 1}, found.listed
    (one,) = found.listed
    assert name is None or one.id == name
    assert difference is None or one.difference == difference
    assert (found.missing == 1) == (kind in kinds.ROWS_MISSING)


def test_the_last_invoice_that_is_gone_leaves_a_number_behind_it(db, tmp_path):
    world(db, tmp_path)
    number = db.read("SELECT number FROM invoices WHERE customer = 'ann' AND kind = 'usage'")[0][0]
    forced(db, "DELETE FROM invoices WHERE customer = 'ann' AND kind = 'usage'")
    payments = Payments(Ledger(db, Clock()))
    payments.manual("ann", 1_000_000, "wire9", tax_nano=0)  # the next one
    with db.transaction() as tx:
        assert tx("SELECT MAX(number) FROM invoices WHERE customer = 'ann'").fetchone()[0] == number  # the number is used again
    forced(db, f"UPDATE invoices SET number = {number + 1} WHERE customer = 'ann' AND number = {number}")
    found = compared(db, tmp_path)
    assert [(one.kind, one.id) for one in found.listed] == [("invoice_missing", f"ann#{number}")]


def test_an_answer_that_was_traced_and_not_billed_or_billed_otherwise(db, tmp_path):
    world(db, tmp_path)
    forced(db, "UPDATE usage SET completion_tokens = 1 WHERE request_id = 'r3'")
    traces = TraceStore(tmp_path / "trace.jsonl", get_template("xtml", ByteTokenizer()))
    traces.add_many([], [Served("ghost", (), 12, True, NOVEMBER), Served("r5", (), 3, True, NOVEMBER), Served("r1", (), 99, False, NOVEMBER)])
    traces.close()
    found = compared(db, tmp_path)
    told = {(one.kind, one.id): (one.expected, one.found) for one in found.listed}
    assert told.pop(("debit_wrong", "r3")) and told.pop(("adjustment_wrong", "r3/v2"))  # r3 was rated again, from the right count
    assert told == {("trace_tokens", "r3"): (8, 1), ("trace_tokens", "r5"): (3, 10), ("traced_not_billed", "ghost"): (12, 0)}


def test_a_text_upstreams_other_tokens_are_summed_and_no_fault(db, tmp_path):
    world(db, tmp_path)
    forced(db, "UPDATE usage SET upstream_completion = 99 WHERE request_id = 'r1'")
    found = compared(db, tmp_path, inexact=lambda name: name == "big")
    assert found.total == 0 and found.upstreams["big"]["reported_completion"] == 5 + 99 + 7


def test_a_window_bounds_what_is_looked_at(db, tmp_path):
    world(db, tmp_path)
    forced(db, "UPDATE usage SET nano_usd = nano_usd + 1 WHERE request_id IN ('r1', 'later')")
    assert [one.id for one in compared(db, tmp_path, window=(DECEMBER, 2e9)).listed] == ["later"]
    assert [one.id for one in compared(db, tmp_path, window=(0.0, DECEMBER)).listed] == ["r1", "r1/v2"]


def test_many_rows_are_compared_in_little_memory(db, tmp_path):
    """Rows stream: what is held at once does not grow with them."""
    import tracemalloc

    OLD.register(db)
    ledger = Ledger(db)
    ledger.open_account("ann")

    def peak(rows):
        with db.transaction() as tx:
            base = db.read("SELECT COUNT(*) FROM usage")[0][0]
            new = [(f"x{base + n}", "ann", "k", "tide", "v1", "", 9, 0, 0, 0, 9, "{}", 16200, 0, "stop", 1.0) for n in range(rows)]
            tx.insert("usage", ("request_id", "customer", "key_id", "model", "price_version", "mode", "prompt_tokens", "cached_tokens",
                                "cache_write_5m_tokens", "cache_write_1h_tokens", "completion_tokens", "tools", "nano_usd", "credit_nano",
                                "finish_reason", "created"), new)  # fmt: skip
        tracemalloc.start()
        found = reconcile(db, *ALL)[0]
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert found.by_kind == {"debit_missing": base + rows}
        return used

    few, many = peak(4000), peak(12000)
    assert many < 1.5 * few and many < 8 << 20


class Receiver(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.got.append((self.headers["tidelock-signature"], body))
        self.send_response(self.server.statuses.pop(0) if self.server.statuses else 200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def receiver():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    server.got, server.statuses = [], []
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_one_worker_of_many_reconciles_and_raises_the_alarm(db, tmp_path, receiver, caplog):
    world(db, tmp_path)
    secret = notices.set_webhook(db, notices.OPERATOR, f"http://127.0.0.1:{receiver.server_port}/alarm")
    now = [DECEMBER + 7200.0]
    jobs = [Job(db, f"w{n}", tmp_path / "trace.jsonl" if n == 0 else tmp_path / "none", Metrics(), clock=lambda: now[0]) for n in range(3)]

    def tick():
        return [job.tick(lambda name: False) for job in jobs]

    first = tick()
    assert [found.checked["usage"] for found in first] == [1, 0, 0] and not any(found.total for found in first)
    assert tick() == [None] * 3 and last(db)["sound"]
    assert "tidelock_reconciliation_drift_nano_usd 0.0" in jobs[2].metrics.text().decode()
    forced(db, "UPDATE usage SET nano_usd = nano_usd + 41 WHERE request_id = 'later'", "UPDATE usage SET nano_usd = nano_usd + 5 WHERE request_id = 'r0'")
    now[0] += 3600
    with caplog.at_level(logging.ERROR):
        tick()
    assert "1 discrepancies worth 41 nano-USD" in caplog.text  # r0 is older than the window
    assert all("tidelock_reconciliation_drift_nano_usd 41.0" in job.metrics.text().decode() for job in jobs[:1])
    tick()
    assert "tidelock_reconciliation_discrepancies 1.0" in jobs[2].metrics.text().decode()
    receiver.statuses[:] = [503, 302]
    assert [notices.deliver(db, lambda: now[0] + wait) for wait in (0, 1, 6, 20, 60)] == [0, 0, 0, 1, 0]
    assert len(receiver.got) == 3 and len({body for _, body in receiver.got}) == 1
    header, body = receiver.got[-1]
    signature.verify(body, header, [secret], now[0] + 20)
    told = json.loads(body)
    assert told["type"] == "reconciliation.failed" and told["data"]["by_kind"] == {"charge_wrong": 1}
    assert told["data"]["listed"][0]["id"] == "later"


def test_a_running_server_tells_it_to_the_admin_only(service, capsys, tmp_path):
    admin, user = service.key("root", role="admin"), service.key()
    service.client(user).chat.completions.create(model="tide", messages=[{"role": "user", "content": "hi"}])
    service.wait(lambda: service.state.ledger.db.read("SELECT 1 FROM usage"))
    url = service.running.base_url.removesuffix("/v1") + "/admin/reconciliation"

    def ask(secret, **query):
        return httpx.get(url, headers={"authorization": f"Bearer {secret}"}, params=query)

    found = ask(admin).json()
    assert found["sound"] and found["checked"]["usage"] == found["checked"]["traces"] == 1 and found["last"] is None
    assert found["unbacked"]["topups"] == 2
    assert (ask(user).status_code, ask("sk-no").status_code) == (403, 401)
    assert [ask(admin, since=since).status_code for since in ("x", "nan", 9e99, -1)] == [400] * 4
    assert main(["admin", "reconcile", str(tmp_path)]) == 0 and "everything agrees" in capsys.readouterr().out
    (record,) = [record["served"] for record, _ in read_kind(tmp_path / "trace.jsonl", "served")]
    (row,) = service.state.ledger.db.read("SELECT request_id, completion_tokens FROM usage")
    assert (record["request"], record["sampled"]) == tuple(row)
    forced(service.state.ledger.db, "UPDATE usage SET completion_tokens = completion_tokens + 1")
    assert ask(admin).json()["by_kind"] == {"debit_wrong": 1, "trace_tokens": 1}
    assert main(["admin", "reconcile", str(tmp_path)]) == 1 and "debit_wrong" in capsys.readouterr().out
    forced(service.state.ledger.db, "UPDATE usage SET completion_tokens = completion_tokens - 1, upstream = 'talk', upstream_completion = 99")
    (tmp_path / "upstreams.toml").write_text('[[upstream]]\nname = "talk"\nurl = "http://x"\nkind = "chat"\n')
    assert main(["admin", "reconcile", str(tmp_path)]) == 0 and "99 reported_completion" in capsys.readouterr().out
    (tmp_path / "upstreams.toml").write_text('[[upstream]]\nname = "talk"\nurl = "http://x"\nkind = "tokens"\n')
    assert main(["admin", "reconcile", str(tmp_path)]) == 1 and "upstream_completion" in capsys.readouterr().out


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50), st.sampled_from(["stop", "lost", "abort"])), max_size=8))
def test_what_is_wrong_is_what_differs_whatever_the_counts(tmp_path_factory, requests):
    """The upstream leg against a one-line model."""
    db = Database(":memory:")
    OLD.register(db)
    ledger = Ledger(db)
    ledger.open_account("ann")
    ledger.topup("ann", 10**9)
    for n, (billed, reported, reason) in enumerate(requests):
        request(ledger, "ann", f"q{n}", billed, Upstream(20, reported, 4), reason)
    found = reconcile(db, *ALL)[0]
    assert {one.id: one.difference for one in found.listed} == {f"q{n}": r - b for n, (b, r, _) in enumerate(requests) if r != b}
    assert found.drift_nano == sum(1500 * abs(r - b) for b, r, _ in requests)
    db.close()


def test_the_server_s_own_upkeep_reconciles_and_delivers(service, receiver):
    service.key()
    notices.set_webhook(service.state.ledger.db, notices.OPERATOR, f"http://127.0.0.1:{receiver.server_port}/alarm")
    service.client(service.key("bob")).chat.completions.create(model="tide", messages=[{"role": "user", "content": "hi"}])
    service.wait(lambda: service.state.ledger.db.read("SELECT 1 FROM usage"))
    forced(service.state.ledger.db, "UPDATE usage SET nano_usd = nano_usd + 5")
    service.state.sweep_interval_s = 0.02

    async def for_a_while() -> None:
        task = asyncio.create_task(upkeep.slowly(service.state))
        for _ in range(300):
            await asyncio.sleep(0.02)
            if receiver.got:
                break
        task.cancel()

    asyncio.run(for_a_while())
    assert json.loads(receiver.got[0][1])["data"]["by_kind"] == {"charge_wrong": 1}
    scraped = httpx.get(service.running.base_url.removesuffix("/v1") + "/metrics").text
    assert "tidelock_reconciliation_drift_nano_usd 5.0" in scraped and "tidelock_reconciliation_age_seconds nan" not in scraped
    forced(service.state.ledger.db, "UPDATE usage SET nano_usd = nano_usd - 5")
