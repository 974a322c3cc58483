"""The save handler for checkpoint directories: names, the committed checkpoints, and removal."""

import os
from pathlib import Path

import pytest
from checkpoint_states import mark_of, marked

from disttrain.checkpoint import CheckpointInfo, DirectorySaver, load_newest, save


def test_load_newest_loads_the_state_and_the_facts_that_were_saved(tmp_path: Path) -> None:
    saver = DirectorySaver(tmp_path / "c", describe=lambda: CheckpointInfo(seed=3, position={"epoch": 1}))
    saver(marked(40), "step-00000040", {})
    loaded = load_newest(tmp_path / "c")
    assert loaded is not None
    assert mark_of(loaded.state) == loaded.manifest.step == 40
    assert (loaded.manifest.seed, loaded.manifest.position) == (3, {"epoch": 1})


@pytest.mark.parametrize("name", ["checkpoint_40.pt", "step-40", "step-00000040.replaced-0a1b2c3d", "../step-00000040"])
def test_only_its_own_names_are_accepted(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="expected a name such as 'step-00000040', got"):
        DirectorySaver(tmp_path)({}, name, {})
    assert os.listdir(tmp_path) == []


def test_committed_checkpoints_are_listed_and_removed_by_name(tmp_path: Path) -> None:
    for step in (20, 10):
        save(tmp_path, step, {})
    (tmp_path / ".del-00000001-0a1b2c3d").mkdir()
    saver = DirectorySaver(tmp_path)
    saver({}, "step-00000030", {})
    assert saver.saved() == [(10, "step-00000010"), (20, "step-00000020"), (30, "step-00000030")]
    saver.remove("step-00000010")
    saver.remove("step-00000010")
    saver.remove("something else")
    assert sorted(os.listdir(tmp_path)) == ["step-00000020", "step-00000030"]


def test_leftovers_are_removed_before_the_first_save_only(tmp_path: Path) -> None:
    saver = DirectorySaver(tmp_path)
    for step, expected in ((1, set()), (2, {".tmp-00000007-0a1b2c3d"})):
        (tmp_path / ".tmp-00000007-0a1b2c3d").mkdir()  # of another process the second time
        saver({}, f"step-{step:08d}", {})
        assert {name for name in os.listdir(tmp_path) if name.startswith(".")} == expected


def test_a_url_stays_a_url_and_a_path_becomes_a_path(tmp_path: Path) -> None:
    assert DirectorySaver(f"file://{tmp_path}").dirname == f"file://{tmp_path}"
    assert DirectorySaver(str(tmp_path)).dirname == tmp_path
