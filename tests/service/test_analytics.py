"""Laws of the founder's numbers: two paths that agree to the nano, parts that sum to their whole, growth as defined."""

from __future__ import annotations

import random
import shutil
import sqlite3
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from fractions import Fraction
from xml.etree import ElementTree

import httpx2
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_ledger import PRICE

from tidelock.cli.main import parser
from tidelock.service import errors
from tidelock.service.analytics import facts
from tidelock.service.analytics.calendar import month, month_of, shifted, span
from tidelock.service.analytics.figures import figures, months_until
from tidelock.service.analytics.growth import growth
from tidelock.service.analytics.metrics import METRICS
from tidelock.service.analytics.ratios import RATIOS, total
from tidelock.service.analytics.replay import replayed
from tidelock.service.analytics.report import identities
from tidelock.service.books import Metered
from tidelock.service.db import Database, StorageDown
from tidelock.service.ladder import Ladder, Limits
from tidelock.service.ledger import InsufficientBalance, Ledger
from tidelock.service.prices import Counts, Price, PriceBook
from tidelock.service.rating import rerate
from tidelock.service.tally import Tally, add, cause
from tidelock.service.tiers import Tiers
from tidelock.tokens.errors import UserError

START, MONTHS = month("2025-11").starts, 4
LAST, BASE = "2026-02", "2025-12"
DEARER = Price(PRICE.input_nano * 2, PRICE.cached_input_nano, PRICE.output_nano * 2)
CHEAPER = Price(PRICE.input_nano // 3, PRICE.cached_input_nano // 3, PRICE.output_nano // 3)
BOOKS = {
    "v1": {"m": PRICE, "n": Price(101, 11, 499)}, "dear": {"m": DEARER, "n": DEARER}, "cheap": {"m": CHEAPER, "n": CHEAPER},
}  # fmt: skip
CUSTOMERS = ("ann", "bob", "cyd")

who = st.sampled_from(CUSTOMERS)
nano = st.integers(1, 3_000_000)
operation = st.one_of(
    st.tuples(st.just("topup"), who, nano, st.sampled_from(("cash", "extra"))),
    st.tuples(st.just("grant"), who, nano, st.sampled_from(("voucher", "plan")), st.integers(1, 60)),
    st.tuples(st.just("refund"), who, nano),
    st.tuples(st.just("hold"), who, st.sampled_from("mn"), st.integers(0, 900), st.integers(1, 900)),
    st.tuples(st.just("extend"), st.integers(0, 3), st.integers(1, 500)),
    st.tuples(st.just("settle"), st.integers(0, 3), st.integers(0, 900), st.integers(0, 900), st.integers(0, 900)),
    st.tuples(st.just("release"), st.integers(0, 3)),
    st.tuples(st.just("rerate"), st.sampled_from(("dear", "cheap", "v1"))),
    st.tuples(st.just("term"), who, st.sampled_from((("small", 19), ("large", 99), ("free", 0))), st.sampled_from((1, 1, 12))),
    st.tuples(st.just("refuse"), st.sampled_from(("balance", "overloaded")), st.integers(1, 9)),
    st.tuples(st.just("compute"), st.sampled_from("mn"), st.integers(0, 10**7)),
)
life = st.lists(st.tuples(st.integers(0, 12 * 86400), operation), min_size=1, max_size=60)


class Play:
    """Drives the real ledger through a list of operations."""

    def __init__(self, db: Database) -> None:
        self.db, self.now, self.count = db, float(START), 0
        self.ledger = Ledger(db, clock=lambda: self.now)
        self.holds: list = []
        for version, prices in BOOKS.items():
            PriceBook(version, prices).register(db)
        PriceBook("later", BOOKS["v1"], effective=START + 35 * 86400.0).register(db)
        Tiers(db).set_ladder(Ladder("steep", ((1, Limits()), (1_500_000, Limits()), (4_000_000, Limits()), (4_000_001, Limits()))))
        rates = {(name, "CNY"): 137_000_000 + 1_000_001 * n for n, name in enumerate(("2025-11", "2025-12", "2026-01"))}
        for customer in CUSTOMERS:
            self.ledger.open_account(customer)
        own = {"bob": ("East", "CNY"), "cyd": ("West", "EUR")}
        facts.store(db, facts.Facts(own, rates, {("m", START): 1_100_001, ("m", START + 40 * 86400.0): 900_000}))

    def run(self, steps: list) -> None:
        for pause, (name, *args) in steps:
            self.now = self.now + pause if pause else month_of(self.now).ends  # 0: to the first instant of the next month
            self.now = min(float(self.now), month(LAST).ends - 0.25)
            self.count += 1
            self.ledger.expire_pockets()
            try:
                getattr(self, name)(*args)
            except (UserError, InsufficientBalance):
                pass

    def topup(self, customer, nano, pocket):
        self.ledger.topup(customer, nano, pocket=pocket)

    def grant(self, customer, nano, kind, days):
        self.ledger.grant(customer, nano, kind=kind, lot=f"lot{self.count}", expires=self.now + days * 86400)

    def refund(self, customer, nano):
        self.ledger.refund(customer, nano, f"back{self.count}")

    def hold(self, customer, model, prompt, most):
        price = BOOKS["v1"][model]
        self.holds.append(self.ledger.hold(
            customer, "k", f"r/{self.count}", model=model, price=price, price_version="v1", prompt_tokens=prompt,
            max_tokens=most, lifetime_s=1e9,
        ))  # fmt: skip

    def extend(self, n, tokens):
        if n < len(self.holds):
            self.ledger.extend(self.holds[n], tokens)

    def settle(self, n, cached, written, completion):
        if n < len(self.holds):
            hold = self.holds.pop(n)
            used = Metered(Counts(hold.prompt_tokens, cached, written, 0, completion), "stop")
            with self.ledger.books([hold.customer], [hold.request_id]) as books:
                books.settle(hold.request_id, hold.price, used)

    def release(self, n):
        if n < len(self.holds):
            self.ledger.release(self.holds.pop(n).request_id)

    def rerate(self, version):
        rerate(self.ledger, START, self.now, version)

    def term(self, customer, plan, months):
        with self.db.transaction() as tx:
            ends = month(shifted(month_of(self.now).name, months)).starts  # at a month's end, where it matters
            facts.sell(tx, facts.Term(f"t{self.count}", customer, plan[0], self.now, ends, months, plan[1] * 10**9 + self.count))

    def refuse(self, cause, times):
        with self.db.transaction() as tx:
            add(tx, {(int(self.now) // 3600 * 3600, "m", cause): times}, {})

    def compute(self, model, milliseconds):
        with self.db.transaction() as tx:
            add(tx, {}, {(int(self.now) // 3600 * 3600, model): milliseconds})


def both(db: Database, last: str = LAST) -> tuple[dict, dict]:
    with db.snapshot() as read:
        by_sql = figures(read, months_until(read, last), BASE)
        return {name: values for name, values in by_sql.items() if values}, replayed(read, last, BASE)


def check(db: Database) -> None:
    by_sql, by_replay = both(db)
    assert by_sql == by_replay
    earlier, replayed_earlier = both(db, BASE)  # what came after changes nothing in the months before
    assert earlier == replayed_earlier
    for name, values in earlier.items():
        if name != "revenue.constant_currency":
            assert values == {key: value for key, value in by_sql[name].items() if key[0] <= BASE}
    found = {metric.name: by_sql.get(metric.name, {}) for metric in METRICS}
    with db.snapshot() as read:
        names = [m.name for m in months_until(read, LAST)]
        spent, pockets = read("SELECT COALESCE(SUM(nano_usd), 0), COALESCE(SUM(credit_nano), 0) FROM usage")[0]
    for name in names:
        sums = {metric: total(found, (metric, ()), name) for metric in found}
        assert sums["revenue.by_region"] == sums["revenue.by_model"] == sums["cohorts.revenue"] == sums["revenue.usage"]
        assert found["concentration"].get((name, "all"), 0) == sums["revenue.usage"]
        assert sums["cohorts.payers"] == sums["payers.by_region"] == sums["payers.usage"] <= sums["payers.usage_or_plan"]
        assert sums["margin"] == sums["revenue.by_model"] - sums["compute.cost"]
        moves = Counter({part: value for (m, part), value in found["payers.moves"].items() if m == name})
        assert moves["new"] + moves["kept"] + moves["returned"] == sums["payers.usage"]
        assert moves["lost"] + moves["kept"] == total(found, ("payers.usage", ()), shifted(name, -1))
        assert moves["new"] == found["cohorts.payers"].get((name, name), 0)
        step = Counter({part: value for (m, part), value in found["mrr"].items() if m == name})
        assert step["start"] + step["new"] + step["reactivation"] + step["expansion"] == (
            step["contraction"] + step["churn"] + step["end"]
        )
        assert step["start"] == found["mrr"].get((shifted(name, -1), "end"), 0)
        base, net, kept = (found["retention.1m"].get((name, part), 0) for part in ("base", "net", "kept"))
        assert kept <= min(base, net) and base == total(found, ("retention.1m", ("base",)), name)
    moved = sum(found["cash"].get((name, "in"), 0) - found["cash"].get((name, "refunded"), 0) for name in names)
    earned = sum(found["revenue.usage"].values())
    assert moved + found["receivable"].get((LAST, ""), 0) == earned + found["deferred"].get((LAST, ""), 0)
    if "rerate" not in {row[0] for row in db.read("SELECT DISTINCT kind FROM transactions")}:
        assert earned == spent - pockets and sum(found["credits.used"].values()) == pockets


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(life)
def test_two_independent_paths_agree_and_parts_sum_to_their_whole(steps):
    db = Database(":memory:")
    try:
        play = Play(db)
        play.run(steps)
        assert play.ledger.audit().sound
        check(db)
    finally:
        db.close()


def test_a_long_life_gives_the_same_on_sqlite_and_postgres(db):
    """The same SQL on both; a seeded life long enough to contain everything."""
    draw = random.Random(7)
    steps = []
    for step in range(400):
        customer, n = draw.choice(CUSTOMERS), draw.randrange(3)
        steps.append((0 if step in (150, 250, 350) else draw.randrange(1, 20_000), draw.choice((
            ("topup", customer, draw.randrange(1, 2_000_000), draw.choice(("cash", "extra"))),
            ("grant", customer, draw.randrange(1, 500_000), draw.choice(("voucher", "plan")), draw.randrange(1, 60)),
            ("refund", customer, draw.randrange(1, 200_000)),
            *[("hold", customer, draw.choice("mn"), draw.randrange(900), draw.randrange(1, 900))] * 4,
            ("extend", n, draw.randrange(1, 500)),
            *[("settle", n, draw.randrange(900), draw.randrange(900), draw.randrange(900))] * 4,
            ("release", n),
            ("term", customer, draw.choice((("small", 19), ("large", 99), ("free", 0))), draw.choice((1, 12))),
            ("refuse", draw.choice(("balance", "overloaded")), draw.randrange(1, 9)),
            ("compute", draw.choice("mn"), draw.randrange(10**7)),
            ("rerate", draw.choice(("dear", "cheap", "v1"))),
        ))))  # fmt: skip
    play = Play(db)
    play.run(steps)
    check(db)
    found, _ = both(db)
    assert set(found) == {metric.name for metric in METRICS} - {"retention.12m", "plans.fees"}


# ---- growth --------------------------------------------------------------------------------------------------------


def test_growth_of_known_series():
    steady = growth([100, 270, 729])
    assert steady.mean == Fraction(17, 10) and steady.multiple == Fraction(729, 100) and steady.cmgr == pytest.approx(1.7)
    uneven = growth([100, 440, 484])  # the same words, "175 % a month", hide another business
    assert uneven.mean == Fraction(7, 4) and uneven.multiple == Fraction(484, 100) and uneven.cmgr == pytest.approx(1.2)
    assert growth([7]) is None and growth([0, 5]) is None and growth([5, 0, 3]) is None
    assert growth([5, 0]).multiple == 0


@given(st.lists(st.integers(1, 10**15), min_size=2, max_size=12))
def test_growth_definitions_bound_each_other(series):
    found = growth(series)
    assert found.cmgr <= float(found.mean) + 1e-9 * (1 + float(found.mean))  # geometric <= arithmetic
    assert (1 + found.cmgr) ** found.steps == pytest.approx(series[-1] / series[0])
    assert growth([series[0] * 3**n for n in range(len(series))]).mean == 2


@given(st.integers(0, 4 * 10**9), st.integers(-30, 30))
def test_months_are_half_open_and_follow_each_other(when, by):
    here = month_of(when)
    assert here.starts <= when < here.ends and month_of(here.ends).starts == here.ends
    assert shifted(shifted(here.name, by), -by) == here.name
    line = span(here.name, shifted(here.name, 13))
    assert len(line) == 14 and all(a.ends == b.starts for a, b in zip(line, line[1:], strict=False))


def test_a_wrong_month_is_one_clear_line():
    for wrong in ("2026-13", "26-03", "2026-3", "", "2026-03-01", "٢٠٢٦-03"):
        with pytest.raises(UserError, match="no month"):
            month(wrong)


# ---- what is asked at the terminal and over HTTP --------------------------------------------------------------------


def command(*words: str) -> dict:
    args = parser().parse_args(["admin", *words])
    return args.run(args)


@pytest.fixture(scope="module")
def made_up(tmp_path_factory):
    """A small synthetic year, and what making it said."""
    directory = tmp_path_factory.mktemp("year")
    return directory, command("synthetic-year", "--seed", "3", "--payers", "20", "--dir", str(directory))


def test_a_synthetic_year_gives_back_the_growth_that_was_put_in(made_up):
    directory, said = made_up
    assert not said["failed"] and said["replay"]["differences"] == [] and said["replay"]["compared"] > 500
    assert (said["payers"]["start"], said["payers"]["end"]) == (20, 390)
    assert said["payers"]["mean"] == pytest.approx(1.7, abs=1e-12) and said["payers"]["cmgr"] == pytest.approx(19.5 ** (1 / 3) - 1)
    assert said["overseas"]["end"] == 4 * said["overseas"]["start"] > 0
    with pytest.raises(UserError, match="not empty"):
        command("synthetic-year", "--dir", str(directory))


def test_the_terminal_shows_explains_and_verifies_every_metric(made_up, tmp_path, capsys):
    where = ("--dir", str(made_up[0]))
    found = command("analytics", "--month", "2026-03", "--base", "2025-11", "--verify", "--plots", str(tmp_path), *where)
    out = capsys.readouterr().out
    assert not found["failed"] and "x4 in 4 months" in out and all(metric["name"] in out for metric in found["metrics"] if metric["value"])
    assert {path.suffix for path in tmp_path.iterdir()} == {".svg"} and len(list(tmp_path.iterdir())) == len(found["plots"])
    for path in tmp_path.iterdir():
        ElementTree.parse(path)
    command("analytics", "--month", "2026-03", "--explain", "revenue.usage", *where)
    sql = capsys.readouterr().out
    rows = sqlite3.connect(made_up[0] / "service.sqlite").execute(sql).fetchall()  # as printed, it runs by hand
    assert {m: nano for m, _, nano in rows}["2026-03"] == found["metrics"][[m.name for m in METRICS].index("revenue.usage")]["value"][""]
    with pytest.raises(UserError, match="no metric"):
        command("analytics", "--month", "2026-03", "--explain", "vibes", *where)
    with pytest.raises(UserError, match="not begun"):
        command("analytics", "--month", "2199-01", *where)
    with pytest.raises(UserError, match="earlier month"):
        command("analytics", "--month", "2026-03", "--base", "2026-03", *where)


def test_verify_tells_of_a_usage_row_that_says_other_than_the_entries(made_up, tmp_path):
    shutil.copytree(made_up[0], tmp_path / "copy")
    connection = sqlite3.connect(tmp_path / "copy" / "service.sqlite")
    connection.execute("DROP TRIGGER usage_update_never")
    connection.execute("UPDATE usage SET credit_nano = nano_usd WHERE request_id = (SELECT MIN(request_id) FROM usage WHERE credit_nano = 0)")
    connection.commit()
    connection.close()
    found = command("analytics", "--month", "2026-03", "--verify", "--dir", str(tmp_path / "copy"))
    assert found["failed"] and {name for name, *_ in found["replay"]["differences"]} >= {"revenue.usage", "credits.used", "deferred"}


def test_ratios_and_identities_name_metrics_that_exist(made_up):
    names = {metric.name for metric in METRICS}
    assert {term[0] for ratio in RATIOS for term in (ratio.top, ratio.bottom)} <= names and len(names) == len(METRICS)
    with closing(Database(made_up[0] / "service.sqlite")) as db, db.snapshot() as read:
        found, months = figures(read, months_until(read, "2026-03"), "2025-11"), months_until(read, "2026-03")
    assert all(identities(found, months).values())
    for name, key in (("mrr", "churn"), ("revenue.by_region", "Tidelock Home CNY"), ("cohorts.payers", "2026-02")):
        broken = {**found, name: {**found[name], ("2026-03", key): found[name]["2026-03", key] + 1}}
        assert not all(identities(broken, months).values())


def test_empty_books_have_a_report_too(tmp_path, capsys):
    Database(tmp_path / "service.sqlite").close()
    found = command("analytics", "--month", "2026-03", "--verify", "--plots", str(tmp_path / "plots"), "--dir", str(tmp_path))
    assert not found["failed"] and found["months"] == ["2026-03"] and all(metric["value"] == {} for metric in found["metrics"])
    assert all(ratio["value"] == {} for ratio in found["ratios"]) and found["growth"]["of"] == []


def test_facts_come_from_a_file_and_wrong_ones_are_named(tmp_path):
    db = Database(tmp_path / "service.sqlite")
    Ledger(db).open_account("ann")
    db.close()
    file, where = tmp_path / "facts.toml", ("--dir", str(tmp_path))
    text = '[billing]\nann = ["Ltd", "EUR"]\n[fx."2026-03"]\nEUR = "1.0831"\n[compute."m"]\n2026-01-01 = "0.0011"\n'
    file.write_text(text)
    for _ in range(2):  # said again, it replaces
        assert command("facts", str(file), *where) == {"customers": 1, "exchange_rates": 1, "compute_prices": 1}
    for wrong, named in (("ann =", "unknown customer|do not fit"), ('"1.0831"', "fx 2026-03 EUR"), ("2026-01-01", "no day"),
                         ('["Ltd", "EUR"]', "billing ann"), ("2026-03", "no month"), ("[billing]", "unknown table")):  # fmt: skip
        file.write_text(text.replace(wrong, {"ann =": "zoe =", '"1.0831"': "1.0831", "2026-01-01": "now", "2026-03": "March",
                                             "[billing]": "[bills]"}.get(wrong, '"EUR"')))  # fmt: skip
        with pytest.raises(UserError, match=named):
            command("facts", str(file), *where)


def test_the_admin_endpoint_gives_the_report_to_admins_only(service):
    def get(path: str, secret: str) -> tuple[int, dict]:
        url = service.running.base_url.removesuffix("/v1") + path
        answer = httpx2.get(url, headers={"authorization": f"Bearer {secret}"})
        return answer.status_code, answer.json()

    admin, user = service.key("boss", 0, role="admin"), service.key()
    service.client(user).chat.completions.create(model="tide", messages=[{"role": "user", "content": "hi"}])
    status, found = get("/admin/analytics", admin)
    assert status == 200 and found["object"] == "analytics" and all(found["checks"].values())
    revenue = next(metric for metric in found["metrics"] if metric["name"] == "revenue.usage")
    charged = service.state.ledger.statement()[0]["spent_nano"]
    assert revenue["value"] == {"": charged} and charged > 0 and revenue["definition"] and revenue["sql"]
    assert get("/admin/analytics", user)[0] == 403 and get("/admin/analytics", "sk-none")[0] == 401
    assert get("/admin/analytics?month=2026-13", admin)[0] == 400 == get("/admin/analytics?month=2199-12", admin)[0]


def test_refusals_are_counted_by_cause_and_computing_time_once(service):
    poor, rich = service.key("poor", 1), service.key("rich")
    ask = {"model": "tide", "messages": [{"role": "user", "content": "hi"}]}
    service.policy.pause_s = 0.05
    for secret, change in ((poor, {}), (rich, {"temperature": 9}), ("sk-none", {}), (rich, {"model": "other"})):
        with pytest.raises(openai.APIError):
            service.client(secret, max_retries=0).chat.completions.create(**{**ask, **change})
    client = service.client(rich, max_retries=0)
    began = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: client.chat.completions.create(**ask), range(4)))
    elapsed_ms = (time.monotonic() - began) * 1000
    service.wait(lambda: not any(service.state.tally._running.values()))
    service.state.tally.flush()
    service.state.tally.flush()  # nothing is added twice
    db = service.state.ledger.db
    counted = dict(map(tuple, db.read("SELECT cause, SUM(requests) FROM refusals WHERE model = 'tide' GROUP BY cause")))
    assert counted == {"balance": 1, "bad_request": 1, "key": 1, "not_found": 1}
    assert 50 <= db.read("SELECT SUM(milliseconds) FROM compute WHERE model = 'tide'")[0][0] <= elapsed_ms


@pytest.mark.parametrize(("error", "named"), [
    (errors.insufficient_balance(), "balance"), (errors.balance_exhausted(), "balance"), (errors.invalid_key(), "key"),
    (errors.storage_down(), "storage"), (errors.policy_failed("full", 429, "engine_overloaded_error"), "overloaded"),
    (errors.policy_failed("full", 503, "server_unavailable"), "overloaded"), (errors.timed_out(5), "timeout"),
    (errors.invalid_request("no", "n"), "bad_request"), (errors.internal(), "server"), (errors.not_found("what"), "not_found"),
    (errors.ApiError(429, "rate_limit_reached_error", "Your account a<k> request reached TPM rate limit"), "limit_tpm"),
    (errors.ApiError(429, "rate_limit_reached_error", "Your account a<k> request reached max concurrency"), "limit_concurrency"),
])  # fmt: skip
def test_every_refusal_has_one_cause(error, named):
    assert cause(error) == named


def test_counts_survive_a_database_that_is_down(db):
    class Down:
        def transaction(self):
            raise StorageDown("away")

    tally = Tally(Down(), clock=lambda: 7_300.0)
    tally.refused("m", errors.insufficient_balance())
    tally.refused("m", errors.ApiError(429, "rate_limit_reached_error", "request reached TPM rate limit"))
    with pytest.raises(StorageDown):
        tally.flush()
    tally._db = db
    tally.refused("m", errors.insufficient_balance())
    tally.flush()
    found = [tuple(row) for row in db.read("SELECT hour, model, cause, requests FROM refusals ORDER BY cause")]
    assert found == [(7200, "m", "balance", 2), (7200, "m", "limit_tpm", 1)]
