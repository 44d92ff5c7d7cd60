"""A pool over real HTTP upstreams that misbehave: who answers, what is retried, what never is, and that nothing leaks."""

import asyncio
import random
from contextlib import asynccontextmanager

import pytest
from faulty import EARLY, LATE, TEMPLATE, Faulty, upstreams
from hypothesis import given, settings
from hypothesis import strategies as st

from tidelock.remote import Patience, TextPolicy, TokenPolicy
from tidelock.service.record import Record, recording
from tidelock.service.upstreams import Pool, Upstream
from tidelock.service.upstreams.circuit import TRIP
from tidelock.service.upstreams.pool import Options
from tidelock.service.upstreams.probes import look
from tidelock.tokens.directives import response_format
from tidelock.tokens.message import Message
from tidelock.tokens.policy import Constraint, PolicyError, Prompt, SamplingParams, Source

PATIENCE = Patience(connect_s=0.5, first_s=1.0, idle_s=1.0)


def prompt(text="hi", turns=()):
    return TEMPLATE.render([Message("user", text), *turns], generation_prompt=True)


def upstream(server, name, kind="tokens", **options):
    if kind == "tokens":
        policy = TokenPolicy(server.url, "k", None, patience=PATIENCE, await_versions=False)
    else:
        policy = TextPolicy(server.url + "/v1", "k", "m", TEMPLATE, patience=PATIENCE, metered=True)
    return Upstream(name, policy, kind, probe="/health" if kind == "tokens" else "/models", **options)


@asynccontextmanager
async def pool_of(*servers, kind="tokens", options=None, run=False, **each):
    async with upstreams(*servers):
        options = options or Options(choice="round-robin", wait_s=5.0, probe_s=0.05)
        listed = [upstream(s, "abcdef"[n], kind, **each) for n, s in enumerate(servers)]
        pool = Pool(listed, options, TEMPLATE.generation_prompt())
        life = asyncio.create_task(pool.run()) if run else None
        try:
            yield pool
        finally:
            if life is not None:
                life.cancel()
                await asyncio.gather(life, return_exceptions=True)


async def ask(pool, name="r", text="hi", **params):
    """(the chunks handed on, the error that ended them or None)."""
    chunks = []
    try:
        async for chunk in pool.generate(prompt(text), SamplingParams(**{"max_tokens": 500, **params}), name):
            chunks.append(chunk)
    except PolicyError as error:
        return chunks, error
    return chunks, None


def ids(chunks):
    return [i for c in chunks for i in c.ids]


def run(work, within_s=30):
    return asyncio.run(asyncio.wait_for(work, within_s))


def quiet(pool):
    """Nothing is left behind of any request."""
    return all(u.in_flight == 0 for u in pool.upstreams) and not pool._jobs and not pool.waiting


# a text endpoint cannot end an answer with an abort
CASES = [(f, k) for f in EARLY for k in ("tokens", "chat") if (f, k) != ("abort at once", "chat")]


@pytest.mark.parametrize("fault,kind", CASES)
def test_what_fails_before_its_first_token_is_asked_of_another(fault, kind):
    async def work():
        bad, good = Faulty(fault=lambda n, body: fault), Faulty()
        async with pool_of(bad, good, kind=kind) as pool:
            answers = [await ask(pool, f"r{n}") for n in range(4)]
            assert all(error is None and chunks[-1].finish_reason == "stop" for chunks, error in answers)
            assert {c.source.name for chunks, _ in answers for c in chunks} == {"b"}
            assert len(good.sent) == 4 and all(s.ended for s in good.sent) and not any(s.ids or s.text for s in bad.sent)
            a = pool.upstreams[0]
            assert a.tally.retried == sum(a.tally.failures.values()) == len(bad.sent) >= 1 and quiet(pool)

    run(work())


@pytest.mark.parametrize("kind", ["tokens", "chat"])
@pytest.mark.parametrize("fault", LATE)
def test_what_fails_after_a_token_was_handed_on_is_an_error_and_sampled_once(fault, kind):
    async def work():
        servers = [Faulty(fault=lambda n, body: fault) for _ in range(2)]
        async with pool_of(*servers, kind=kind) as pool:
            chunks, error = await ask(pool)
            assert error is not None and error.status in (502, 504) and not any(c.finish_reason for c in chunks)
            (sent,) = [s for server in servers for s in server.sent]  # one upstream was asked, once
            if kind == "tokens":
                assert ids(chunks) == sent.ids and len(sent.ids) == 40
            else:
                parser = TEMPLATE.parser()
                parser.feed(ids(chunks))
                assert parser.finish().content == sent.text and len(sent.text) == 40
            words = str(error)
            assert "127.0.0.1" not in words and "secret" not in words and quiet(pool)

    run(work())


