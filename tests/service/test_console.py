"""The console in a real browser, against a real server with an organisation that has a past: the right numbers on every page,
nothing in the browser's log, nothing its policy had to block, and names that are markup shown as text."""

from __future__ import annotations

import asyncio
import csv
import gzip
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import httpx2 as httpx
import pytest
from browser import binary, browser
from seeded import HOSTILE, USD, seed

from tidelock.service import console, suspension
from tidelock.service.plans import Plan

needs_browser = pytest.mark.skipif(binary() is None, reason="Chromium is not installed")
CUSTOMER = ("overview", "receipts", "keys", "usage", "billing", "limits", "members", "audit")
OPERATOR = ("business", "organizations", "ledger", "server", "prices")
TEXT = "document.querySelector('main').innerText"


def dollars(nano: int) -> str:
    """To the cent, as the console writes it."""
    cents = (Decimal(nano) / 10**7).quantize(Decimal(1), rounding="ROUND_HALF_UP")
    return f"${cents / 100:,.2f}"


def exact(nano: int) -> str:
    whole, fraction = divmod(nano, 10**9)
    digits = f"{fraction:09d}"
    return f"${whole:,}.{digits[:2]}{digits[2:].rstrip('0')}"


@pytest.fixture
def url(service):
    return service.running.base_url.removesuffix("/v1") + "/console/"


# ---- the files -----------------------------------------------------------------------------------------------------


def test_every_file_is_served_under_the_policy_and_asked_for_again_only_if_it_changed(url):
    client = httpx.Client()
    for name, file in console.load().items():
        first = client.get(url + name)
        assert (
            first.status_code == 200 and first.headers["content-type"] == file.media_type and first.content == file.body
        )
        policy = first.headers["content-security-policy"]
        for rule in (
            "default-src 'none'",
            "script-src 'self';",
            "style-src 'self';",
            "connect-src 'self'",
            "frame-ancestors 'none'",
            "trusted-types",
        ):
            assert rule in policy
        assert (
            "unsafe" not in policy
            and first.headers["x-content-type-options"] == "nosniff"
            and first.headers["cache-control"] == "no-cache"
        )
        again = client.get(url + name, headers={"if-none-match": first.headers["etag"]})
        assert again.status_code == 304 and again.content == b"" and "content-security-policy" in again.headers
        assert client.get(url + name, headers={"if-none-match": '"other"'}).status_code == 200
    assert httpx.get(url).content == console.load()["index.html"].body
    assert httpx.get(url.removesuffix("/")).status_code == 307


def test_it_is_sent_packed_to_who_can_unpack(url):
    with httpx.stream("GET", url + "app.js", headers={"accept-encoding": "gzip"}) as answer:
        packed = b"".join(answer.iter_raw())
    assert answer.headers["content-encoding"] == "gzip" and gzip.decompress(packed) == console.load()["app.js"].body


@pytest.mark.parametrize(
    "path", ["nothing.js", "../serve.py", "%2e%2e/console.py", "..%2f..%2f..%2fpyproject.toml", "pages", "package.json"]
)
def test_nothing_else_is_served(url, path):
    answer = httpx.get(url + path)
    assert answer.status_code == 404 and "content-security-policy" in answer.headers or "error" in answer.json()


# ---- the browser ---------------------------------------------------------------------------------------------------


