"""Saving: the format on the disk, the commit, the same step again, and disks that are full."""

import json
import os
import re
import resource
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_states import files, mark_of, marked, same, tensor_of, training_state

from disttrain.checkpoint import About, committed, load, load_newest, save, verify
from disttrain.errors import CheckpointError
from disttrain.version import __version__

ABOUT = About(position={"epoch": 3, "step_in_epoch": 4}, seed=7, num_slots=8, config_sha256="c" * 64)


def test_a_checkpoint_is_three_files_and_says_what_it_is(tmp_path: Path) -> None:
    path = save(tmp_path / "a" / "b", 40, training_state(), about=ABOUT)
    assert path == tmp_path / "a" / "b" / "step-00000040"
    assert sorted(os.listdir(path)) == ["MANIFEST.json", "SHA256SUMS", "tensors.safetensors"]
    assert os.listdir(path.parent) == ["step-00000040"]
    fields = json.loads((path / "MANIFEST.json").read_text())
    assert {name: fields[name] for name in ("format", "step", "position", "seed", "num_slots", "world_size")} == {
        "format": 1,
        "step": 40,
        "position": {"epoch": 3, "step_in_epoch": 4},
        "seed": 7,
        "num_slots": 8,
        "world_size": 1,
    }
    assert fields["config_sha256"] == "c" * 64
    assert fields["versions"]["disttrain"] == __version__
    assert fields["versions"]["torch"] == str(torch.__version__)


def test_sha256sum_accepts_it_and_notices_a_change(tmp_path: Path) -> None:
    path = save(tmp_path, 1, training_state())
    check = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    done = subprocess.run(check, cwd=path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["MANIFEST.json: OK", "tensors.safetensors: OK"]
    (path / "tensors.safetensors").write_bytes(b"x" + (path / "tensors.safetensors").read_bytes()[1:])
    assert subprocess.run(check, cwd=path, capture_output=True, check=False).returncode == 1


def test_nothing_in_it_is_a_pickle(tmp_path: Path) -> None:
    path = save(tmp_path, 1, training_state())
    for name, content in files(path).items():
        assert not content.startswith((b"\x80", b"PK")), name


def test_the_state_and_what_is_said_about_it_come_back(tmp_path: Path) -> None:
    path = save(tmp_path, 40, training_state(), about=ABOUT)
    state, manifest, skipped = load(path)
    assert same(state, training_state())
    assert (manifest.position, manifest.seed, manifest.num_slots) == (ABOUT.position, 7, 8)
    assert skipped == []


@pytest.mark.parametrize("state", [None, 1, [], {}, torch.tensor(3.0), (), {"a": torch.empty(0, 3)}])
def test_any_state_is_enough_for_a_checkpoint(tmp_path: Path, state: Any) -> None:
    assert same(load(save(tmp_path, 0, state)).state, state)


def test_the_same_state_gives_the_same_bytes(tmp_path: Path) -> None:
    assert files(save(tmp_path / "1", 5, training_state())) == files(save(tmp_path / "2", 5, training_state()))


def test_a_state_that_cannot_be_held_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"state\['a'\] is a set"):
        save(tmp_path / "new", 1, {"t": torch.ones(3), "a": {1, 2}})
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("step", [-1, 1.0, True, 10**15, "1"])
def test_a_step_is_a_whole_number(tmp_path: Path, step: Any) -> None:
    with pytest.raises(CheckpointError, match="expected a step from 0"):
        save(tmp_path, step, {})


def test_the_newest_stay_and_never_fewer_than_two(tmp_path: Path) -> None:
    for step in range(6):
        save(tmp_path / "three", step, {}, keep=3)
        save(tmp_path / "none", step, {}, keep=0)
        save(tmp_path / "all", step, {}, keep=None)
    assert committed(tmp_path / "three") == ["step-00000005", "step-00000004", "step-00000003"]
    assert committed(tmp_path / "none") == ["step-00000005", "step-00000004"]
    assert len(committed(tmp_path / "all")) == 6
    assert len(os.listdir(tmp_path / "none")) == 2


def test_saving_the_same_again_leaves_the_one_that_is_there(tmp_path: Path) -> None:
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


def test_a_damaged_one_of_the_same_step_is_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = save(tmp_path, 5, marked(5))
    (path / "tensors.safetensors").write_bytes(b"")
    assert save(tmp_path, 5, marked(5)) == path
    assert mark_of(load(path).state) == 5
    aside = sorted(os.listdir(tmp_path))[0]
    assert re.fullmatch(r"damaged-00000005-[0-9a-f]{8}", aside)
    assert aside in caplog.text


def test_killed_between_the_two_renames_of_a_replacement_one_of_the_two_is_there(tmp_path: Path) -> None:
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


def test_a_full_disk_is_an_error_and_costs_nothing_that_is_there(tmp_path: Path) -> None:
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


def test_a_limit_on_file_sizes_is_an_error_and_costs_nothing_that_is_there(tmp_path: Path) -> None:
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


def test_verify_returns_the_manifest(tmp_path: Path) -> None:
    path = save(tmp_path, 2, {"a": tensor_of(torch.bfloat16, [3])})
    assert verify(path).files["tensors.safetensors"].size_bytes == (path / "tensors.safetensors").stat().st_size
