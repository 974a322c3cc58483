"""Several ranks, really several processes over gloo: one writes, all verify, all end alike."""

import os
from pathlib import Path

import pytest
import torch
from checkpoint_states import mark_of, marked
from ranks import Ranks

from disttrain.backend import Backend
from disttrain.checkpoint import DamagedError, committed, load_newest, on_one_rank, save
from disttrain.checkpoint.agree import by_rank, on_every_rank
from disttrain.errors import CheckpointError, RemoteError


def save_and_load(backend: Backend, root: Path) -> None:
    # Only rank 0's state counts: the others' could not even be saved.
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


def test_damage_is_found_by_whoever_hashes_the_file_and_skipped_by_all(ranks: Ranks, tmp_path: Path) -> None:
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


def test_where_none_is_good_every_rank_says_so(ranks: Ranks, tmp_path: Path) -> None:
    (save(tmp_path, 1, marked(1)) / "SHA256SUMS").unlink()
    ranks(2, load_in_vain, tmp_path)


def look_elsewhere(backend: Backend, root: Path) -> None:
    os.chdir(root / "here" if backend.rank == 0 else root)
    with pytest.raises(CheckpointError, match=r"rank 1 finds no directory .*that every rank sees") as caught:
        load_newest(".", backend)
    assert not isinstance(caught.value, DamagedError)


def test_a_rank_that_does_not_see_the_directory_stops_all(ranks: Ranks, tmp_path: Path) -> None:
    save(tmp_path / "here", 1, marked(1))
    ranks(2, look_elsewhere, tmp_path)
    assert committed(tmp_path / "here") == ["step-00000001"]


def fail(error: Exception) -> None:
    raise error


def share_outcomes(backend: Backend) -> None:
    assert on_one_rank(backend, lambda: backend.rank * 10 + 5, rank=1) == 15
    with pytest.raises(ValueError if backend.rank == 1 else RemoteError, match="its own words"):
        on_one_rank(backend, lambda: fail(ValueError("its own words")), rank=1)
    with pytest.raises(DamagedError, match=r"^bad$"):
        on_every_rank(backend, lambda: fail(DamagedError("bad")) if backend.rank else None)
    mixed = CheckpointError("unknown") if backend.rank else DamagedError("a first one")
    with pytest.raises(CheckpointError, match=r"^unknown$") as caught:
        on_every_rank(backend, lambda: fail(mixed))
    assert type(caught.value) is CheckpointError
    assert on_every_rank(backend, lambda: backend.rank) == backend.rank
    assert by_rank(backend, lambda: backend.rank * 10) == [0, 10]
    for wrong, kind in ((CheckpointError("mine"), CheckpointError), (ValueError("mine"), RemoteError)):
        with pytest.raises(type(wrong) if backend.rank else kind, match="mine"):
            by_rank(backend, lambda wrong=wrong: fail(wrong) if backend.rank else None)
    with pytest.raises(CheckpointError, match=r"^0$"):  # the lowest rank's, where several fail
        by_rank(backend, lambda: fail(CheckpointError(str(backend.rank))))


def test_an_outcome_is_every_ranks(ranks: Ranks) -> None:
    ranks(2, share_outcomes)


def test_alone_an_outcome_is_ones_own() -> None:
    assert on_one_rank(None, lambda: 5) == 5
    assert by_rank(None, lambda: 5) == [5]
    assert torch.equal(on_every_rank(None, lambda: torch.ones(2)), torch.ones(2))