def test_a_mistake_of_the_request_is_told_and_neither_retried_nor_held_against_the_upstream():
    async def work():
        servers = [Faulty(fault=lambda n, body: "yours") for _ in range(2)]
        async with pool_of(*servers) as pool:
            for n in range(8):
                chunks, error = await ask(pool)
                assert error.status == 400 and "secret words" in str(error) and not chunks  # about its own mistake
            assert sum(len(s.sent) for s in servers) == 8
            assert all(u.circuit.state == "closed" and not u.tally.failures for u in pool.upstreams)
            for server in servers:
                server.fault = lambda n, body: "yours, in HTML"
            _, error = await ask(pool)  # no API's words: whose they are nobody knows
            assert error.status == 400 and "secret" not in str(error) and "127.0.0.1" not in str(error)

    run(work())


def test_when_all_fail_the_client_hears_of_it_after_so_many_tries_and_the_circuits_open():
    async def work():
        servers = [Faulty(fault=lambda n, body: "500") for _ in range(4)]
        async with pool_of(*servers, options=Options(choice="round-robin", retries=2, wait_s=1)) as pool:
            _, error = await ask(pool)
            assert error.status == 502 and sum(len(s.sent) for s in servers) == 3  # one and two more
            for _ in range(7):
                await ask(pool)
            assert all(u.circuit.state == "open" for u in pool.upstreams) and pool.health()["status"] == "down"
            before = sum(len(s.sent) for s in servers)
            _, error = await ask(pool)
            assert error.status == 503 and before == sum(len(s.sent) for s in servers) == 4 * TRIP and pool.refused["down"]
            assert quiet(pool)

    run(work())


@pytest.mark.parametrize("fault", ["full", "refuse"])
def test_an_upstream_that_asks_for_a_pause_gets_it(fault):
    async def work():
        server = Faulty(fault=lambda n, body: fault if n == 0 else "", retry_after="0.3")
        async with pool_of(server) as pool:
            chunks, error = await ask(pool)
            first, second = server.sent
            assert error is None and chunks[-1].finish_reason == "stop" and second.at - first.at >= 0.29
            server.fault, server.retry_after = (lambda n, body: fault), "3600"
            _, error = await ask(pool)
            assert error.status in (429, 503) and len(server.sent) == 3  # nobody waits for an hour
            _, error = await ask(pool)
            assert error.status == 429 and len(server.sent) == 3 and pool.upstreams[0].circuit.state == "closed"

    run(work())


def test_one_that_dies_is_left_out_and_taken_back_when_it_lives():
    async def work():
        mortal, other = Faulty(), Faulty()
        async with pool_of(mortal, other, run=True) as pool:
            a = pool.upstreams[0]
            assert all([(await ask(pool))[1] is None for _ in range(4)]) and len(mortal.sent) == 2
            await mortal.stop()
            answers = await asyncio.gather(*(ask(pool, f"d{n}") for n in range(30)))
            assert all(error is None for _, error in answers)
            await until(lambda: a.circuit.state == "open")
            asked = len(other.sent)
            assert (await ask(pool))[1] is None and len(other.sent) == asked + 1
            await mortal.start()
            await until(lambda: a.circuit.state == "half-open")
            before = len(mortal.sent)
            answers = [await ask(pool) for _ in range(4)]
            assert all(error is None for _, error in answers)
            assert a.circuit.state == "closed" and len(mortal.sent) > before and a.version == 7

    run(work())


async def until(condition):
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not come to that within 10 s")


def test_a_look_finds_out_before_a_request_does():
    async def work():
        server = Faulty(healthy=False)
        async with pool_of(server, run=True) as pool:
            await until(lambda: pool.upstreams[0].circuit.state == "open")
            assert not server.sent and pool.upstreams[0].tally.failures["probe"] >= 3
            server.healthy = True
            await until(lambda: pool.upstreams[0].circuit.state == "half-open")
            assert (await ask(pool))[1] is None and pool.upstreams[0].circuit.state == "closed"

    run(work())


