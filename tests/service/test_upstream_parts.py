"""Laws of a pool's parts: turns in the line, where conversations belong, when a circuit lets through, what a file says."""

import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from faulty import TEMPLATE
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tidelock.service.upstreams import affinity, read_upstreams
from tidelock.service.upstreams.circuit import LONGEST_S, LOOK_S, SHORTEST_S, TRIP, Circuit
from tidelock.service.upstreams.line import Line, Waiter
from tidelock.tokens.errors import UserError
from tidelock.tokens.message import Message
from tidelock.tokens.template import get_template
from tidelock.tokens.tokenizer import ByteTokenizer


# ---- the line ---------------------------------------------------------------------------------------------------


def serve(line, turns):
    """The tenants that the next so many turns go to."""
    out = []
    for _ in range(turns):
        waiter = next(line.turns())
        line.leave(waiter)
        line.charge(waiter.tenant, waiter.priority)
        out.append(waiter)
    return out


@given(st.dictionaries(st.sampled_from("abcd"), st.integers(1, 12), min_size=1), st.randoms(use_true_random=False))
def test_while_tenants_wait_none_is_a_turn_ahead_of_another(counts, rng):
    line, waiters = Line(100), [Waiter(t, 0, None) for t, n in counts.items() for _ in range(n)]
    rng.shuffle(waiters)
    assert all(line.join(w) is None for w in waiters)
    served, left = Counter(), Counter(counts)
    for waiter in serve(line, len(waiters)):
        served[waiter.tenant] += 1
        left[waiter.tenant] -= 1
        still = [served[t] for t in counts if left[t]]
        assert not still or max(still) - min(still) <= 1
    assert len(line) == 0


def test_a_turn_costs_what_its_priority_says_and_the_urgent_go_first_within_a_tenant():
    line = Line(1000)
    for n in range(60):
        for tenant, priority in (("urgent", -1), ("usual", 0), ("patient", 1)):
            line.join(Waiter(tenant, priority, n))
    shares = Counter(w.tenant for w in serve(line, 70))
    assert shares == {"urgent": 40, "usual": 20, "patient": 10}
    line = Line(10)
    for priority in (0, 1, -1, 0):
        line.join(Waiter("t", priority, priority))
    assert [w.what for w in serve(line, 4)] == [-1, 0, 0, 1]


def test_who_was_away_gets_no_credit():
    line = Line(100)
    for n in range(50):
        line.join(Waiter("busy", 0, n))
    serve(line, 40)
    for n in range(10):
        line.join(Waiter("new", 0, n))
    assert Counter(w.tenant for w in serve(line, 10)) == {"busy": 5, "new": 5}


class LineMachine(RuleBasedStateMachine):
    """Against a plain list: nobody is lost or doubled, the line never outgrows its limit, few displace many."""

    def __init__(self):
        super().__init__()
        self.line, self.model = Line(6), []

    @rule(tenant=st.sampled_from("abc"), priority=st.integers(-2, 2))
    def join(self, tenant, priority):
        before = Counter(w.tenant for w in self.model)
        waiter = Waiter(tenant, priority, None)
        out = self.line.join(waiter)
        assert (out is None) == (len(self.model) < 6)
        if out is not waiter:
            self.model.append(waiter)
        if out is not None and out is not waiter:
            self.model.remove(out)
            assert before[out.tenant] == max(before.values()) > before[tenant] + 1
            assert out.rank == max(w.rank for w in [*self.model, out] if w.tenant == out.tenant)

    @rule(data=st.data())
    def leave(self, data):
        if self.model:
            waiter = data.draw(st.sampled_from(self.model))
            self.model.remove(waiter)
            self.line.leave(waiter)
            self.line.leave(waiter)

    @rule()
    def serve(self):
        if self.model:
            self.model.remove(serve(self.line, 1)[0])

    @invariant()
    def the_same(self):
        assert len(self.line) == len(self.model) <= 6 and set(self.line) == set(self.model) == set(self.line.turns())


TestLineMachine = LineMachine.TestCase
TestLineMachine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


# ---- affinity ---------------------------------------------------------------------------------------------------

TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
TURN = TEMPLATE.generation_prompt()


