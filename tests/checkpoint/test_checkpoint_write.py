"""Saving: the files on the disk, the same state back, and the newest checkpoints that stay."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_states import files, same, tensor_of, training_state

from disttrain.checkpoint import CheckpointInfo, committed, load, save, verify
from disttrain.errors import CheckpointError
from disttrain.version import __version__

INFO = CheckpointInfo(position={"epoch": 3, "step_in_epoch": 4}, seed=7, num_slots=8, config_sha256="c" * 64)


def test_a_checkpoint_is_three_files_and_describes_itself(tmp_path: Path) -> None:
    path = save(tmp_path / "a" / "b", 40, training_state(), info=INFO)
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


def test_the_state_and_its_description_come_back(tmp_path: Path) -> None:
    path = save(tmp_path, 40, training_state(), info=INFO)
    loaded = load(path)
    assert same(loaded.state, training_state())
    manifest = loaded.manifest
    assert (manifest.position, manifest.seed, manifest.num_slots) == (INFO.position, 7, 8)
    assert loaded.skipped == []


@pytest.mark.parametrize("state", [None, 1, [], {}, torch.tensor(3.0), (), {"a": torch.empty(0, 3)}])
def test_the_smallest_states_can_be_saved(tmp_path: Path, state: Any) -> None:
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


def test_verify_returns_the_manifest(tmp_path: Path) -> None:
    path = save(tmp_path, 2, {"a": tensor_of(torch.bfloat16, [3])})
    assert verify(path).files["tensors.safetensors"].size_bytes == (path / "tensors.safetensors").stat().st_size
