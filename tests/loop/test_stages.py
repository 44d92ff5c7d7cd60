"""Stages run once, survive being killed, and belong to one run at a time."""

import pytest

from tidelock.loop.console import Console
from tidelock.loop.stages import Stages
from tidelock.tokens.errors import UserError


def test_a_finished_stage_is_not_repeated_and_a_failed_one_is(tmp_path):
    calls = []
    stages = Stages(tmp_path, {"seed": 1})
    with pytest.raises(ZeroDivisionError):
        stages.run("a", lambda: calls.append("a") or 1 / 0)
    assert not stages.done("a")
    assert stages.run("a", lambda: calls.append("a") or {"x": 1})["x"] == 1
    stages.close()
    again = Stages(tmp_path, {"seed": 1})
    assert again.run("a", lambda: calls.append("never"))["x"] == 1
    assert calls == ["a", "a"]


def test_other_settings_in_the_same_directory_are_refused_by_name(tmp_path):
    Stages(tmp_path, {"seed": 1}).close()
    with pytest.raises(UserError, match="seed was 1, now 2"):
        Stages(tmp_path, {"seed": 2})


def test_two_runs_cannot_share_a_directory(tmp_path):
    first = Stages(tmp_path, {})
    with pytest.raises(UserError, match="another run"):
        Stages(tmp_path, {})
    first.close()
    Stages(tmp_path, {}).close()


def test_the_time_left_follows_the_shares_at_the_measured_pace():
    console = Console(quiet=True, shares={"a": 1, "b": 2, "c": 3})
    assert console.left_s() == 0  # nothing measured yet: nothing is claimed
    console.finished("a", 10.0, skipped=False)
    assert console.left_s() == 50
    console.finished("b", 40.0, skipped=True)
    assert console.left_s() == 50
    console.finished("c", 1.0, skipped=False)
    assert console.left_s() == 0