def test_a_full_line_answers_at_once_and_who_waits_least_gets_in():
    async def work():
        server = Faulty(gate=asyncio.Event())
        options = Options(choice="least-loaded", max_waiting=3, wait_s=10)
        async with pool_of(server, options=options, max_in_flight=2) as pool:
            greedy = [asyncio.create_task(ask(pool, f"g{n}", tenant="greedy")) for n in range(8)]
            await until(lambda: server.running == 2 and pool.waiting == 3)
            done, _ = await asyncio.wait(greedy, timeout=1, return_when=asyncio.FIRST_COMPLETED)
            refused = [task.result()[1] for task in done]
            assert len(refused) == 3 and {(e.status, e.kind) for e in refused} == {(429, "engine_overloaded_error")}
            modest = asyncio.create_task(ask(pool, "m", tenant="modest"))
            await until(lambda: sum(task.done() for task in greedy) == 4)  # it took a place of the greedy one's
            assert pool.waiting == 3 and not modest.done()
            server.gate.set()
            assert (await modest)[1] is None
            results = [await task for task in greedy]
            assert sum(error is None for _, error in results) == 4 and server.most == 2 and quiet(pool)

    run(work())


def test_who_waits_too_long_is_told():
    async def work():
        server = Faulty(gate=asyncio.Event())
        async with pool_of(server, options=Options(wait_s=0.1), max_in_flight=1) as pool:
            first = asyncio.create_task(ask(pool, "1"))
            await until(lambda: server.running == 1)
            _, error = await ask(pool, "2")
            assert error.status == 429 and pool.refused["late"] == 1 and pool.waiting == 0
            server.gate.set()
            assert (await first)[1] is None and quiet(pool)

    run(work())


def test_tenants_take_turns_whatever_they_send():
    async def work():
        server = Faulty(pause_s=0.001)
        async with pool_of(server, options=Options(choice="least-loaded", wait_s=20), max_in_flight=1) as pool:
            order = []

            async def one(tenant, n):
                assert (await ask(pool, f"{tenant}{n}", tenant=tenant))[1] is None
                order.append(tenant)

            greedy = [asyncio.create_task(one("greedy", n)) for n in range(30)]
            await until(lambda: len(order) == 3)
            modest = [asyncio.create_task(one("modest", n)) for n in range(5)]
            await asyncio.gather(*modest)
            assert order[3:].count("greedy") <= 7  # five turns, and what ran when they came
            await asyncio.gather(*greedy)

    run(work())


@pytest.mark.parametrize("kind", ["tokens", "chat"])
def test_an_abort_reaches_the_upstream_that_answers_and_the_line(kind):
    async def work():
        servers = [Faulty(gate=asyncio.Event()) for _ in range(2)]
        async with pool_of(*servers, kind=kind, max_in_flight=1) as pool:
            running = [asyncio.create_task(ask(pool, f"r{n}")) for n in range(2)]
            await until(lambda: all(s.running for s in servers))
            waiting = asyncio.create_task(ask(pool, "w"))
            await until(lambda: pool.waiting == 1)
            await pool.abort("w")
            chunks, error = await waiting
            assert error is None and [(c.ids, c.finish_reason) for c in chunks] == [((), "abort")]
            await until(lambda: all(u.tally.generated_tokens for u in pool.upstreams))
            await pool.abort("r0")
            chunks, error = await running[0]
            assert error is None and chunks[-1].finish_reason == "abort" and ids(chunks)
            name = chunks[0].source.name
            if kind == "tokens":
                assert servers["ab".index(name)].aborted == ["generate-tokens-r0"]
            for server in servers:
                server.gate.set()
            chunks, error = await running[1]
            assert error is None and chunks[-1].finish_reason == "stop" and chunks[0].source.name != name
            await pool.abort("never heard of it")
            assert quiet(pool) and all(u.circuit.state == "closed" for u in pool.upstreams)

    run(work())


def test_an_answer_longer_than_asked_is_cut_there():
    async def work():
        server = Faulty(words=lambda n: 100)
        async with pool_of(server) as pool:
            policy = pool.upstreams[0].policy
            original = policy.generate
            more = SamplingParams(max_tokens=400)
            policy.generate = lambda p, params, name: original(p, more, name)  # it ignores the limit
            chunks, error = await ask(pool, max_tokens=25)
            assert error is None and len(ids(chunks)) == 25 and chunks[-1].finish_reason == "length"

    run(work())


