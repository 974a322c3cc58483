"""A guarded store is changed only while its guard allows it; reading goes on."""

from pathlib import Path

import pytest
import torch

from disttrain.checkpoint import AsynchronousSaver, DirectorySaver, load_newest
from disttrain.checkpoint.guarded_store import guarded
from disttrain.checkpoint.local_store import LocalStore
from disttrain.errors import ConfigError

STATE = {"model": {"weight": torch.ones(2)}}


class Guard:
    """Allows `allowed` changes, and then none."""

    def __init__(self, allowed: int) -> None:
        self.allowed = allowed

    def __call__(self) -> None:
        self.allowed -= 1
        if self.allowed < 0:
            raise ConfigError("not yours any more")


def test_what_the_guard_allows_is_done(tmp_path: Path) -> None:
    saver = DirectorySaver(tmp_path, guard=Guard(100))
    saver(STATE, "step-00000001", {})
    saver(STATE, "step-00000002", {})
    saver.remove("step-00000001")
    assert [name for _, name in saver.saved()] == ["step-00000002"]
    assert str(saver.store) == str(tmp_path)


@pytest.mark.parametrize("allowed", [0, 1, 2])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_save_ends_at_any_change_that_is_forbidden(tmp_path: Path, allowed: int, asynchronous: bool) -> None:
    kind = AsynchronousSaver if asynchronous else DirectorySaver
    saver = kind(tmp_path / "checkpoints", guard=Guard(allowed))  # asked to clean, to begin and to commit

    def save() -> None:
        saver(STATE, "step-00000001", {})
        saver.settle()

    with pytest.raises(ConfigError, match="not yours any more"):
        save()
    assert saver.saved() == []
    assert allowed > 1 or not (tmp_path / "checkpoints").exists()  # so a removed folder is not made again
    assert LocalStore(tmp_path / "checkpoints").leftovers() == []


def test_a_part_that_cannot_be_written_raises_what_the_guard_says(tmp_path: Path) -> None:
    store = guarded(LocalStore(tmp_path / "gone"), Guard(0))
    with pytest.raises(ConfigError, match="not yours any more"):
        store.write_part(".tmp-00000001-0a1b2c3d", "tensors.safetensors", {})


def test_reading_is_not_guarded_and_nothing_is_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    DirectorySaver(tmp_path)(STATE, "step-00000001", {})
    store = guarded(LocalStore(tmp_path), Guard(0))
    assert store.committed() == ["step-00000001"]
    found = load_newest(store)
    assert found is not None
    assert found.manifest.step == 1
    store.discard("step-00000001")
    assert store.committed() == ["step-00000001"]
    assert "step-00000001 stays: not yours any more" in caplog.text
