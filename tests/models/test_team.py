"""Threads that share a loop's tasks: each task is done once, whoever comes, and a loop ends after its last task."""

from __future__ import annotations

import ctypes
import os
import threading
from collections import Counter

import pytest
import torch

from tidelock.models.ops import build

LIBRARY = build.library()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="no C compiler")
Work = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_long)


def shared(tasks: int, work) -> None:
    LIBRARY.tl_share(ctypes.c_long(tasks), Work(work), None)


@pytest.fixture(params=[1, 2, 5])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_every_task_is_done_once_and_before_the_loop_ends(threads):
    for tasks in (0, 1, 2, 3, 7, 40) * 40:
        done = []
        shared(tasks, lambda _, t: done.append((t, threading.get_ident())))
        assert Counter(t for t, _ in done) == Counter(range(tasks))
        assert len({thread for _, thread in done}) <= threads


def test_callers_at_the_same_time_each_get_their_own_tasks_done(threads):
    failures = []

    def call(name):
        torch.set_num_threads(threads)
        for n in range(150):
            done = []
            shared(n % 9, lambda _, t: done.append((name, t)))
            if sorted(done) != [(name, t) for t in range(n % 9)]:
                failures.append((name, n, done))

    callers = [threading.Thread(target=call, args=(name,)) for name in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not failures


def test_a_child_process_starts_helpers_of_its_own():
    shared(8, lambda _, t: None)
    child = os.fork()
    if child == 0:
        try:
            done = []
            for _ in range(20):
                shared(8, lambda _, t: done.append(t))
            os._exit(0 if sorted(done) == sorted(list(range(8)) * 20) else 1)
        finally:
            os._exit(2)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