def test_a_format_goes_to_who_can_hold_to_it_or_is_refused():
    async def work():
        async with upstreams(Faulty(), Faulty()) as (text, exact):
            mixed = Pool([upstream(text, "t", "chat"), upstream(exact, "e")], Options(choice="least-loaded"))
            held = {"constraint": Constraint("regex", "a")}
            asked = [*(ask(mixed, f"r{n}", **held) for n in range(4)), *(ask(mixed, f"f{n}") for n in range(4))]
            answers = await asyncio.gather(*asked)
            assert all(error is None for _, error in answers) and not mixed.exact
            assert {c.source.name for chunks, _ in answers[:4] for c in chunks} == {"e"}
            for chunks, _ in answers:
                assert {(c.source.exact, c.weights_version) for c in chunks} <= {(True, 7), (False, -1)}
            assert {c.source.exact for chunks, _ in answers for c in chunks} == {True, False}
            only_text = Pool([upstream(text, "t", "chat")])
            _, error = await ask(only_text, **held)
            assert error.status == 400
            said = (Message("user", "q"), response_format())
            prompt = Prompt.of(TEMPLATE.render(said), said, TEMPLATE.generation_prompt())
            for pool, name in ((mixed, "e"), (only_text, "t")):  # whoever speaks text is asked if it must be
                chunks = [c async for c in pool.generate(prompt, SamplingParams(max_tokens=25, **held))]
                assert {c.source.name for c in chunks} == {name}

    run(work())


def test_weights_go_to_all_or_to_none():
    async def work():
        a, b = Faulty(), Faulty()
        async with pool_of(a, b) as pool:
            await pool.swap("first", 8)
            assert a.swaps == b.swaps == [("first", 8)] and pool.version == 8
            b.refuses_swaps = True
            with pytest.raises(PolicyError, match="no such checkpoint") as e:
                await pool.swap("second", 9)
            assert e.value.status == 400 and a.swaps[-1] == ("first", 8)
            assert (a.version, b.version, pool.version) == (8, 8, 8)
            assert not any(u.held_back for u in pool.upstreams)
            pool._swapped = None  # a pool that never swapped knows nothing to go back to
            with pytest.raises(PolicyError, match="a held back"):
                await pool.swap("third", 10)
            answers = [await ask(pool) for _ in range(3)]
            assert {(c.source.name, c.weights_version) for chunks, _ in answers for c in chunks} == {("b", 8)}
            b.refuses_swaps = False
            await pool.swap("third", 10)
            answers = [await ask(pool) for _ in range(4)]
            assert {(c.source.name, c.weights_version) for chunks, _ in answers for c in chunks} == {("a", 10), ("b", 10)}
            fixed = Pool([pool.upstreams[0], upstream(b, "t", "chat")])
            with pytest.raises(PolicyError, match="not ours") as e:
                await fixed.swap("fourth", 11)
            assert e.value.status == 400 and a.swaps[-1] == ("third", 10)

    run(work())


