"""`within` is `asyncio.timeout`, in whatever order deadline and cancellation come."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidelock.service.deadline import within


class Imagined(asyncio.SelectorEventLoop):
    """Its time goes on when there is nothing else to do, so that what happens when does not depend on the machine."""

    now = 0.0

    def time(self):
        return self.now

    def _run_once(self):
        if not self._ready and self._scheduled:
            self.now = max(self.now, self._scheduled[0]._when)
        super()._run_once()


def run(coroutine):
    with asyncio.Runner(loop_factory=Imagined) as runner:
        return runner.run(coroutine)


class Theirs:
    def __init__(self, seconds):
        self._timeout = asyncio.timeout(seconds)

    async def __aenter__(self):
        return await self._timeout.__aenter__()

    async def __aexit__(self, *how):
        return await self._timeout.__aexit__(*how)


class Ours:
    def __init__(self, seconds):
        self._within = within(seconds)

    async def __aenter__(self):
        self._within.__enter__()

    async def __aexit__(self, *how):
        return self._within.__exit__(*how)


def outcome(kind, outer_s, inner_s, work_s, cancel_s, fails):
    async def work():
        async with kind(outer_s):
            try:
                async with kind(inner_s):
                    await asyncio.sleep(work_s)
                    if fails:
                        raise KeyError
            except TimeoutError:
                return "inner"
        return "done"

    async def main():
        task = asyncio.create_task(work())
        if cancel_s is not None:
            asyncio.get_running_loop().call_later(cancel_s, task.cancel)
        try:
            return await task, task.cancelling()
        except BaseException as error:
            return type(error).__name__, task.cancelling()

    return run(main())


at = st.sampled_from([0.0, 1.0, 2.0, 3.0])


@given(at, at, at, st.none() | at, st.booleans())
def test_it_ends_as_the_library_s_does(outer_s, inner_s, work_s, cancel_s, fails):
    times = [t for t in (outer_s, inner_s, work_s, cancel_s) if t is not None]
    if len(set(times)) < len(times):  # what comes at the same time comes in no order
        return
    assert outcome(Ours, outer_s, inner_s, work_s, cancel_s, fails) == outcome(Theirs, outer_s, inner_s, work_s, cancel_s, fails)


def test_late_is_a_timeout_error():
    async def main():
        with within(1):
            await asyncio.sleep(10)

    with pytest.raises(TimeoutError):
        run(main())
