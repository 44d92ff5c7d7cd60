"""A state machine on the ledger against a model of thirty lines, with every pocket, on SQLite and PostgreSQL."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from tidelock.service.db import Database
from tidelock.service.ledger import InsufficientBalance, Ledger
from tidelock.service.prices import Price, PriceBook

PRICE = Price(input_nano=300, cached_input_nano=30, output_nano=1500)
CUSTOMERS, NEVER = ("ann", "bob"), float("inf")


class Model:
    """What the ledger should say: pockets as [rank, expiry, name, nano], holds as what they took from which pocket."""

    def __init__(self) -> None:
        self.pockets = {c: {} for c in CUSTOMERS}  # name -> [rank, expiry, nano]
        self.holds, self.spent, self.breakage, self.now = {}, 0, 0, 0.0

    def free(self, customer):
        return sum(nano for _, expiry, nano in self.pockets[customer].values() if expiry > self.now)

    def put(self, customer, name, rank, expiry, nano):
        pocket = self.pockets[customer].setdefault(name, [rank, expiry, 0])
        pocket[2] += nano

    def take(self, customer, nano):
        for name, pocket in sorted(self.pockets[customer].items(), key=lambda item: (item[1][:2], item[0])):
            part = min(pocket[2], nano) if pocket[1] > self.now else 0
            pocket[2] -= part
            nano -= part
            if part:
                yield name, part

    def close(self, hold, cost):
        self.spent += cost
        for name, nano in hold["parts"].items():
            used = min(nano, cost)
            cost -= used
            self.pockets[hold["customer"]][name][2] += nano - used

    def expire(self):
        for pocket in (p for pockets in self.pockets.values() for p in pockets.values() if p[1] <= self.now):
            self.breakage, pocket[2] = self.breakage + pocket[2], 0


class Machine(RuleBasedStateMachine):
    target = staticmethod(lambda: ":memory:")

    def __init__(self) -> None:
        super().__init__()
        self.model, self.requests, self.lots, self.paid, self.done = Model(), 0, 0, set(), []
        self.ledger = Ledger(Database(self.target()), clock=lambda: self.model.now)
        PriceBook("v1", {"m": PRICE}).register(self.ledger.db)

    @initialize()
    def accounts(self):
        for customer in CUSTOMERS:
            self.ledger.open_account(customer)

    @rule(customer=st.sampled_from(CUSTOMERS), nano=st.integers(1, 4_000_000), payment=st.integers(0, 9),
          pocket=st.sampled_from([("extra", 2), ("cash", 3)]))  # fmt: skip
    def topup(self, customer, nano, payment, pocket):
        assert self.ledger.topup(customer, nano, f"pay_{payment}", pocket=pocket[0]) is (payment not in self.paid)
        if payment not in self.paid:
            self.paid.add(payment)
            self.model.put(customer, (pocket[0], ""), pocket[1], NEVER, nano)

    @rule(customer=st.sampled_from(CUSTOMERS), nano=st.integers(1, 2_000_000), days=st.integers(1, 60),
          kind=st.sampled_from([("voucher", 0), ("plan", 1)]))  # fmt: skip
    def grant(self, customer, nano, days, kind):
        self.lots += 1
        name, expires = (kind[0], f"lot{self.lots:03}"), self.model.now + days
        assert self.ledger.grant(customer, nano, kind=kind[0], lot=name[1], expires=expires)
        self.model.put(customer, name, kind[1], expires, nano)

    @rule(customer=st.sampled_from(CUSTOMERS), prompt=st.integers(0, 2000), most=st.integers(1, 2000), life=st.integers(1, 50))
    def hold(self, customer, prompt, most, life):
        self.requests += 1
        name, covered = f"r{self.requests}", (self.model.free(customer) - 300 * prompt) // 1500
        ask = {"model": "m", "price": PRICE, "price_version": "v1", "prompt_tokens": prompt, "max_tokens": most}
        if covered < 1:
            with pytest.raises(InsufficientBalance):
                self.ledger.hold(customer, "key", name, **ask, lifetime_s=life)
            return
        hold = self.ledger.hold(customer, "key", name, **ask, lifetime_s=life)
        assert hold.max_tokens == min(most, covered)
        parts = dict(self.model.take(customer, 300 * prompt + 1500 * hold.max_tokens))
        self.model.holds[name] = {"customer": customer, "parts": parts, "hold": hold, "tokens": hold.max_tokens,
                                  "progress": 0, "expires": self.model.now + life}  # fmt: skip

    def pick(self, data):
        return data.draw(st.sampled_from(sorted(self.model.holds))) if self.model.holds else None

    @rule(data=st.data(), tokens=st.integers(0, 2000), progress=st.integers(0, 3000))
    def extend(self, data, tokens, progress):
        if name := self.pick(data):
            held = self.model.holds[name]
            more = min(tokens, self.model.free(held["customer"]) // 1500)
            held["progress"] = max(held["progress"], min(progress, held["tokens"]))
            assert self.ledger.extend(held["hold"], tokens, progress) == more
            for pocket, nano in self.model.take(held["customer"], 1500 * more):
                held["parts"][pocket] = held["parts"].get(pocket, 0) + nano
            held["tokens"] += more

    @rule(data=st.data(), tokens=st.integers(-5, 3000), cached=st.integers(-5, 3000))
    def settle(self, data, tokens, cached):
        if name := self.pick(data):
            held = self.model.holds.pop(name)
            hold = held["hold"]
            charge = self.ledger.settle(hold, cached_tokens=cached, completion_tokens=tokens, finish_reason="stop")
            cached, tokens = min(max(cached, 0), hold.prompt_tokens), min(max(tokens, 0), held["tokens"])
            assert charge == (hold.prompt_tokens - cached) * 300 + cached * 30 + tokens * 1500
            self.model.close(held, charge)
            self.done.append(hold)

    @rule(data=st.data())
    def release(self, data):
        if name := self.pick(data):
            held = self.model.holds.pop(name)
            assert self.ledger.release(name)
            self.model.close(held, 0)
            self.done.append(held["hold"])

    @rule(data=st.data())
    def closing_again_does_nothing(self, data):
        if self.done:
            hold = data.draw(st.sampled_from(self.done))
            charged = self.ledger.db.read("SELECT nano_usd FROM usage WHERE request_id = ?", (hold.request_id,))
            again = self.ledger.settle(hold, cached_tokens=0, completion_tokens=1, finish_reason="stop")
            assert again == (charged[0][0] if charged else 0)
            assert not self.ledger.release(hold.request_id)

    @rule(seconds=st.integers(1, 30))
    def time_passes(self, seconds):
        self.model.now += seconds
        late = [name for name, held in self.model.holds.items() if held["expires"] <= self.model.now]
        assert self.ledger.sweep() == len(late)
        for held in map(self.model.holds.pop, late):
            cost = held["progress"] and held["hold"].prompt_tokens * 300 + held["progress"] * 1500
            self.model.close(held, cost)
        self.ledger.expire_pockets()
        self.model.expire()

    @invariant()
    def the_books_say_what_the_model_says(self):
        audit = self.ledger.audit()
        assert audit.sound, audit
        rows = self.ledger.db.read("SELECT prompt_tokens, cached_tokens, completion_tokens, nano_usd FROM usage")
        assert all((p - c) * 300 + c * 30 + t * 1500 == nano for p, c, t, nano in map(tuple, rows))
        assert {c: self.ledger.balance(c) for c in CUSTOMERS} == {c: self.model.free(c) for c in CUSTOMERS}
        books = [self.ledger.balances(customer) for customer in CUSTOMERS]
        assert sum(b.get("revenue", 0) for b in books) == self.model.spent
        assert sum(b.get("breakage", 0) for b in books) == self.model.breakage

    def teardown(self):
        self.ledger.db.close()


CHECKS = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]


def test_any_interleaving_keeps_the_books_and_the_model_alike():
    run_state_machine_as_test(Machine, settings=settings(max_examples=50, stateful_step_count=30, deadline=None))


def test_any_interleaving_on_postgres(postgres):
    class OnPostgres(Machine):
        target = staticmethod(postgres.database)

    few = settings(max_examples=4, stateful_step_count=25, deadline=None, suppress_health_check=CHECKS)
    run_state_machine_as_test(OnPostgres, settings=few)
