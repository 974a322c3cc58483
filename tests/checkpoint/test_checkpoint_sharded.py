"""Checkpoints that several ranks write together: DTensors and whole tensors, loaded by any other world."""

import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from checkpoint_shards import SHAPES, mesh_of, plain, save_spread, spread, whole
from checkpoint_states import files, marked, same
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import Died, Ok, Ranks
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

from disttrain.backend import Backend
from disttrain.checkpoint import (
    About,
    AsynchronousSaver,
    DamagedError,
    DirectorySaver,
    DiskSaver,
    FileRecord,
    Manifest,
    background,
    committed,
    jobs,
    load,
    load_newest,
    save,
    survey,
)
from disttrain.checkpoint.jobs import Job, write_and_commit
from disttrain.checkpoint.local import LocalPlace
from disttrain.checkpoint.manifest import Cut, part_name
from disttrain.checkpoint.plan import Share
from disttrain.checkpoint.state_reader import chunks_of
from disttrain.checkpoint.tree import flatten
from disttrain.errors import BackendError, CheckpointError


def load_spread(backend: Backend, root: Path) -> None:
    """Load every way: whole, cut as it was, cut otherwise."""
    found = load_newest(root, backend)
    assert found is not None
    assert same(found.state, plain(found.manifest.step))
    assert found.state["model"]["tied"] is found.state["model"]["a"]
    mesh, asked = mesh_of(backend), {}
    for turn in (0, 1):

        def sharded(path: str, shape: tuple[int, ...], turn: int = turn) -> Any:
            asked[path] = shape
            if not path.startswith("model.") or path == "model.d":
                return None
            return mesh, [Shard(turn % len(shape))]

        found = load_newest(root, backend, sharded)
        assert found is not None
        for name, tensor in found.state["model"].items():
            expected = whole("a" if name == "tied" else name, found.manifest.step)
            if name == "d":
                assert same(tensor, expected)
                continue
            assert isinstance(tensor, DTensor)
            cut = distribute_tensor(expected, mesh, tensor.placements)
            assert (tensor.shape, tensor.stride()) == (cut.shape, cut.stride())
            assert same(tensor.to_local(), cut.to_local())
        assert type(found.state["optimizer"][0]["exp_avg"]) is torch.Tensor
    assert set(asked) == {f"model.{name}" for name in (*SHAPES, "tied")} | {"optimizer.0.step", "optimizer.0.exp_avg"}


def test_what_some_ranks_save_any_others_load(ranks: Ranks, tmp_path: Path) -> None:
    ranks(2, save_spread, tmp_path / "s", [2])
    ranks(2, save_spread, tmp_path / "a", [1, 2], True)
    path = tmp_path / "a" / "step-00000002"
    assert files(path) == files(tmp_path / "s" / "step-00000002")
    names = ["MANIFEST.json", "SHA256SUMS", "tensors-00001-of-00002.safetensors", "tensors-00002-of-00002.safetensors"]
    assert list(files(path)) == names
    assert [entry.state for entry in survey(tmp_path / "a")] == ["good", "good"]
    assert same(load(path).state, plain(2))
    for name in names[2:]:
        with safetensors.safe_open(path / name, "pt") as file:
            assert "model.a" in file.keys()  # noqa: SIM118 - no mapping
    ranks(3, save_spread, tmp_path / "three", [4])  # some have nothing of the smallest tensor
    ranks(2, load_spread, tmp_path / "three")
    for world_size in (1, 2, 3):
        ranks(world_size, load_spread, tmp_path / "a")


def big(step: int) -> dict[str, Any]:
    """Return a state of whole tensors that is worth two or three files."""
    return {
        "model": {name: torch.full((100_000 + i,), float(step)) for i, name in enumerate("uvwxyz")},
        "step": step,
        "drawn": torch.tensor([0] * 600),
    }


def save_whole(backend: Backend, root: Path) -> None:
    saver = DirectorySaver(root, backend=backend)
    for step in (1, 2):
        # What is no tensor, or a small one, is rank 0's to say, and may differ.
        own = {"step": step - backend.rank, "drawn": torch.tensor([backend.rank] * 600)}
        saver({**big(step), **own}, f"step-{step:08d}", {})


def read_share(backend: Backend, root: Path) -> int:
    """Load only this rank's part; return the bytes that were read of the tensors."""
    mesh, count, preadv = mesh_of(backend), 0, os.preadv

    def counting(descriptor: int, buffers: Any, offset: int) -> int:
        nonlocal count
        count += (read := preadv(descriptor, buffers, offset))
        return read

    os.preadv = counting  # type: ignore[assignment]
    try:
        found = load_newest(root, backend, lambda path, shape: (mesh, [Shard(0)]) if shape else None)
    finally:
        os.preadv = preadv
    assert found is not None
    assert found.state["step"] == 2
    assert all(bool((tensor.to_local() == 2).all()) for tensor in found.state["model"].values())
    return count


