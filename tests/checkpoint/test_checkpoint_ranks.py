"""Several ranks, as real processes over gloo: one writes, all verify, and all return or raise the same."""

import os
from pathlib import Path

import pytest
from checkpoint_states import mark_of, marked
from ranks import Ranks

from disttrain.backend import Backend
from disttrain.checkpoint import DamagedError, committed, load_newest, save
from disttrain.errors import CheckpointError


def save_and_load(backend: Backend, root: Path) -> None:
    # Only the state of rank 0 is saved; the other states could not be saved.
    state = marked(1) if backend.rank == 0 else {"a": {1, 2}}
    assert save(root, 1, state, backend=backend) == root / "step-00000001"
    loaded = load_newest(root, backend)
    assert loaded is not None
    assert mark_of(loaded.state) == 1
    assert loaded.manifest.world_size == backend.world_size


def test_one_rank_writes_and_every_rank_loads_the_same(ranks: Ranks, tmp_path: Path) -> None:
    ranks(3, save_and_load, tmp_path / "c")
    assert os.listdir(tmp_path / "c") == ["step-00000001"]


def go_round_damage(backend: Backend, root: Path) -> tuple[int, list[tuple[str, str]]]:
    loaded = load_newest(root, backend)
    assert loaded is not None
    return mark_of(loaded.state), loaded.skipped


def test_damage_that_one_rank_finds_is_skipped_by_all(ranks: Ranks, tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, marked(step))
    newest = tmp_path / "step-00000003" / "tensors.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"x")
    (tmp_path / "step-00000002" / "MANIFEST.json").unlink()
    first, second = ranks(2, go_round_damage, tmp_path)
    assert first == second
    step, [(name3, reason3), (name2, reason2)] = first
    assert (step, name3, name2) == (1, "step-00000003", "step-00000002")
    assert "tensors.safetensors does not have the sha256" in reason3
    assert "MANIFEST.json is missing" in reason2
    assert committed(tmp_path) == ["step-00000001"]


def save_in_vain(backend: Backend, root: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot write the checkpoint .*step-00000001"):
        save(root / "file" / "c", 1, marked(1), backend=backend)
    with pytest.raises(CheckpointError, match=r"state\['a'\] is a set"):
        save(root, 1, {"a": {1, 2}}, backend=backend)
    save(root, 2, marked(2), backend=backend)


def test_a_failed_save_is_a_checkpoint_error_on_every_rank(ranks: Ranks, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ranks(2, save_in_vain, tmp_path)
    assert committed(tmp_path) == ["step-00000002"]


def load_in_vain(backend: Backend, root: Path) -> None:
    assert load_newest(root / "absent", backend) is None
    with pytest.raises(CheckpointError, match=r"step-00000001: SHA256SUMS is missing"):
        load_newest(root, backend)


def test_without_a_good_one_every_rank_raises(ranks: Ranks, tmp_path: Path) -> None:
    (save(tmp_path, 1, marked(1)) / "SHA256SUMS").unlink()
    ranks(2, load_in_vain, tmp_path)


def load_from_another_directory(backend: Backend, root: Path) -> None:
    os.chdir(root / "here" if backend.rank == 0 else root)
    with pytest.raises(CheckpointError, match=r"rank 1 finds no directory .*that every rank sees") as caught:
        load_newest(".", backend)
    assert not isinstance(caught.value, DamagedError)


def test_a_rank_that_does_not_see_the_directory_stops_all(ranks: Ranks, tmp_path: Path) -> None:
    save(tmp_path / "here", 1, marked(1))
    ranks(2, load_from_another_directory, tmp_path)
    assert committed(tmp_path / "here") == ["step-00000001"]
