"""A table is used only if its chunks tile their tensor, and each rank reads only its part."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_shards import mesh_of
from checkpoint_states import marked, same
from checkpoint_strangers import victim_in_two
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import Ranks
from torch.distributed.tensor import Shard

from disttrain.backend import Backend
from disttrain.checkpoint import (
    DamagedError,
    DirectorySaver,
    FileRecord,
    Manifest,
    load,
    load_newest,
    state_reader,
    verify,
)
from disttrain.checkpoint.manifest import Cut, part_name
from disttrain.checkpoint.state_reader import StateReader, chunks_of
from disttrain.errors import CheckpointError


@given(
    chunks=st.lists(st.tuples(st.integers(0, 3), st.integers(-1, 6), st.integers(-1, 6)).map(list), max_size=4),
    size=st.integers(0, 6),
)
@settings(max_examples=300)
def test_a_table_is_used_only_if_each_element_lies_in_one_chunk(chunks: list[list[int]], size: int) -> None:
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


def big(step: int) -> dict[str, Any]:
    """Return a state of whole tensors that two ranks write."""
    return {
        "model": {name: torch.full((100_000 + i,), float(step)) for i, name in enumerate("uvwxyz")},
        "step": step,
        "drawn": torch.tensor([0] * 600),
    }


def save_whole(backend: Backend, root: Path) -> None:
    saver = DirectorySaver(root, backend=backend)
    for step in (1, 2):
        # Plain values and small tensors may differ between ranks; rank 0 writes them.
        own = {"step": step - backend.rank, "drawn": torch.tensor([backend.rank] * 600)}
        saver({**big(step), **own}, f"step-{step:08d}", {})


def read_share(backend: Backend, root: Path) -> int:
    """Load only this rank's part; return the bytes of tensors that were read."""
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
    assert len(sizes) == 2  # 2.4 MB are too few for three
    assert max(sizes) < 1.01 * min(sizes)
    assert same(load(path).state, big(2))
    shares = ranks(2, read_share, tmp_path)
    assert sum(shares) == 4 * sum(100_000 + i for i in range(6)) + 8 * 600
    assert max(shares) < 0.51 * sum(shares)


def num_open(directory: Path) -> int:
    """Return the number of files in a directory that this process has open."""
    return sum(str(link.resolve()).startswith(f"{directory}/") for link in Path("/proc/self/fd").iterdir())


@pytest.mark.parametrize("max_open_files", [1, 128])
def test_tensors_in_two_files_are_read_whole_whatever_is_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_open_files: int
) -> None:
    monkeypatch.setattr(state_reader, "MAX_OPEN_FILES", max_open_files)
    path = victim_in_two(tmp_path)
    expected = marked(1, size=4)["model"]
    with StateReader(path, verify(path)) as reader:
        for name, values in expected.items():
            into = torch.zeros(4)
            assert reader.read(f"model.{name}", "float32", (4,), into) is into
            assert same(into, values)
            fetched = reader.fetch(f"model.{name}", "float32", (4,), f"model.{name}")
            assert same(fetched, values)
            assert reader.fetch(f"model.{name}", "float32", (4,), "a tied path") is fetched
            assert 1 <= num_open(path) <= max_open_files
    assert num_open(path) == 0


def test_a_tensor_that_memory_cannot_hold_is_an_error_with_its_name(tmp_path: Path) -> None:
    path = victim_in_two(tmp_path)
    manifest = verify(path)
    with StateReader(path, manifest) as reader, pytest.raises(DamagedError, match=r"count should be int64 of shape"):
        reader.fetch("count", "int64", (2**40,))
    record = FileRecord(size_bytes=1, sha256="0" * 64)
    huge = Manifest(format=2, step=1, files={"a": record}, tensors={"t": Cut(dim=0, chunks=[])})
    with StateReader(path, huge) as reader, pytest.raises(CheckpointError, match=r"cannot hold t, float32 of shape"):
        reader.fetch("t", "float32", (0, 2**62, 2**62))
