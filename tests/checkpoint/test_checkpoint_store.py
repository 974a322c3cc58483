"""The store that a path or a URL means, the places of a run's checkpoints, and the rotation in a store."""

import os
from pathlib import Path

import pytest
from checkpoint_states import marked
from hypothesis import given, settings
from hypothesis import strategies as st

from disttrain.checkpoint import ELSEWHERE, clean, committed, folder_under, folders_of, rotate, save, store_at
from disttrain.checkpoint.local_store import LocalStore
from disttrain.checkpoint.remote_store import RemoteStore
from disttrain.checkpoint.storage import checkpoint_name
from disttrain.errors import CheckpointError


def test_a_path_means_a_directory_and_a_url_a_remote_store(tmp_path: Path) -> None:
    for path in (str(tmp_path), tmp_path, f"file://{tmp_path}"):
        store = store_at(path)
        assert isinstance(store, LocalStore)
        assert store.root == tmp_path
    assert isinstance(store_at("memory://b/c"), RemoteStore)
    store = LocalStore(tmp_path)
    assert store_at(store) is store
    assert folder_under("s3://bucket/runs/", "digits") == "s3://bucket/runs/digits"


def test_a_run_has_the_place_of_its_config_its_own_and_the_last_one(tmp_path: Path) -> None:
    own = str(tmp_path)
    assert folders_of(tmp_path) == [own]
    assert folders_of(tmp_path, tmp_path) == [own]
    assert folders_of(tmp_path, "s3://bucket/a") == ["s3://bucket/a", own]
    (tmp_path / ELSEWHERE).write_text("s3://bucket/b\n")
    assert folders_of(tmp_path, "s3://bucket/a") == ["s3://bucket/a", own, "s3://bucket/b"]
    assert folders_of(tmp_path, "s3://bucket/b") == ["s3://bucket/b", own]


@given(steps=st.sets(st.integers(0, 99), max_size=6), keep=st.integers(-1, 8))
@settings(max_examples=50)
def test_the_newest_stay_and_never_fewer_than_two_of_them(
    steps: set[int], keep: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("rotated")
    for step in steps:
        (root / checkpoint_name(step)).mkdir()
    newest_first = [checkpoint_name(step) for step in sorted(steps, reverse=True)]
    assert rotate(root, keep) == newest_first[max(keep, 2) :]
    assert committed(root) == newest_first[: max(keep, 2)]


def test_rotation_leaves_other_files_alone(tmp_path: Path) -> None:
    root = tmp_path / "c"
    for step in (10, 20, 30):
        save(root, step, marked(step))
    for name in ("step-7", "step-00000007x", "best", "step-000000007", "notes.txt", ".tmp-mine", ".del-00000001-XYZ"):
        (root / name).mkdir()
    before = set(os.listdir(root))
    rotate(root, 2)
    clean(root)
    assert before - set(os.listdir(root)) == {"step-00000010"}


@pytest.mark.parametrize(
    "content",
    [b"", b"\n", b"\xff\xfe", b"/a\n/b\n", b"/a\x1b[2J", b"/" + b"a" * 5000, b"s3://\0"],
    ids=lambda c: str(c[:9]),
)
def test_a_file_that_names_no_other_place_is_one_clear_error(tmp_path: Path, content: bytes) -> None:
    assert folders_of(tmp_path) == [str(tmp_path)]
    (tmp_path / ELSEWHERE).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"elsewhere.txt: expected a path or a URL.*; remove it$") as caught:
        folders_of(tmp_path)
    assert str(caught.value).isprintable()