class Visit:
    """Somebody in front of the console."""

    def __init__(self, page, url: str) -> None:
        self.page, self.url = page, url

    async def sign_in(self, key: str) -> None:
        await self.page.go(self.url)
        await self.page.until("!!document.querySelector('input[name=key]')")
        await self.page.run(f"document.querySelector('input[name=key]').value = {key!r}")
        await self.page.run("document.querySelector('form').requestSubmit()")

    async def open(self, name: str) -> str:
        """Goes to a page and returns what it says, once nothing is loading."""
        await self.page.run(f"location.hash = '#/{name}'")
        await self.page.until(
            f"document.querySelector('main')?.dataset.ready === {name.partition('/')[0].partition('?')[0]!r}"
        )
        await self.page.until("!document.querySelector('.loading')")
        return await self.page.run(TEXT)

    async def press(self, words: str) -> None:
        """The last button that says so, which is that of a dialog if one is open."""
        await self.page.until(f"[...document.querySelectorAll('button')].some(b => b.textContent.trim() === {words!r})")
        await self.page.run(
            f"[...document.querySelectorAll('button')].filter(b => b.textContent.trim() === {words!r}).at(-1).click()"
        )

    async def fits(self) -> None:
        assert await self.page.run("document.documentElement.scrollWidth <= innerWidth"), await self.page.run(
            "location.hash"
        )

    def well(self, *secrets: str) -> None:
        assert self.page.problems == []
        origin = self.url.removesuffix("/console/")
        for request in self.page.requests:
            assert request.startswith((origin, "data:", "blob:")), request
            assert not any(secret in request for secret in secrets), request


def visiting(url: str, visit) -> None:
    async def run() -> None:
        async with browser() as page:
            await page.size(1600, 1000)
            await visit(Visit(page, url))

    asyncio.run(run())


@needs_browser
def test_every_page_of_a_customer_shows_what_the_books_say(service, url, tmp_path):
    made = seed(service.state, days=20)
    ledger, db = service.state.ledger, service.state.ledger.db

    async def visit(v: Visit) -> None:
        await v.sign_in(made.owner)
        await v.page.until("document.querySelector('main')?.dataset.ready === 'overview'")
        said = await v.open("overview")
        assert dollars(ledger.balance(made.customer)) in said and "Aurora Labs" in said and "Spend so far" in said
        said = await v.open("receipts")
        (newest,) = db.read("SELECT nano_usd, completion_tokens FROM usage WHERE request_id = ?", (made.newest,))
        assert f"{newest[1]:,}" in said and f"{newest[0] / 1e9:.9f}" in said.replace("\n", "") and "Live" in said
        said = await v.open(f"receipts/{made.newest}")
        assert exact(newest[0]) in said and "agrees with the bill" in said and "sum $0.00" in said and "settle" in said
        said = await v.open("keys")
        assert all(name in said for name in ("production", "evals", "10.0.0.0/8", "by request"))
        said = await v.open("usage")
        assert f"\n{made.requests:,}\n" in said and exact(made.spent_nano) in said
        await v.page.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
        await v.press("Download CSV")
        file = await _downloaded(tmp_path)
        rows = list(csv.DictReader(file.read_text().splitlines()))
        assert sum(int(row["cost_nano_usd"]) for row in rows) == made.spent_nano
        assert sum(int(row["requests"]) for row in rows) == made.requests
        said = await v.open("billing")
        assert (
            "starter" in said
            and "5-hour window" in said
            and "$595.00" in said
            and "wire-aurora-1" in said
            and "renews" in said
        )
        assert exact(ledger.balances(made.customer)["plan"]) in said.replace("\n", "")
        said = await v.open("limits")
        assert "Tier 3" in said and "you are here" in said and "5,000 of 5,000 left" in said
        said = await v.open("members")
        assert "mara@aurora.example" in said and "nightly evals" in said
        assert "member.added" in await v.open("audit")
        # a name that is markup is text, wherever it is shown
        for name in ("receipts", "keys", "members"):
            assert HOSTILE in (await v.open(name)) and not await v.page.run("document.querySelector('main img')")
        v.well(made.owner)
        assert await v.page.run("Object.keys(localStorage).length + document.cookie.length") == 0

    visiting(url, visit)


async def _downloaded(folder: Path) -> Path:
    for _ in range(200):
        if found := list(folder.glob("usage-*.csv")):
            return found[0]
        await asyncio.sleep(0.05)
    raise AssertionError("nothing was downloaded")


@needs_browser
def test_pages_fit_a_phone_and_the_dark(service, url):
    made = seed(service.state, days=6)

    async def visit(v: Visit) -> None:
        await v.sign_in(made.operator)
        for width, dark in ((400, True), (1600, False)):
            await v.page.size(width, 900, dark)
            for name in (*CUSTOMER, *OPERATOR, "organizations/aurora"):
                await v.open(name)
                await v.fits()
        v.well(made.operator)

    visiting(url, visit)


