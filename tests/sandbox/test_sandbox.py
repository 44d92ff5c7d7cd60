"""The sandbox: what is confined stays confined, and what breaks in it breaks alone."""

import asyncio
import os
import subprocess
import sys
import time

import pytest

from tidelock.sandbox import ToolCrash, ToolHost, probe, run_confined
from tidelock.sandbox.level import import_path
from tidelock.sandbox.toolset import SandboxError

HOSTILE = "tests.sandbox.hostile:TOOLSET"
confined = pytest.mark.skipif(probe() == "none", reason="this machine cannot confine a process")


def with_host(work, **options):
    async def inside():
        host = await ToolHost.start(HOSTILE, **options)
        try:
            await host.open("s", {})
            return await work(host)
        finally:
            await host.stop()

    return asyncio.run(asyncio.wait_for(inside(), 60))


def attempt(name, **arguments):
    return with_host(lambda host: host.call("s", "attempt", {"name": name, **arguments})).content


@confined
def test_writing_works_in_the_workspace_and_nowhere_else(tmp_path):
    inside, outside = tmp_path / "work", tmp_path / "outside"
    inside.mkdir()
    assert with_host(lambda h: h.call("s", "attempt", {"name": "write", "path": str(inside / "a")}), workspace=str(inside)).ok
    assert (inside / "a").read_text() == "x"
    assert attempt("write", path=str(outside)) == "denied: 13" and not outside.exists()


@confined
@pytest.mark.parametrize("kind", ["AF_INET", "AF_INET6", "AF_UNIX"])
def test_no_socket_opens(kind):
    if "seccomp" not in probe():
        pytest.skip("no seccomp on this machine")
    assert attempt("listen", kind=kind) == "denied: 1"


def test_the_reported_level_is_the_one_that_was_tried():
    assert with_host(lambda host: _value(host.level)) == probe()


async def _value(x):
    return x


def test_a_level_that_cannot_be_had_is_a_refusal():
    with pytest.raises(SandboxError, match="required"):
        with_host(lambda host: _value(None), require_level="fortress")


def test_sessions_share_nothing_and_end_with_their_world():
    async def work(host):
        await host.open("a", {})
        await host.open("b", {"value": 1})
        await host.call("a", "remember", {"value": "mine"})
        recalled = (await host.call("b", "recall", {})).content
        return recalled, await host.close("a"), await host.close("b")

    assert with_host(work) == ("1", {"value": "mine"}, {"value": 1})


def test_a_wrong_call_is_told_and_a_print_is_harmless():
    async def work(host):
        return await host.call("s", "nonsense", {}), await host.call("s", "shout", {})

    wrong, quiet = with_host(work)
    assert (wrong.ok, wrong.content) == (False, "error: no such tool") and quiet.content == "quiet"


@pytest.mark.parametrize("name,arguments", [("die", {}), ("sleep", {"seconds": 60}), ("write", {"path": None})])
def test_a_dead_stuck_or_broken_worker_is_a_crash_and_the_next_session_works(name, arguments):
    async def work(host):
        with pytest.raises(ToolCrash):
            await host.call("s", name, arguments)
        with pytest.raises(ToolCrash):
            await host.call("s", "recall", {})
        assert await host.close("s") == {}
        await asyncio.sleep(0.1)
        await host.open("t", {"value": 5})
        return (await host.call("t", "recall", {})).content

    assert with_host(work, timeout_s=1.0) == "5"


def test_the_worker_dies_with_its_parent():
    code = (
        "import asyncio, os\nfrom tidelock.sandbox import ToolHost\n"
        "async def main():\n"
        f"    host = await ToolHost.start({HOSTILE!r})\n"
        "    print(host._process.pid, flush=True)\n    os._exit(9)\n"
        "asyncio.run(main())"
    )
    done = subprocess.run([sys.executable, "-c", code], env=dict(os.environ, PYTHONPATH=import_path()), capture_output=True)
    pid = int(done.stdout)
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and _alive(pid):
        time.sleep(0.05)
    assert not _alive(pid)


def _alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().split(") ")[1][0] != "Z"
    except OSError:
        return False


@confined
def test_commands_write_in_their_workspace_only(tmp_path):
    inside, outside = tmp_path / "w", tmp_path / "no"
    inside.mkdir()
    done = run_confined(["sh", "-c", f"echo hi > a; cat a; echo x > {outside}"], str(inside))
    assert done.output.startswith("hi\n") and done.code != 0 and not outside.exists()


@confined
def test_a_command_that_hangs_is_killed_with_its_children(tmp_path):
    begun = time.monotonic()
    done = run_confined(["sh", "-c", "sleep 60 & sleep 60"], str(tmp_path), timeout_s=1)
    assert done.timed_out and time.monotonic() - begun < 10
