"""Checkpoints that several ranks write together: damage to a part, a killed rank, and a full disk on one rank."""

import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoint_shards import plain, save_spread
from checkpoint_states import same
from ranks import Died, Ok, Ranks

from disttrain.backend import Backend
from disttrain.checkpoint import DamagedError, background, committed, jobs, load, load_newest, survey
from disttrain.errors import BackendError, CheckpointError

DAMAGE: dict[str, Callable[[Path], Any]] = {
    "bit flipped": lambda path: path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1])),
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 1),
    "emptied": lambda path: os.truncate(path, 0),
    "removed": Path.unlink,
    "another step's": lambda path: path.write_bytes((path.parent.parent / "step-00000001" / path.name).read_bytes()),
}


def newest_of(backend: Backend, roots: list[Path]) -> list[tuple[int, list[tuple[str, str]]]]:
    found = [load_newest(root, backend) for root in roots]
    return [(loaded.manifest.step, loaded.skipped) for loaded in found if loaded is not None]


def test_damage_to_any_part_is_refused_and_named_and_all_load_an_older_one(ranks: Ranks, tmp_path: Path) -> None:
    ranks(2, save_spread, tmp_path / "good", [1, 2])
    cases = []
    for number in (1, 2):
        for how, damage in DAMAGE.items():
            root = tmp_path / f"{number} {how}"
            shutil.copytree(tmp_path / "good", root)
            name = f"tensors-0000{number}-of-00002.safetensors"
            damage(root / "step-00000002" / name)
            with pytest.raises(DamagedError, match=name):
                load(root / "step-00000002")
            cases.append((root, name))
    first, second = ranks(2, newest_of, [root for root, _ in cases])
    assert first == second
    assert len(first) == 10
    for (step, skipped), (_, name) in zip(first, cases, strict=True):
        assert step == 1
        [(checkpoint, reason)] = skipped
        assert checkpoint == "step-00000002"
        assert name in reason


def die_while_saving(backend: Backend, root: Path, asynchronous: bool) -> None:
    """Save until rank 1 is killed, before its part is flushed; a broken collective reports it to rank 0."""
    jobs.HURRY_S = 0.2

    def die(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if backend.rank == 1:
        os.fsync = die  # type: ignore[assignment]
    with pytest.raises(BackendError):
        save_spread(backend, root, [2, 3], asynchronous)


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_rank_that_is_killed_while_it_writes_leaves_nothing_incomplete(
    ranks: Ranks, tmp_path: Path, asynchronous: bool
) -> None:
    ranks(2, save_spread, tmp_path, [1])
    zero, one = ranks.outcomes(2, die_while_saving, tmp_path, asynchronous, fresh=True)
    assert isinstance(zero, Ok), zero
    assert isinstance(one, Died)
    assert committed(tmp_path) == ["step-00000001"]
    assert same(load(tmp_path / "step-00000001").state, plain(1))
    ranks(2, save_spread, tmp_path, [3])
    assert committed(tmp_path) == ["step-00000003", "step-00000001"]


def fail(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


def fill_the_disk(backend: Backend, root: Path, asynchronous: bool, mute: bool) -> str:
    """Save while the disk of rank 1 is full, for its note too if it is `mute`; return the error on this rank."""
    real, background.REPORT_EVERY_S = (os.fsync, Path.write_text), 0.2
    if backend.rank == 1:
        os.fsync = fail  # type: ignore[assignment]
        if mute:
            Path.write_text = fail  # type: ignore[method-assign, assignment]
    try:
        with pytest.raises(CheckpointError) as caught:
            save_spread(backend, root, [2], asynchronous)
    finally:
        os.fsync, Path.write_text = real  # type: ignore[method-assign]
    save_spread(backend, root, [3], asynchronous)
    return str(caught.value)


@pytest.mark.parametrize(("asynchronous", "mute"), [(False, False), (True, False), (True, True)])
def test_a_full_disk_on_one_rank_is_the_same_error_on_all(
    ranks: Ranks, tmp_path: Path, asynchronous: bool, mute: bool
) -> None:
    ranks(2, save_spread, tmp_path, [1])
    first, second = ranks(2, fill_the_disk, tmp_path, asynchronous, mute)
    assert first == second
    assert re.search(r"step-00000002: No space left on device; it needs \d+ bytes and \d+ are free there", first)
    assert sorted(os.listdir(tmp_path)) == ["step-00000001", "step-00000003"]
    assert [entry.state for entry in survey(tmp_path)] == ["good", "good"]
