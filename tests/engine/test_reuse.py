"""What is cached is not run again, and nothing shows that it was cached."""

import os
import subprocess

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.agent_replay import run as replay
from benchmarks.schedules import END, VOCAB, make, run
from tests.engine.driving import Driver
from tidelock.engine.limits import Limits
from tidelock.engine.memory import Memory
from tidelock.models import ops, preset
from tidelock.tokens.policy import Constraint
from tidelock.tokens.errors import UserError

exact = pytest.mark.skipif(not ops.exact(), reason="bitwise only with the compiled kernels")
each_model = pytest.mark.parametrize("name", ["nano-k3", "nano-k2"])
MODELS = {name: make(name, 0) for name in ("nano-k3", "nano-k2")}

turn = st.tuples(st.integers(0, 9), st.integers(0, 40), st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12))


@exact
@each_model
@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(turns=st.lists(turn, min_size=2, max_size=10), tight=st.booleans(), tiers=st.booleans())
def test_a_tree_of_turns_is_answered_as_if_nothing_were_cached(name, turns, tight, tiers):
    """A turn continues some earlier one, from any of its tokens on: next turns, retries, branches within a page."""
    room = {"n_pages": 24, "n_slots": 4} if tight else {}
    cached = Driver(MODELS[name], host_bytes=10**7 if tiers else 0, **room)
    alone = Driver(MODELS[name], reuse=False)
    known = [[1, 2, 3, END, 4, 5]]
    for seed, (which, keep, new) in enumerate(turns):
        base = known[which % len(known)]
        prompt = [*base[: max(keep, 1) if keep < 30 else len(base)], *new][:120]
        a, b = cached.ask(prompt, seed=seed), alone.ask(prompt, seed=seed)
        assert a.answer == b.answer and b.cached == 0
        known.append([*prompt, *a.ids])


@each_model
def test_the_next_turn_runs_its_new_tokens_and_the_one_that_was_never_run(name):
    d = Driver(MODELS[name])
    ids = list(range(10, 30))
    for _ in range(4):
        before = d.stats.prefilled
        got = d.ask(ids)
        fresh = len(ids) - got.cached
        assert d.stats.prefilled - before == fresh
        assert fresh == (20 if got.cached == 0 else 6)  # five new ones and the answer's last token
        ids = [*ids, *got.ids, 1, 2, 3, 4, 5]


@each_model
@pytest.mark.parametrize(("chunk", "batch"), [(5, 64), (512, 64), (512, 1)])
def test_a_group_of_samples_prefills_its_prompt_once(name, chunk, batch):
    d, prompt = Driver(MODELS[name], step_tokens=chunk, max_batch=batch), list(range(30)) * 2
    group = [d.submit(prompt, seed=s) for s in range(8)]
    d.drain()
    assert d.stats.prefilled == len(prompt) + 7  # the others run the last token, to have something to sample from
    assert len({tuple(g.ids) for g in group}) > 1
    alone = Driver(MODELS[name], reuse=False)
    if ops.exact():
        assert [g.answer for g in group] == [alone.ask(prompt, seed=s).answer for s in range(8)]


def test_a_hybrid_keeps_a_state_where_a_second_child_appears():
    d, trunk = Driver("nano-k3"), list(range(1, 31))
    cached = [d.ask([*trunk, *branch]).cached for branch in ([20, 21], [22, 23], [24, 25])]
    assert cached == [0, 0, 30]  # the second finds the branch and keeps the state there, the third starts from it


@each_model
def test_what_is_said_to_one_held_request_alone_leaves_what_was_before_it_to_go_on_from(name):
    """The last message tells it what it is held to; the next request has all the others, and the answer."""
    d, talk, held, before = Driver(MODELS[name]), [1, 2, 3, END, *range(10, 30), END], Constraint("regex", "x"), 0
    for n in range(4):
        got = d.ask([*talk, 6, 7, END, 5], constraint=held)
        assert got.cached == before
        before, talk = len(talk), [*talk, 5, *got.ids, END, *range(8 + n, 30), END]


def test_a_pure_latent_cache_is_matched_at_any_token():
    d, trunk = Driver("nano-k2"), list(range(1, 31))
    cached = [d.ask([*trunk[:n], 30, 30]).cached for n in (30, 17, 23)]
    assert cached == [0, 17, 23]


def test_the_system_prompt_of_a_fresh_conversation_is_kept():
    d, system = Driver("nano-k3"), [1, 2, 3, END, *range(10, 20), END]
    cached = [d.ask([*system, user, 5, END, 7]).cached for user in (1, 2)]
    assert cached == [0, len(system)]