@needs_browser
def test_the_operator_sees_the_business_and_the_books(service, url):
    made = seed(service.state, days=20)
    upstreams = [
        {
            "name": "east",
            "kind": "vllm",
            "state": "closed",
            "in_flight": 3,
            "max_in_flight": 8,
            "weights_version": 7,
            "exact": True,
        }
    ]
    health = {"status": "degraded", "model": "tide", "weights_version": 7, "exact": True, "upstreams": upstreams}

    async def visit(v: Visit) -> None:
        await v.sign_in(made.operator)
        said = await v.open("business")
        for words in ("Paying users", "MRR", "Cohorts", "Rejected demand", "Margin", "Growth", "$19.00"):
            assert words in said
        assert "Does not hold" not in said
        await v.press("Definition")
        shown = await v.page.until("document.querySelector('dialog')?.innerText")
        assert "The query" in shown and "Unit:" in shown
        await v.press("Close")
        assert "Aurora Labs" in await v.open("organizations") and "house" in await v.open("organizations?q=hous")
        said = await v.open("organizations/aurora")
        assert dollars(service.state.ledger.balance("aurora")) in said and "jun@aurora.example" in said
        await v.press("Give a voucher")
        await v.page.run(
            "Object.entries({usd: '1.25', name: 'sorry'}).forEach(([n, t]) => document.querySelector(`dialog [name=${n}]`).value = t)"
        )
        await v.press("Give voucher")
        await v.page.until("!document.querySelector('dialog')")
        await v.page.until(f"{TEXT}.includes('voucher.granted')")
        assert service.state.ledger.balances("aurora")["voucher"] >= 1_250_000_000
        await v.press("Suspend")
        await v.page.run("document.querySelector('dialog [name=reason]').value = 'invoice <b>7</b> is overdue'")
        await v.press("Suspend now")
        await v.page.until(f"{TEXT}.includes(': invoice <b>7</b> is overdue') && {TEXT}.includes('organization.suspended')")
        assert service.state.keys.list("aurora")[0].suspended
        assert "suspended" in await v.open("organizations?q=aurora")
        await v.open("organizations/aurora")
        await v.press("Lift the suspension")
        await v.press("Lift it")
        await v.page.until(f"{TEXT}.includes('organization.resumed') && !document.querySelector('.notice')")
        assert not service.state.keys.list("aurora")[0].suspended
        said = await v.open("ledger")
        assert said.count("holds\n") == 7 and "broken\n" not in said and "all records agree" in said
        said = await v.open("prices")
        assert "in force" in said and "$0.30" in said and "1 of 100" in said
        await v.page.replacing(
            {"/admin/reconciliation": (404, {"error": {"message": "Not Found"}}), "/health": (200, health)}
        )
        assert "Not available on this server." in await v.open("ledger")
        wrong = {"kind": "debit_missing", "id": "req_7", "customer": "aurora", "expected": 5, "found": 0, "nano_usd": 5}
        found = {"sound": False, "discrepancies": 1, "drift_nano_usd": 5, "by_kind": {"debit_missing": 1}, "listed": [wrong]}
        v.page.answers["/admin/reconciliation"] = (200, found)
        await v.open("prices")
        said = await v.open("ledger")
        assert "1 discrepancies" in said and "req_7" in said and "$0.000000005" in said
        said = await v.open("server")
        assert "east" in said and "working" in said and "3 of 8" in said and "degraded" in said and "Tokens a second" in said
        v.page.problems = [p for p in v.page.problems if "/admin/reconciliation" not in p]  # the browser logs every 404
        v.well(made.operator)

    visiting(url, visit)


