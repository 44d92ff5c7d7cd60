"""Receipts say what the books say: every request once, exact, to its own customer, and live."""

from __future__ import annotations

import asyncio
import json
import threading
import time

import httpx2 as httpx
import pytest
from conftest import forced
from hypothesis import given, settings
from hypothesis import strategies as st

from tidelock.service import errors, receipts
from tidelock.service.books import Latency, Metered
from tidelock.service.gauges import gauges
from tidelock.service.keys import KeyStore
from tidelock.service.ladder import Limits
from tidelock.service.ledger import Ledger
from tidelock.service.prices import Counts, Price, PriceBook
from tidelock.service.rating import rerate
from tidelock.service.refused import MOST_OF_ONE, Refused
from tidelock.service.surfaces import operator, wallet
from tidelock.service.surfaces import receipts as surface
from tidelock.tokens.message import Message

WORDS = "the password is swordfish"


def get(service, secret, path, **query):
    headers = {"authorization": f"Bearer {secret}"}
    answer = httpx.get(service.running.base_url + path, params=query, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer.json()


def ask(service, secret, status=200, **more):
    body = {"model": "tide", "messages": [{"role": "user", "content": WORDS}], **more}
    answer = httpx.post(
        service.running.base_url + "/chat/completions", json=body, headers={"authorization": f"Bearer {secret}"}
    )
    assert answer.status_code == status, answer.text
    return answer


def test_a_request_has_a_receipt_with_its_price_line_by_line_and_entries_that_sum_to_zero(service):
    secret = service.key("ann")
    service.policy.cached_tokens, service.policy.pause_s = 4, 0.002
    service.policy.turns = [Message("assistant", "tide " * 60)]  # longer than the first stretch: the hold is extended
    used = ask(service, secret, max_tokens=1000).json()["usage"]
    (listed,) = get(service, secret, "/organization/receipts")["data"]
    receipt = get(service, secret, f"/organization/receipts/{listed['id']}")
    assert {**listed} == {k: receipt[k] for k in listed}
    assert (
        receipt["cost_nano_usd"] == used["cost_nano_usd"] == receipt["price"]["total_nano_usd"]
        and receipt["price"]["agrees"]
    )
    assert sum(line["nano_usd"] for line in receipt["price"]["lines"]) == receipt["price"]["list_nano_usd"]
    tokens = receipt["tokens"]
    assert (tokens["fresh"] + tokens["cached"], tokens["cached"], tokens["output"]) == (
        used["prompt_tokens"],
        4,
        used["completion_tokens"],
    )
    moved = receipt["transactions"]
    kinds = [t["kind"] for t in moved]
    assert (
        kinds[0] == "hold"
        and kinds[-1] == "settle"
        and set(kinds[1:-1]) == {"extend"}
        and len(kinds) == receipt["hold"]["steps"] + 1
    )
    assert all(sum(e["nano_usd"] for e in t["entries"]) == 0 for t in moved) and receipt["sum_nano_usd"] == 0
    by_account = {}
    for entry in (e for t in moved for e in t["entries"]):
        by_account[entry["account"]] = by_account.get(entry["account"], 0) + entry["nano_usd"]
    assert by_account == {"cash": -used["cost_nano_usd"], "held": 0, "revenue": used["cost_nano_usd"]}
    took = receipt["latency"]
    assert 0 <= took["wait_ms"] <= took["first_ms"] <= took["total_ms"] < 60_000


def test_a_refused_request_says_why_and_not_what_it_asked(service):
    poor, secret = service.key("poor", nano_usd=1), service.key("ann")
    ask(service, poor, 429)
    service.state.tiers.set_caps("ann", Limits(requests=1))
    ask(service, secret)
    ask(service, secret, 429)
    ask(service, secret, 404, model=WORDS)
    service.state.refused.flush()
    (one,) = get(service, poor, "/organization/receipts")["data"]
    assert (one["status"], one["cause"], one["http_status"], one["cost_nano_usd"]) == ("refused", "balance", 429, 0)
    found = get(service, secret, "/organization/receipts", outcome="refused")["data"]
    assert (
        [r["cause"] for r in found] == ["not_found", "limit_rpm"]
        and "limit:1" in found[1]["message"]
        and found[0]["message"] is None
    )
    assert "swordfish" not in json.dumps(found)
    detail = get(service, secret, f"/organization/receipts/{found[0]['id']}")
    assert detail["transactions"] == [] and detail["price"] is None
    service.state.refused._clock = lambda: time.time() + 31 * 86400
    service.state.refused.sweep()
    assert get(service, secret, "/organization/receipts", outcome="refused")["data"] == []


def test_a_storm_of_refusals_is_bounded(service):
    service.key("poor", nano_usd=1)
    (key,) = service.state.keys.list()
    for n in range(MOST_OF_ONE + 50):
        service.state.refused.note(f"req_{n}", key, "tide", errors.insufficient_balance())
        if n % 50 == 0:
            service.state.refused.flush()  # heartbeats do not make room; the next hour does
    service.state.refused.flush()
    assert service.state.ledger.db.read("SELECT COUNT(*) FROM refused")[0][0] == MOST_OF_ONE
    service.state.refused._clock = lambda: time.time() + 3600
    service.state.refused.note("req_later", key, "tide", errors.insufficient_balance())
    service.state.refused.flush()
    assert service.state.ledger.db.read("SELECT COUNT(*) FROM refused")[0][0] == MOST_OF_ONE + 1


def test_pages_cover_every_receipt_once_both_ways_and_filters_hold(service):
    secrets = [service.key("ann"), service.key("ann")]
    for n in range(7):
        ask(service, secrets[n % 2], max_tokens=3 if n % 3 == 0 else 200)
    ask(service, secrets[0], 404, model="none")
    service.state.refused.flush()
    everything = [r["id"] for r in get(service, secrets[0], "/organization/receipts", limit=100)["data"]]
    assert len(everything) == 8
    for order in ("desc", "asc"):
        seen, after = [], {}
        while True:
            page = get(service, secrets[1], "/organization/receipts", limit=3, order=order, **after)
            seen += [r["id"] for r in page["data"]]
            if not page["has_more"]:
                break
            after = {"after": page["last_id"]}
        assert seen == (everything if order == "desc" else everything[::-1])
    keys = [k.id for k in service.state.keys.list("ann")]
    for outcome, count in (("length", 3), ("stop", 4), ("refused", 1), ("lost", 0)):
        assert len(get(service, secrets[0], "/organization/receipts", outcome=outcome)["data"]) == count
    assert len(get(service, secrets[0], "/organization/receipts", api_key_id=keys[1])["data"]) == 3
    assert get(service, secrets[0], "/organization/receipts", start_time=int(time.time()) + 60)["data"] == []
    headers = {"authorization": f"Bearer {secrets[0]}"}
    assert httpx.get(service.running.base_url + "/organization/receipts?outcome=good", headers=headers).status_code == 400


def settle(ledger, customer, name, price=Price(300, 30, 1500), version="v1", counts=Counts(100, 40, completion=20)):
    ledger.hold(customer, "key_x", name, model="tide", price=price, price_version=version, prompt_tokens=counts.prompt,
                max_tokens=counts.completion + 5, lifetime_s=60)  # fmt: skip
    with ledger.books([customer], [name]) as books:
        return books.settle(name, price, Metered(counts, "stop", latency=Latency(1, None, 9)))


def test_both_databases_page_and_tell_of_rerating_alike(db):
    now = [1000.0]
    ledger = Ledger(db, clock=lambda: now[0])
    for version, price in (("v1", Price(300, 30, 1500)), ("v2", Price(200, 20, 1000))):
        PriceBook(version, {"tide": price}).register(db)
    for customer in ("ann", "bob"):
        ledger.open_account(customer)
        ledger.topup(customer, 10**9)
    for n in range(9):
        now[0] += n % 2  # some at the same instant
        settle(ledger, "ann" if n < 7 else "bob", f"r{n}")
    found, seen, after = [], [], None
    while True:
        found, more = receipts.page(db, "ann", {}, after=after, limit=2)
        seen += [r["id"] for r in found]
        if not more:
            break
        after = found[-1]["id"]
    assert sorted(seen) == [f"r{n}" for n in range(7)] and len(set(seen)) == 7
    rerate(ledger, 0, 1e10, "v2")
    one = receipts.one(db, "ann", "r3")
    assert (
        one["sum_nano_usd"] == 0
        and one["transactions"][-1]["kind"] == "rerate"
        and one["latency"] == {**dict.fromkeys(receipts.LATENCY), "wait_ms": 1, "total_ms": 9}
    )
    assert [a["nano_usd"] for a in one["adjustments"]] == [-(60 * 100 + 40 * 10 + 20 * 500)]
    with pytest.raises(Exception, match="no receipt"):
        receipts.one(db, "ann", "r8")


def test_both_databases_answer_the_live_query_and_the_operator_alike(db):
    ledger, keys = Ledger(db), KeyStore(db, b"x" * 32)
    PriceBook("v1", {"tide": Price(300, 30, 1500)}).register(db)
    key, _ = keys.create("a_nn", "k")
    keys.create("bob")
    ledger.topup("a_nn", 10**9)
    ledger.grant("a_nn", 50, lot="gone", expires=time.time() - 1)
    cost = settle(ledger, "a_nn", "r1")
    refused = Refused(db)
    refused.note("r2", key, "tide", errors.insufficient_balance())
    refused.note("r1", key, "tide", errors.balance_exhausted())  # cut short: settled, with a cause
    refused.flush()

    def since(when):
        return asyncio.run(receipts.since(db, key, when, 10))

    assert {(r["id"], r["status"], r["cause"]) for r in since(0)} == {
        ("r1", "settled", "balance"),
        ("r2", "refused", "balance"),
    }
    settled = next(r for r in since(0) if r["id"] == "r1")
    assert (
        settled == next(r for r in receipts.page(db, "a_nn", {})[0] if r["id"] == "r1")
        and settled["cost_nano_usd"] == cost
    )
    assert since(time.time() + 1) == []
    keys.revoke(key.id)
    assert since(0) == []
    found = operator._organizations(db, "A_", "", 10)["data"]
    assert [(o["id"], o["available_nano_usd"], o["spent_30d_nano_usd"], o["requests_30d"]) for o in found] == [
        ("a_nn", 10**9 - cost, cost, 1)
    ]
    assert operator._organizations(db, "%", "", 10)["data"] == []
    assert wallet.pockets(db, "a_nn", time.time())["available_nano_usd"] == 10**9 - cost
    assert gauges(db, "a_nn", {"": Limits(requests=5)}, time.time())[""]["requests"]["used"] == 0


@settings(max_examples=40, deadline=None)
@given(st.tuples(*[st.integers(0, 5000)] * 5), st.sampled_from([(1, 1), (1, 2), (3, 7)]), st.integers(0, 3))
def test_the_lines_are_the_price(parts, factor, calls):
    fresh, cached, write_5m, write_1h, output = parts
    price = Price(310, 31, 1511, 387, 620, {"search": 5_000_000}, factor)
    used = Counts(
        fresh + cached + write_5m + write_1h, cached, write_5m, write_1h, output, {"search": calls} if calls else {}
    )
    listed = sum(count * each for _, count, each in receipts._lines(price, used))
    assert listed * factor[0] // factor[1] == price.cost_nano(used)


class Listener:
    """Reads the live stream in a thread."""

    def __init__(self, service, secret, **query):
        self.events, self.comments, self.ended, self.status = [], [], threading.Event(), None
        headers = {"authorization": f"Bearer {secret}"}
        url = service.running.base_url + "/organization/receipts/stream"

        def listen():
            try:
                with httpx.stream("GET", url, params=query, headers=headers, timeout=30) as answer:
                    self.status, name = answer.status_code, ""
                    for line in answer.iter_lines():
                        if line.startswith("event: "):
                            name = line[7:]
                        elif line.startswith("data: "):
                            self.events.append((name, json.loads(line[6:])))
                        elif line.startswith(":"):
                            self.comments.append(line)
            finally:
                self.ended.set()

        threading.Thread(target=listen, daemon=True).start()

    def ids(self):
        return [data["id"] for name, data in self.events if name == "receipt"]


def test_the_stream_tells_of_every_receipt_once_whoever_settled_it_and_ends_with_the_key(service, monkeypatch):
    monkeypatch.setattr(surface, "POLL_S", 0.05)
    secret = service.key("ann")
    service.key("bob")
    ask(service, secret)
    listener = Listener(service, secret, since_ms=int((time.time() - 60) * 1000))
    service.wait(lambda: len(listener.ids()) == 1)
    other = Ledger(service.state.ledger.db)  # another worker of the same database
    late = Ledger(
        service.state.ledger.db, clock=lambda: time.time() - 2
    )  # whose transaction began before ours and ends now
    settle(other, "ann", "from_elsewhere")
    settle(other, "bob", "not_yours")
    service.wait(lambda: "from_elsewhere" in listener.ids())
    settle(late, "ann", "late")
    service.wait(lambda: "late" in listener.ids())
    (key,) = service.state.keys.list("ann")
    service.state.keys.revoke(key.id)
    settle(other, "ann", "after_the_end")
    assert listener.ended.wait(15)
    assert listener.events[-1] == ("gone", {})
    assert sorted(listener.ids()) == sorted({*listener.ids()}) and not {"after_the_end", "not_yours"} & set(
        listener.ids()
    )


def test_a_stream_asks_the_database_less_than_once_a_second(service, monkeypatch):
    reads, db = [], service.state.ledger.db
    plain = db._backend.read
    secret, pause_s = service.key("ann"), surface.POLL_S
    assert (1 + 1 / surface.CHECKED) / pause_s < 1
    monkeypatch.setattr(surface, "POLL_S", 0.02)
    monkeypatch.setattr(db._backend, "read", lambda sql, args: (reads.append(sql), plain(sql, args))[1])
    monkeypatch.setattr(surface, "MOST_STREAMS", 1)
    listener = Listener(service, secret)
    service.wait(lambda: len(listener.comments) >= 23)
    second = Listener(service, secret)
    assert second.ended.wait(5) and second.status == 429
    polls = len(listener.comments)  # each ends in a comment while nothing happens
    asked = sum("usage u" in sql for sql in reads), sum("keys.id = ?" in sql and "usage u" not in sql for sql in reads)
    assert polls <= asked[0] <= polls + 5 and asked[1] <= (polls + 5) / surface.CHECKED + 1
    service.state.keys.revoke(service.state.keys.list("ann")[0].id)
    assert listener.ended.wait(15)


def test_keys_know_when_they_were_last_used(service):
    secret, unused = service.key("ann"), service.key("ann")
    ask(service, secret)
    service.state.keys.flush()
    found = {k.id: k.last_used for k in service.state.keys.list("ann")}
    first, second = service.state.keys.list("ann")
    assert abs(found[first.id] - time.time()) < 60 and found[second.id] is None and unused


def test_rare_outcomes_are_found_by_their_own_index_and_are_the_same(db):
    """On PostgreSQL few rows are read faster without any index, so there only the answer is looked at."""
    ledger = Ledger(db, clock=lambda: 1000.0)
    PriceBook("v1", {"tide": Price(300, 30, 1500)}).register(db)
    ledger.open_account("ann")
    ledger.topup("ann", 10**9)
    reasons = ("stop", "length", "abort", "lost")
    for n in range(12):
        settle(ledger, "ann", f"r{n:02d}")
    forced(db, *(f"UPDATE usage SET finish_reason = '{reasons[n % 4]}' WHERE request_id = 'r{n:02d}'" for n in range(12)))
    for k, reason in enumerate(reasons):
        found, _ = receipts.page(db, "ann", {"outcome": reason})
        assert [r["id"] for r in found] == [f"r{n:02d}" for n in range(8 + k, -1, -4)], reason
    assert receipts.page(db, "ann", {"outcome": "' OR '1' = '1"}) == ([], False)
    if db.name == "sqlite":
        for reason in ("abort", "lost"):
            sql = f"EXPLAIN QUERY PLAN {receipts.SETTLED} AND u.finish_reason = '{reason}' {receipts.NEWEST} LIMIT 5"
            assert any("usage_cut_short" in row["detail"] for row in db.read(sql, ("ann",))), reason