@pytest.mark.parametrize("tier", ["host", "disk"])
@each_model
def test_what_was_offloaded_comes_back(name, tier, tmp_path):
    tiers = {"host_bytes": 10**7} if tier == "host" else {"disk_bytes": 10**7, "disk_dir": str(tmp_path)}
    d, prompt = Driver(MODELS[name], **tiers), list(range(1, 31))
    first = d.ask(prompt)
    following = [*prompt, *first.ids, 1, 2]
    d.scheduler.eviction.make_room(d.scheduler.limits.n_pages, d.scheduler.limits.n_slots)
    assert d.scheduler.memory.pages.free == d.scheduler.limits.n_pages
    got = d.ask(following)
    assert got.cached == len(prompt) + 7 and d.stats.restored
    if ops.exact():
        assert got.answer == Driver(MODELS[name], reuse=False).ask(following).answer
    d.scheduler.close()
    assert not list(tmp_path.rglob("*.kv"))


@each_model
@pytest.mark.parametrize("harm", ["cut", "altered", "gone", "unwritable"])
def test_a_damaged_file_is_a_miss(name, harm, tmp_path):
    d, prompt = Driver(MODELS[name], disk_bytes=10**7, disk_dir=str(tmp_path)), list(range(1, 31))
    following = [*prompt, *d.ask(prompt).ids, 1, 2]
    if harm == "unwritable":  # as a full disk is
        next(tmp_path.glob("kv-*")).rename(tmp_path / "elsewhere")
    d.scheduler.eviction.make_room(d.scheduler.limits.n_pages, d.scheduler.limits.n_slots)
    for file in tmp_path.rglob("*.kv"):
        data = file.read_bytes()
        if harm == "gone":
            file.unlink()
        else:
            file.write_bytes(data[:-5] if harm == "cut" else data[:-1] + bytes([data[-1] ^ 1]))
    got = d.ask(following)
    assert got.cached == 0 and d.stats.restored == 0
    if ops.exact():
        assert got.answer == Driver(MODELS[name], reuse=False).ask(following).answer


def test_little_memory_forgets_what_is_cheap_to_run_again():
    """Of two states, that of the long conversation is kept, though the short one was used last."""
    d = Driver("nano-k3", n_slots=3)
    long, short = list(range(10, 31)) * 4, [7, 8]
    d.ask(long, max_tokens=1)
    d.ask(short, max_tokens=1)
    d.scheduler.eviction.make_room(slots=2)
    assert [len(n.ids) for n in d.scheduler.tree if n.slot is not None] == [84]
    assert d.ask([*long, 4]).cached == 84


def test_random_schedules_leave_no_trace():
    """`python -m benchmarks.schedules --n 10000` runs more of them."""
    total = run(16)
    assert total["cached"] and total["evicted"]


def test_a_tool_loop_prefills_what_is_new():
    """`python -m benchmarks.agent_replay` at full size."""
    for name in ("nano-k2", "nano-k3"):
        r = replay(name, conversations=8, turns=5, limits=Limits(n_pages=1024, n_slots=128))
        assert r.prefilled <= 1.05 * r.new and r.prefilled + r.cached == r.sent


def test_a_place_that_cannot_be_written_is_named_at_the_start_and_a_dead_process_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot offload to .*file"):
        Driver("nano-k2", disk_bytes=1, disk_dir=str(tmp_path / "file"))
    gone = subprocess.Popen(["true"])
    gone.wait()
    left, mine = tmp_path / f"kv-{gone.pid}-0", tmp_path / f"kv-{os.getpid()}-999"
    left.mkdir(), mine.mkdir()
    Driver("nano-k2", disk_bytes=1, disk_dir=str(tmp_path)).scheduler.close()
    assert not left.exists() and mine.exists()


@each_model
def test_what_the_last_tier_lost_is_forgotten(name):
    d = Driver(MODELS[name], n_pages=12, n_slots=4, host_bytes=60_000)
    for i in range(60):
        d.ask([10 + i % 20, 10 + i // 20, *range(1, 30), *range(1, 30)], max_tokens=1)
    assert d.stats.evicted > 50
    assert len(list(d.scheduler.tree)) < 30 and d.scheduler.store._host_bytes <= 60_000


def test_a_large_models_cache_is_sized_in_bytes():
    memory = Memory(preset("small-k3", VOCAB), Limits(cache_bytes=64 << 20))
    assert memory.pages.size * memory.page_bytes <= 32 << 20 and memory.slots.size * memory.slot_bytes <= 32 << 20
    assert memory.pages.size > 500 and memory.slots.size >= 4  # and not much smaller