@needs_browser
def test_a_key_is_shown_once_works_at_once_and_what_it_does_appears_while_one_looks(service, url):
    made = seed(service.state, days=3)

    async def visit(v: Visit) -> None:
        await v.sign_in(made.owner)
        await v.open("keys")
        await v.press("Create a key")
        await v.page.run("document.querySelector('dialog [name=name]').value = 'fresh'")
        await v.press("Create key")
        secret = await v.page.until("document.querySelector('dialog .secret code')?.innerText")
        await v.press("Done")
        await v.page.until(f"{TEXT}.includes('fresh')")
        assert secret not in await v.page.run("document.body.innerHTML")
        key = next(k for k in service.state.keys.list("aurora") if k.name == "fresh")
        assert key.scopes == ("model", "files", "usage")
        await v.open("receipts")
        await v.page.until("!!document.querySelector('.live.on')")
        before = await v.page.run("document.querySelectorAll('tbody tr').length")
        await asyncio.to_thread(
            service.client(secret).chat.completions.create, model="tide", messages=[{"role": "user", "content": "hi"}]
        )
        await v.page.until(f"document.querySelectorAll('tbody tr').length === {before + 1}")
        assert "fresh" in await v.page.run("document.querySelector('tbody tr').innerText")
        await v.open("keys")
        await v.page.run("document.querySelector('button[aria-label=\"Revoke fresh\"]').click()")
        await v.press("Revoke key")
        await v.page.until(f"!{TEXT}.includes('fresh')")
        assert service.state.keys.authenticate(secret) is None
        v.well(made.owner, secret)

    visiting(url, visit)


@needs_browser
def test_a_plan_is_previewed_and_changed_and_a_wrong_key_is_told_in_one_line(service, url):
    made = seed(service.state, days=2)

    async def visit(v: Visit) -> None:
        await v.sign_in("sk-wrong")
        assert "wrong or revoked" in await v.page.until("document.querySelector('.failed')?.innerText")
        assert await v.page.run("sessionStorage.length") == 0
        v.page.problems.clear()  # the browser logs the 401
        await v.sign_in(made.owner)
        await v.open("billing")
        await v.page.run("document.querySelector('button[aria-label=\"Change to studio\"]').click()")
        await v.page.until("document.querySelector('dialog')?.innerText.includes('Charged now')")
        cash = service.state.ledger.balances("aurora")["cash"]
        shown = await v.page.run("document.querySelector('dialog dl').innerText")
        await v.press("Change plan")
        await v.page.until(f"document.querySelector('.big')?.innerText === 'studio' && {TEXT}.includes('yours')")
        paid = cash - service.state.ledger.balances("aurora")["cash"]
        assert 0 < paid < 99 * 10**9 and dollars(paid)[:-1] in shown.replace("\n", "")
        # a failure is one line and a way to try again
        await v.page.replacing({"/v1/organization/limits": (503, {"error": {"message": "the books cannot be reached"}})})
        said = await v.open("limits")
        assert said.split("\n\n")[0] == "the books cannot be reached" and "Try again" in said
        await v.page.call("Fetch.disable")
        await v.press("Try again")
        await v.page.until(f"{TEXT}.includes('Tier 3')")
        v.page.problems.clear()  # the browser logs the 503
        # a chart can be read without seeing it
        await v.open("usage")
        await v.page.until("!!document.querySelector('svg.xy')")
        await v.page.run("document.querySelector('svg.xy').dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight'}))")
        spoken = await v.page.until("document.querySelector('[aria-live]').innerText")
        assert "tide $" in spoken
        await v.press("Table")
        assert await v.page.until("document.querySelectorAll('.numbers tbody tr').length") == 30
        assert spoken.partition("tide ")[2] in await v.page.run("document.querySelector('.numbers').innerText")
        # keys, tabs and screen readers: every control has a name, and Enter opens what has the focus
        await v.open("receipts")
        controls = "[...document.querySelectorAll('button, a, input, select')]"
        nameless = f"{controls}.filter(e => !(e.innerText || e.ariaLabel || e.labels?.length || e.querySelector('img')))"
        assert await v.page.run(f"{nameless}.length") == 0
        await v.page.run("document.querySelector('tbody a').focus()")
        await v.page.call(
            "Input.dispatchKeyEvent", type="keyDown", key="Enter", code="Enter", windowsVirtualKeyCode=13, text="\r"
        )
        await v.page.until(f"{TEXT}.includes('Ledger entries')")
        await v.press("Sign out")
        await v.page.until("!!document.querySelector('input[name=key]')")
        assert await v.page.run("sessionStorage.length") == 0
        v.well(made.owner)

    visiting(url, visit)