def test_whole_tensors_are_spread_over_the_files_and_each_rank_reads_only_its_part(
    ranks: Ranks, tmp_path: Path
) -> None:
    ranks(3, save_whole, tmp_path)
    path = tmp_path / "step-00000002"
    sizes = [file.stat().st_size for file in sorted(path.glob("tensors-*-of-00002.safetensors"))]
    assert len(sizes) == 2  # 2.4 MB are not worth three
    assert max(sizes) < 1.01 * min(sizes)
    assert same(load(path).state, big(2))
    shares = ranks(2, read_share, tmp_path)
    assert sum(shares) == 4 * sum(100_000 + i for i in range(6)) + 8 * 600
    assert max(shares) < 0.51 * sum(shares)


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


def test_damage_to_any_file_is_refused_named_and_gone_round_by_all(ranks: Ranks, tmp_path: Path) -> None:
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
    """Rank 1 is killed before what it wrote is flushed; rank 0 hears of it by a broken collective."""
    jobs.HURRY_S = 0.2

    def die(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if backend.rank == 1:
        os.fsync = die  # type: ignore[assignment]
    with pytest.raises(BackendError):
        save_spread(backend, root, [2, 3], asynchronous)


@pytest.mark.parametrize("asynchronous", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_rank_that_is_killed_while_it_writes_leaves_nothing_half(
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
    """Rank 1's disk is full, for a note too where it is `mute`; return what this rank hears of it."""
    real, background.TOLD_EVERY_S = (os.fsync, Path.write_text), 0.2
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


@pytest.mark.parametrize("word", [None, "", '{"record": {"size_by'])
def test_a_part_of_which_no_word_comes_is_an_error_after_a_while(tmp_path: Path, word: str | None) -> None:
    place = LocalPlace(tmp_path)
    state = flatten(marked(1))
    share = Share(state, 2, dict.fromkeys(state.tensors, 1), 0)
    upload = place.begin(1)
    if word is not None:
        place.leave_note(upload, 1, word)  # cut off, or still being written

    def work(job: Job) -> None:
        job.patience_s = 0.0
        write_and_commit(place, upload, 1, share, About(), 2, lambda: None, job)

    job = Job(work, fail)
    assert job.ended(60)
    assert "no word of the parts that the ranks [1] write" in str(job.failure)
    assert os.listdir(tmp_path) == []


def save_in_vain(backend: Backend, root: Path) -> None:
    mesh = mesh_of(backend)
    good = distribute_tensor(whole("a", 1), mesh, [Shard(0)])
    with pytest.raises(CheckpointError, match=r"state\['b'\] is a set"):
        save(root, 1, {"a": good, "b": {1} if backend.rank else 1}, backend=backend)
    with pytest.raises(CheckpointError, match="rank 1 has other tensors to save than rank 0"):
        save(root, 1, {"a": good, f"b{backend.rank}": torch.ones(1)}, backend=backend)
    sum_of_parts = DTensor.from_local(torch.ones(2), mesh, [Partial()])
    with pytest.raises(CheckpointError, match=r"state\['p'\] is a DTensor placed as P"):
        save(root, 1, {"p": sum_of_parts}, backend=backend)
    with pytest.raises(CheckpointError, match="expected a plain tensor"):
        DiskSaver(root)({"a": good}, f"{backend.rank}.pt")


def test_what_cannot_be_spread_is_refused_on_every_rank(ranks: Ranks, tmp_path: Path) -> None:
    ranks(2, save_in_vain, tmp_path)
    assert os.listdir(tmp_path) == []


def through_a_store(backend: Backend, url: str) -> None:
    for asynchronous in (False, True):
        saver = (AsynchronousSaver if asynchronous else DirectorySaver)(url, backend=backend)
        for step in (1, 2) if asynchronous else (3,):
            saver(spread(backend, step), f"step-{step:08d}", {})
        saver.settle()
    load_spread(backend, url)  # type: ignore[arg-type]


def test_every_rank_uploads_its_part(ranks: Ranks, tmp_path: Path) -> None:
    pytest.importorskip("fsspec")
    url = f"local://{tmp_path}/c"
    ranks(2, through_a_store, url)
    assert [(entry.step, entry.state) for entry in survey(url)] == [(3, "good"), (2, "good"), (1, "good")]
    assert {len(os.listdir(path)) for path in (tmp_path / "c").iterdir()} == {4}


@given(
    chunks=st.lists(st.tuples(st.integers(0, 3), st.integers(-1, 6), st.integers(-1, 6)).map(list), max_size=4),
    size=st.integers(0, 6),
)
@settings(max_examples=300)
def test_a_table_is_believed_only_if_each_place_lies_in_one_chunk(chunks: list[list[int]], size: int) -> None:
    record = FileRecord(size_bytes=1, sha256="0" * 64)
    files = {part_name(number, 3): record for number in (1, 2, 3)}
    manifest = Manifest(format=2, step=1, files=files, tensors={"t": Cut(dim=0, chunks=chunks)})
    held = [at for _, start, length in chunks for at in range(start, start + length)]
    numbers = [number for number, _, _ in chunks]
    sound = set(numbers) <= {1, 2, 3} and len(set(numbers)) == len(numbers) and all(c[2] > 0 for c in chunks)
    try:
        found = chunks_of(manifest, "t", (size, 2))
    except DamagedError:
        assert not sound or sorted(held) != list(range(size))
        return
    assert sound
    assert sorted(held) == list(range(size))
    assert [[c.file, c.start, c.length] for c in found] == [[part_name(n, 3), s, k] for n, s, k in chunks]