@given(TEXT, TEXT, st.lists(st.tuples(TEXT, TEXT), max_size=3), st.sampled_from(["xtml", "chatml"]))
def test_every_turn_of_a_conversation_has_the_same_head_and_another_conversation_another(system, user, turns, name):
    template = get_template(name, ByteTokenizer())
    turn = template.generation_prompt()
    messages = [Message("system", system), Message("user", user)]
    first = affinity.head(template.render(messages, generation_prompt=True), turn)
    other = affinity.head(template.render([messages[0], Message("user", user + "!")], generation_prompt=True), turn)
    for answer, more in turns:
        messages += [Message("assistant", answer, "hm"), Message("user", more)]
        assert affinity.head(template.render(messages, generation_prompt=True), turn) == first
    assert first != other


CHOICE = """
import sys
from tidelock.service.upstreams import affinity
for n in range(200):
    key = affinity.head([n, 2, 3, 900, 5, n], [900])
    print(max(("a", "b", "c"), key=lambda name: affinity.score(key, name, 1.0 + (name == "c"))), end="")
"""


def test_workers_that_never_talk_place_a_conversation_alike():
    """Each in a process of its own, as workers are, with hash seeds of their own."""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    argv, options = [sys.executable, "-c", CHOICE], {"capture_output": True, "text": True, "check": True}
    chosen = {subprocess.run(argv, env={**env, "PYTHONHASHSEED": seed}, **options).stdout for seed in "12"}
    assert len(chosen) == 1 and {name for one in chosen for name in one} == {"a", "b", "c"}


def test_a_head_that_is_long_or_has_no_turn_is_still_the_same():
    long = TEMPLATE.render([Message("user", "x" * 9000)], generation_prompt=True)
    assert affinity.head(long, TURN) == affinity.head([*long, 1, 2, 3], TURN)
    raw = list(range(300))
    assert affinity.head(raw, TURN) == affinity.head([*raw, 7], TURN) != affinity.head([9, *raw], TURN)
    assert affinity.head([], ()) == affinity.head([], TURN)


def placed(keys, weights):
    return {key: max(weights, key=lambda name: affinity.score(key, name, weights[name])) for key in keys}


def test_one_that_goes_moves_only_its_own_conversations_and_shares_go_with_weights():
    keys = [n.to_bytes(16, "big") for n in range(4000)]
    weights = {"a": 1.0, "b": 1.0, "c": 2.0}
    before, after = placed(keys, weights), placed(keys, {"a": 1.0, "c": 2.0})
    assert all(after[key] == before[key] for key in keys if before[key] != "b")
    shares = Counter(before.values())
    assert abs(shares["c"] / 4000 - 0.5) < 0.04 and abs(shares["a"] / 4000 - 0.25) < 0.04


# ---- the circuit ------------------------------------------------------------------------------------------------


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def test_it_opens_after_so_many_failures_in_a_row_and_closes_by_one_trial():
    clock = Clock()
    circuit = Circuit(clock, random.Random(0))
    for _ in range(TRIP - 1):
        circuit.failed()
    circuit.answered()
    for _ in range(TRIP):
        assert circuit.admits()
        circuit.failed()
    assert circuit.state == "open" and not circuit.admits() and not circuit.due() and circuit.openings == 1
    clock.now = circuit.until
    assert circuit.due() and not circuit.admits()  # the pause alone lets nobody through
    circuit.half_open()
    circuit.sent()
    assert not circuit.admits()  # one at a time
    circuit.spoke()
    assert circuit.state == "closed" and circuit.admits()
    circuit.failed()  # on probation
    assert circuit.state == "open" and circuit.openings == 2


@given(st.integers(0, 2**32), st.integers(1, 12))
def test_pauses_grow_with_jitter_up_to_a_limit(seed, trials):
    clock = Clock()
    circuit = Circuit(clock, random.Random(seed))
    for n in range(trials):
        circuit.half_open()
        circuit.failed()
        whole = min(LONGEST_S, SHORTEST_S * 2**n)
        assert whole / 2 <= circuit.until - clock.now <= whole
        clock.now = circuit.until
    circuit.half_open()
    circuit.spoke()
    circuit.answered()
    circuit.half_open()
    circuit.failed()
    assert circuit.until - clock.now <= SHORTEST_S  # an answer that was whole forgives
    for _ in range(trials):
        clock.now = circuit.until
        circuit.probe_failed()  # however often nobody is there, the next look is soon
        assert circuit.state == "open" and LOOK_S / 2 <= circuit.until - clock.now <= LOOK_S and circuit.openings > 1