@needs_browser
def test_seats_of_a_year_are_counted_before_they_are_bought_and_a_suspended_organisation_is_told_why(service, url):
    made, state = seed(service.state, days=12), service.state
    state.plans.define(Plan("team", 120 * USD, 30 * USD, None, None, 40, months=12, least=2, most=8))
    state.payments.manual("aurora", 5000 * USD, "wire-3")
    cash = lambda: state.ledger.balances("aurora")["cash"]  # noqa: E731

    async def visit(v: Visit) -> None:
        async def dialog(count: int, words: str) -> str:
            await v.page.run(f"(i => {{ i.value = {count}; i.dispatchEvent(new Event('input')) }})(document.querySelector('dialog input'))")
            await v.page.until(f"document.querySelector('dialog dl')?.innerText.includes({words!r})")
            return (await v.page.run("document.querySelector('dialog').innerText")).replace("\n", " ")

        await v.sign_in(made.owner)
        said = await v.open("billing")
        assert "$120.00 a year" in said and "each of 2 to 8 seats" in said and "$19.00 a month" in said
        await v.page.run("document.querySelector('button[aria-label=\"Change to team\"]').click()")
        said = await dialog(3, "team, one year, 3 seats")
        assert "$360.00" in said and "$90.00" in said and "Unused part of starter" in said and "begins at once" in said
        before = cash()
        await v.press("Change plan")
        await v.page.until(f"document.querySelector('.big')?.innerText === 'team' && {TEXT}.includes('yours')")
        assert 340 * USD < before - cash() < 360 * USD
        sub = state.plans.subscription("aurora")
        assert (sub.plan, sub.quantity, sub.months) == ("team", 3, 12)
        said = (await v.page.run(TEXT)).replace("\n", " ")
        day = lambda at: f"{datetime.fromtimestamp(at, UTC):%-d %b %Y}"  # noqa: E731
        assert "$360.00 a year, 3 seats at $120.00" in said and f"Paid until {day(sub.ends)}" in said.replace("  ", " ")
        assert f"$90.00 on {day(sub.month_ends)}" in said and f"$360.00 on {day(sub.ends)}" in said and "renews" in said
        # more seats at once, fewer with the next term, and too many not at all
        await v.page.run("document.querySelector('button[aria-label=\"Change team\"]').click()")
        assert "Charged now $240.0" in await dialog(5, "5 seats")  # 600 less what is left of 360
        assert "next term" in await dialog(2, "2 seats")
        await v.page.run("(i => { i.value = 9; i.dispatchEvent(new Event('input')) })(document.querySelector('dialog input'))")
        before = cash()
        await v.press("Change plan")
        assert await v.page.run("!document.querySelector('dialog input').checkValidity() && !!document.querySelector('dialog')")
        await dialog(2, "2 seats")
        await v.press("Change plan")
        await v.page.until(f"{TEXT}.includes('becomes 2 seats')")
        said = (await v.page.run(TEXT)).replace("\n", " ")
        assert cash() == before and f"Then team, 2 seats $240.00 on {day(sub.ends)}" in said.replace("  ", " ")
        for width in (400, 1600):
            await v.page.size(width, 900, False)
            await v.fits()
        v.well(made.owner)
        suspension.suspend(state.ledger, "aurora", "invoice 7 is overdue")
        state.keys.forget()
        await v.page.run("location.hash = '#/keys'")
        await v.page.until("document.querySelector('.failed')?.innerText.includes('suspended: invoice 7 is overdue')")
        await v.sign_in(made.owner)
        assert "invoice 7" in await v.page.until("document.querySelector('main.gate .failed')?.innerText")

    visiting(url, visit)
