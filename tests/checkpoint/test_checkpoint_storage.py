"""Names and their steps, leftovers of killed processes, and files that appear whole or not at all."""

import logging
import os
from pathlib import Path

import pytest
from checkpoint_states import marked
from hypothesis import given
from hypothesis import strategies as st

from disttrain.checkpoint import checkpoint_name, clean, committed, save, step_in, step_of
from disttrain.checkpoint.manifest import MAX_STEP
from disttrain.checkpoint.storage import (
    cannot_write,
    discard,
    leftovers,
    make_directory,
    note_name,
    note_number,
    replaced_name,
    replacing,
    set_aside,
    unique_name,
    write_file,
)

STEPS = st.integers(0, MAX_STEP)


@given(step=STEPS)
def test_a_name_has_its_step(step: int) -> None:
    name = checkpoint_name(step)
    assert step_of(name) == step_of(replaced_name(name)) == step
    for kind in (".tmp", ".del", "damaged"):
        other = unique_name(kind, step)
        assert step_in(other) == step_in(name) == step_in(replaced_name(name)) == step
        assert step_of(other) is None
        assert unique_name(kind, step) != other


@given(one=STEPS, other=STEPS)
def test_two_steps_never_share_a_name(one: int, other: int) -> None:
    assert (checkpoint_name(one) == checkpoint_name(other)) == (one == other)


@given(name=st.text(max_size=30) | st.from_regex(r"(step|note)-?[0-9]{0,18}(\.replaced-[0-9a-f]{0,9}|\.json)?"))
def test_any_other_name_has_no_step_and_is_not_a_note(name: str) -> None:
    step, number = step_of(name), note_number(name)
    assert step is None or name.partition(".")[0] == checkpoint_name(step)
    assert number is None or (name.startswith("note-") and name.endswith(".json"))


@given(number=st.integers(0, 10**9 - 1))
def test_a_note_has_its_number(number: int) -> None:
    assert note_number(note_name(number)) == number


def test_each_kind_of_name_is_listed_once_and_other_files_never(tmp_path: Path) -> None:
    kinds = {
        "committed": ["step-00000009", "step-00000008.replaced-0a1b2c3d", "step-00000008"],
        "leftovers": [".del-00000002-0a1b2c3d", ".tmp-00000003-0a1b2c3d"],
        "set aside": ["damaged-00000004-0a1b2c3d"],
        "other": ["best", "step-9", "step-000000009", "damaged-1", ".tmp-mine"],
    }
    for name in [name for names in kinds.values() for name in names]:
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000010").write_text("a file")
    assert committed(tmp_path) == ["step-00000009", "step-00000008", "step-00000008.replaced-0a1b2c3d"]
    assert leftovers(tmp_path) == kinds["leftovers"]
    assert set_aside(tmp_path) == kinds["set aside"]
    assert committed(tmp_path / "absent") == []
    assert sorted(clean(tmp_path)) == [*kinds["leftovers"], "step-00000008.replaced-0a1b2c3d"]
    assert sorted(os.listdir(tmp_path)) == sorted(
        ["step-00000009", "step-00000008", *kinds["set aside"], *kinds["other"], "step-00000010"]
    )


def test_clean_does_not_follow_a_link(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / "c"
    save(root, 1, marked(1))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("precious")
    (root / ".tmp-00000001-0a1b2c3d").symlink_to(tmp_path / "mine")
    assert clean(root) == []
    assert (tmp_path / "mine" / "file").read_text() == "precious"
    assert caplog.records == []


def test_discard_removes_one_checkpoint_and_one_that_is_gone_is_no_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2):
        save(tmp_path, step, marked(step))
    for _ in range(2):
        discard(tmp_path, "step-00000001", 1)
    assert os.listdir(tmp_path) == ["step-00000002"]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "f"
    for content, error in ((b"old", None), (b"new", KeyboardInterrupt), (b"new", None)):
        before = path.read_bytes() if path.exists() else None
        try:
            with replacing(path) as file:
                file.write(content)
                assert (path.read_bytes() if path.exists() else None) == before
                if error is not None:
                    raise error
        except KeyboardInterrupt:
            assert path.read_bytes() == before
        else:
            assert path.read_bytes() == content
        assert os.listdir(tmp_path) == ["f"]


def test_a_new_file_never_overwrites_another(tmp_path: Path) -> None:
    write_file(tmp_path / "f", b"first")
    with pytest.raises(FileExistsError):
        write_file(tmp_path / "f", b"second")
    assert (tmp_path / "f").read_bytes() == b"first"


def test_missing_parents_are_made_and_an_error_names_the_nearest_that_exists(tmp_path: Path) -> None:
    for _ in range(2):
        make_directory(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    error = cannot_write(tmp_path / "a" / "absent" / "step-00000001", OSError(28, "No space left on device"), 123)
    assert "step-00000001: No space left on device; it needs 123 bytes and " in str(error)
