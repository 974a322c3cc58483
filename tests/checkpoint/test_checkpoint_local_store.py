"""The store in a directory: the commit by one rename, the same step again, full disks, and the notes of an upload."""

import os
import re
import resource
import subprocess
from pathlib import Path

import pytest
import torch
from checkpoint_states import files, mark_of, marked

from disttrain.checkpoint import CheckpointInfo, load, load_newest, save
from disttrain.checkpoint.local_store import LocalStore
from disttrain.checkpoint.manifest import TENSORS, manifest_of
from disttrain.errors import CheckpointError


def test_saving_the_same_state_again_changes_nothing(tmp_path: Path) -> None:
    path = save(tmp_path, 5, marked(5))
    before = {p.name: p.stat().st_ino for p in path.iterdir()}
    assert save(tmp_path, 5, marked(5)) == path
    assert {p.name: p.stat().st_ino for p in path.iterdir()} == before
    assert os.listdir(tmp_path) == ["step-00000005"]


def test_another_state_of_the_same_step_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 5, marked(4))
    path = save(tmp_path, 5, marked(6))
    assert mark_of(load(path).state) == 6
    assert os.listdir(tmp_path) == ["step-00000005"]


def test_a_damaged_checkpoint_of_the_same_step_is_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = save(tmp_path, 5, marked(5))
    (path / "tensors.safetensors").write_bytes(b"")
    assert save(tmp_path, 5, marked(5)) == path
    assert mark_of(load(path).state) == 5
    aside = sorted(os.listdir(tmp_path))[0]
    assert re.fullmatch(r"damaged-00000005-[0-9a-f]{8}", aside)
    assert aside in caplog.text


def test_a_kill_between_the_two_renames_of_a_replacement_leaves_the_old_one(tmp_path: Path) -> None:
    path = save(tmp_path, 5, marked(5))
    path.rename(tmp_path / "step-00000005.replaced-0a1b2c3d")
    loaded = load_newest(tmp_path)
    assert loaded is not None
    assert (loaded.manifest.step, mark_of(loaded.state)) == (5, 5)


def test_a_directory_that_cannot_be_made_is_an_error_with_the_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot write the checkpoint .*file/checkpoints/step-00000001"):
        save(tmp_path / "file" / "checkpoints", 1, {})


def check_full(root: Path, old: dict[str, bytes]) -> None:
    with pytest.raises(CheckpointError) as caught:
        save(root, 3, {"a": torch.ones(2**20)})
    found = re.search(r"it needs (\d+) bytes and (\d+) are free there. Free some space", str(caught.value))
    assert found is not None
    assert int(found[1]) >= 4 * 2**20
    assert str(root / "step-00000003") in str(caught.value)
    assert files(root) == old


def test_a_full_disk_is_an_error_and_older_checkpoints_stay(tmp_path: Path) -> None:
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", tmp_path], capture_output=True, text=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a small tmpfs: {mounted.stderr.strip()}")
    try:
        root = tmp_path / "checkpoints"
        for step in (1, 2):
            save(root, step, marked(step))
        check_full(root, files(root))
        for step in (1, 2):
            assert mark_of(load(root / f"step-{step:08d}").state) == step
        save(root, 3, marked(3))
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_a_limit_on_file_sizes_is_an_error_and_older_checkpoints_stay(tmp_path: Path) -> None:
    save(tmp_path, 1, marked(1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    try:
        check_full(tmp_path, files(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert mark_of(load(tmp_path / "step-00000001").state) == 1


def test_an_interrupted_save_removes_its_temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(fd: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 1, marked(1))
    assert os.listdir(tmp_path) == []


def test_everything_is_flushed_before_the_rename_that_commits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fsync, rename = os.fsync, os.rename

    def noted_fsync(fd: int) -> None:
        fsync(fd)
        done.append("flush " + os.readlink(f"/proc/self/fd/{fd}").removeprefix(str(tmp_path)))

    def noted_rename(old: Path, new: Path) -> None:
        rename(old, new)
        done.append(f"rename {old.name} {new.name}")

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "rename", noted_rename)
    for step in range(3):
        save(tmp_path / "new", step, marked(step), keep=2)
    done = [re.sub(r"-[0-9a-f]{8}(?=/|\b)(?<!-0000000\d)", "-R", line) for line in done]
    saving = ["/tensors.safetensors", "/MANIFEST.json", "/SHA256SUMS", ""]
    expected = ["flush "]
    for step in range(3):
        expected += [f"flush /new/.tmp-0000000{step}-R{name}" for name in saving]
        expected += [f"rename .tmp-0000000{step}-R step-0000000{step}", "flush /new"]
    assert done == [*expected, "rename step-00000000 .del-00000000-R"]


def test_notes_are_read_by_number_and_are_not_in_the_checkpoint(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    upload = store.begin(7)
    assert store.notes(upload) == {}
    for number, text in ((3, "three"), (1, "one"), (1, "one again")):
        store.leave_note(upload, number, text)
    assert store.notes(upload) == {1: "one again", 3: "three"}
    record = store.write_part(upload, TENSORS, {"a": torch.ones(2)})
    tree = {"$tensor": "a", "dtype": "float32", "shape": [2]}
    name = store.commit(upload, manifest_of(7, tree, CheckpointInfo(), 1, {TENSORS: record}))
    assert name == "step-00000007"
    assert sorted(os.listdir(tmp_path / name)) == ["MANIFEST.json", "SHA256SUMS", TENSORS]
    assert torch.equal(load(tmp_path / name).state, torch.ones(2))


def test_an_abandoned_upload_leaves_nothing_and_can_be_abandoned_again(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    upload = store.begin(7)
    store.write_part(upload, TENSORS, {"a": torch.ones(2)})
    assert store.leftovers() == [upload]
    for _ in range(2):
        store.abandon(upload)
    assert os.listdir(tmp_path) == []


def test_a_checkpoint_that_is_put_aside_keeps_its_bytes(tmp_path: Path) -> None:
    old = files(save(tmp_path, 5, marked(5)))
    store = LocalStore(tmp_path)
    store.put_aside("step-00000005", "for a test")
    [aside] = store.set_aside()
    assert store.committed() == []
    assert files(tmp_path / aside) == old