def test_what_fails_while_it_is_open_is_not_counted_twice_and_a_trial_that_left_makes_room():
    clock = Clock()
    circuit = Circuit(clock, random.Random(0))
    for _ in range(20):
        circuit.failed()
    assert circuit.until - clock.now <= SHORTEST_S and circuit.openings == 1
    circuit.half_open()
    circuit.sent()
    circuit.withdrawn()
    assert circuit.admits()
    circuit.rest(5)
    assert not circuit.admits() and circuit.rests_s() == 5
    clock.now += 5
    assert circuit.admits()


# ---- the file ---------------------------------------------------------------------------------------------------

ONE = '[[upstream]]\nname = "a"\nurl = "http://h:1"\nkind = "tokens"\n'
WRONG = {
    "": "there have to be",
    "upstream = 3": "there have to be",
    ONE + "[extra]": "unknown table extra",
    "[[upstream]]\nname = 'a'": "upstream a: url is missing",
    ONE.replace("tokens", "text"): 'kind is "tokens" or "chat"',
    ONE.replace("tokens", "chat"): "upstream a: model is missing",
    ONE.replace("http:", "ftp:"): "http:// or https://",
    ONE.replace('"a"', '"a,b"'): "a name is made of",
    ONE + ONE: "two upstreams are called a",
    ONE + "wieght = 2": "upstream a: unknown field wieght",
    ONE + "weight = true": "weight is a number, not True",
    ONE + "weight = 0": "weight has to be positive",
    ONE + "max_in_flight = 1.5": "max_in_flight is a whole number",
    ONE + "api_key_env = 'NOPE'": "the environment has no NOPE",
    ONE + "dialect = 'x'": 'dialect is "tidelock" or "vllm" for kind "tokens"',
    ONE + "dialect = 'kimi'": 'dialect is "tidelock" or "vllm" for kind "tokens"',
    ONE.replace("tokens", "chat") + "model = 'm'\ndialect = 'vllm'": 'dialect is "openai" or "kimi" for kind "chat"',
    ONE + "[pool]\nchoice = 'best'": "choice is one of affinity",
    ONE + "[pool]\nspread = 0.5": "spread is 0.5, which is too small",
    ONE + "[pool]\nprobe_s = 0": "probe_s is 0.0, which is too small",
    "x = [": "cannot read the upstreams",
}


@pytest.mark.parametrize("text", WRONG)
def test_what_is_wrong_with_a_file_is_said_in_one_line(tmp_path, text):
    file = tmp_path / "upstreams.toml"
    file.write_text(text)
    with pytest.raises(UserError) as e:
        read_upstreams(file, TEMPLATE, {"EMPTY": " "})
    assert WRONG[text] in str(e.value) and "\n" not in str(e.value) and str(file) in str(e.value)


def test_a_file_is_what_it_says(tmp_path):
    file = tmp_path / "upstreams.toml"
    pool = '[pool]\nretries = 0\nmodel = "m"\ncontext_length = 9\nwait_s = 0\ndirectives = false\n'
    file.write_text(pool + ONE + """weight = 2
        [[upstream]]
        name = "b"
        url = "https://api.example.com/v1"
        kind = "chat"
        model = "big"
        api_key_env = "KEY"
        idle_s = 3
        """)
    front = read_upstreams(file, TEMPLATE, {"KEY": "sk-1"})
    a, b = front.pool.upstreams
    assert not front.directives
    assert (front.model, front.context_length, front.pool.options.retries, front.pool.options.wait_s) == ("m", 9, 0, 0.0)
    assert (a.weight, a.exact, a.probe, b.exact, b.probe) == (2.0, True, "/health", False, "/models")
    assert b.policy._server.api_key == "sk-1" and b.policy._server.patience.idle_s == 3.0
    assert not front.pool.exact and front.pool.inexact("b") and not front.pool.inexact("a") and front.pool.inexact("a,b")
    shared = read_upstreams(file, TEMPLATE, {"KEY": "sk-1"}, workers=5).pool
    assert ([u.max_in_flight for u in shared.upstreams], shared.line.most) == ([12, 12], 51)
    with pytest.raises(UserError, match="cannot read"):
        read_upstreams(tmp_path / "nothing.toml", TEMPLATE)