def test_a_conversation_stays_where_its_prefix_is_and_a_hot_one_spreads():
    async def work():
        servers = [Faulty(pause_s=0.002) for _ in range(3)]
        options = Options(choice="affinity", spread=1.5, wait_s=20)
        async with pool_of(*servers, options=options) as pool:
            for talk in range(12):
                turns, places = (), set()
                for turn in range(3):
                    ids_ = prompt(f"talk {talk}", turns)
                    chunks = [c async for c in pool.generate(ids_, SamplingParams(max_tokens=500), f"{talk}/{turn}")]
                    places |= {c.source.name for c in chunks}
                    turns = (*turns, Message("assistant", "ok"), Message("user", f"more {turn}"))
                assert len(places) == 1
            assert all(s.sent for s in servers) and sum(u.tally.affinity["hit"] for u in pool.upstreams) == 36
            peak = [0]

            async def watch():
                while True:
                    peak[0] = max(peak[0], *(u.in_flight for u in pool.upstreams))
                    await asyncio.sleep(0)

            watching = asyncio.create_task(watch())
            answers = await asyncio.gather(*(ask(pool, f"h{n}", text="everybody says this") for n in range(60)))
            watching.cancel()
            assert all(error is None for _, error in answers)
            assert peak[0] <= 30 and all(u.tally.affinity["spilled"] + u.tally.affinity["hit"] for u in pool.upstreams)

    run(work())


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(["tokens", "chat"]))
def test_whatever_happens_nothing_is_sampled_twice_and_nothing_leaks(seed, kind):
    """Random faults, clients that leave, aborts, a server that dies and comes back."""

    async def work():
        rng = random.Random(seed)
        late = [f for f in LATE if f != "stall"]

        def fault(n, body):
            return rng.choices(["", rng.choice(EARLY[:8]), rng.choice(late)], [6, 3, 2])[0]

        servers = [Faulty(fault, words=lambda n: rng.randint(1, 20), pause_s=0.001) for _ in range(3)]
        options = Options(rng.choice(["affinity", "round-robin", "least-loaded"]), max_waiting=20, wait_s=2, probe_s=0.05)
        async with pool_of(*servers, kind=kind, options=options, run=True, max_in_flight=4) as pool:
            got = {}

            async def client(n):
                chunks = got[n] = []
                how, after = rng.choices(["stay", "leave", "abort"], [6, 2, 2])[0], rng.randint(0, 4)
                params = SamplingParams(max_tokens=500, tenant=f"t{n % 3}", priority=rng.randint(-1, 1), seed=n)
                await asyncio.sleep(rng.random() * 0.05)
                stream = pool.generate(prompt(f"talk {n % 7}"), params, f"r{n}")
                try:
                    async for chunk in stream:
                        chunks.append(chunk)
                        if len(chunks) > after and how == "leave":
                            break
                        if len(chunks) > after and how == "abort":
                            await pool.abort(f"r{n}")
                except PolicyError:
                    pass
                finally:
                    await stream.aclose()

            clients = [asyncio.create_task(client(n)) for n in range(40)]
            await asyncio.sleep(0.02)
            await servers[0].stop()
            for task in rng.sample(clients, 5):
                task.cancel()
            await asyncio.sleep(0.05)
            await servers[0].start()
            await asyncio.gather(*clients, return_exceptions=True)
            assert quiet(pool) and all(u.in_flight == 0 for u in pool.upstreams)
            handed_on = {n: len(ids(chunks)) for n, chunks in got.items()}
            assert sum(handed_on.values()) == sum(u.tally.generated_tokens for u in pool.upstreams)
            for n, chunks in got.items():
                assert len({c.source.name for c in chunks if c.source}) <= 1
                asked = [s for server in servers for s in server.sent]
                own = [s for s in asked if (s.name == f"r{n}" if kind == "tokens" else s.body["seed"] == n)]
                sent = sorted(own, key=lambda s: s.at)
                assert len(sent) <= 1 + options.retries
                if ids(chunks):  # whoever said it was the last to be asked
                    assert sent[-1].ids[: handed_on[n]] == ids(chunks) if kind == "tokens" else sent[-1].text

    run(work())


def test_what_vllm_samples_under_a_constraint_is_not_called_exact():
    """Its log-probabilities are then those among what the constraint leaves, and it does not say what that is."""
    async def work():
        async with upstreams(Faulty()) as (server,):
            policy = TokenPolicy(server.url, "k", None, patience=PATIENCE, await_versions=False, dialect="vllm")
            pool = Pool([Upstream("a", policy)], Options(), TEMPLATE.generation_prompt())
            free, _ = await ask(pool)
            held, _ = await ask(pool, constraint=Constraint("regex", "a"))
            assert [{c.source for c in chunks} for chunks in (free, held)] == [{Source("a", True)}, {Source("a", False)}]
            assert ids(free) == ids(held)
            await pool.aclose()

    run(work())


@pytest.mark.parametrize("dialect", ["tidelock", "vllm"])
@pytest.mark.parametrize("is_vllm", [False, True])
def test_a_dialect_that_is_not_the_server_s_is_said_once(caplog, dialect, is_vllm):
    async def work():
        async with upstreams(Faulty(is_vllm=is_vllm)) as (server,):
            policy = TokenPolicy(server.url, "k", None, patience=PATIENCE, dialect=dialect)
            upstream = Upstream("a", policy)
            assert await look(upstream) and await look(upstream)

    run(work())
    said = [r.getMessage() for r in caplog.records if "dialect" in r.getMessage()]
    right = "vllm" if is_vllm else "tidelock"
    assert len(said) == (dialect != right) and all(f'"{right}"' in line for line in said)


def test_how_long_a_request_was_in_the_pool_s_own_line_is_in_its_record():
    async def work():
        server = Faulty(pause_s=0.02)
        async with pool_of(server, max_in_flight=1) as pool:
            records = [Record(f"r{n}") for n in range(2)]

            async def one(record):
                with recording(record):
                    assert (await ask(pool, record.request_id))[1] is None

            began = asyncio.get_running_loop().time()
            await asyncio.gather(*map(one, records))
            took_s = asyncio.get_running_loop().time() - began
            assert "line" not in records[0].seconds and 0.25 * took_s < records[1].seconds["line"] < took_s

    run(work())
