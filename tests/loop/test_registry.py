"""Releases: versions only grow, nothing is edited, and only checkpoints can be released."""

import pytest

from tidelock.loop.registry import Registry
from tidelock.models import TransformerLM, preset, save_checkpoint
from tidelock.tokens.errors import UserError


@pytest.fixture
def registry(tmp_path):
    for name in ("a", "b"):
        save_checkpoint(tmp_path / "checkpoints" / name, TransformerLM(preset("nano-k3", 64)))
    return Registry(tmp_path)


def test_versions_grow_and_rollback_serves_the_earlier_weights_under_a_new_version(registry, tmp_path):
    registry.release(tmp_path / "checkpoints" / "a")
    registry.release(tmp_path / "checkpoints" / "b")
    back = registry.rollback()
    assert [r.version for r in registry.list()] == [1, 2, 3]
    assert back.checkpoint == "checkpoints/a" and back.reason == "rollback" and registry.current() == back
    assert registry.checkpoint(2) == tmp_path / "checkpoints" / "b"


def test_nothing_to_serve_and_nothing_to_go_back_to_are_said_plainly(registry, tmp_path):
    with pytest.raises(UserError, match="nothing released"):
        registry.current()
    registry.release(tmp_path / "checkpoints" / "a")
    with pytest.raises(UserError, match="no earlier release"):
        registry.rollback()
    with pytest.raises(UserError, match="version 7"):
        registry.checkpoint(7)


def test_what_is_not_a_checkpoint_is_not_released(registry, tmp_path):
    with pytest.raises(UserError, match="config.json"):
        registry.release(tmp_path)
    assert registry.list() == []
