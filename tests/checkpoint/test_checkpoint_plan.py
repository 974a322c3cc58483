"""Each tensor is in one share, shares are about equal, and all ranks refuse a state that one of them cannot save."""

import os
from collections import Counter
from pathlib import Path

import pytest
import torch
from checkpoint_shards import SHAPES, mesh_of, spread, whole
from checkpoint_states import DTYPES, same, tensor_of
from hypothesis import given
from hypothesis import strategies as st
from ranks import Ranks
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

from disttrain.backend import Backend
from disttrain.checkpoint import DiskSaver, save
from disttrain.checkpoint.manifest import Cut
from disttrain.checkpoint.plan import SMALL_TENSOR_BYTES, WORTH_A_FILE_BYTES, Planner, Share, _balanced
from disttrain.errors import CheckpointError


@given(sizes=st.lists(st.integers(0, 50), max_size=12), num_writers=st.integers(1, 5))
def test_no_rank_writes_more_than_the_least_loaded_by_more_than_one_tensor(sizes: list[int], num_writers: int) -> None:
    tensors = {f"t{i}": torch.empty(size, dtype=torch.uint8) for i, size in enumerate(sizes)}
    table = _balanced(tensors, num_writers)
    assert set(table) == set(tensors)
    assert table == _balanced(dict(reversed(tensors.items())), num_writers)  # all ranks make the same table
    loads = Counter(dict.fromkeys(range(1, num_writers + 1), 0))
    for name, entry in table.items():
        assert isinstance(entry, int)
        loads[entry] += tensors[name].nbytes
    assert set(loads) == set(range(1, num_writers + 1))
    assert max(loads.values()) - min(loads.values()) <= max(sizes, default=0)


@pytest.mark.filterwarnings("ignore:ComplexHalf support")
def test_one_process_writes_everything_into_one_file() -> None:
    state = {str(dtype): tensor_of(dtype, [3]) for dtype in DTYPES}
    share = Planner(None).share(3, state)
    assert (share.num_files, share.table) == (1, None)
    assert same(share.flat.tensors, state)
    with pytest.raises(CheckpointError, match="expected a step from 0 to"):
        Planner(None).share(-1, state)


def share_whole_tensors(backend: Backend) -> list[tuple[list[str], int]]:
    """Return (names, number of files) of this rank's share of states of growing size."""
    planner, shares = Planner(backend), []
    for num_bytes in (WORTH_A_FILE_BYTES, 2 * WORTH_A_FILE_BYTES, 5 * WORTH_A_FILE_BYTES):
        state = {f"t{i}": torch.zeros(num_bytes // 4, dtype=torch.uint8) for i in range(4)}
        share = planner.share(1, {**state, "drawn": torch.tensor(backend.rank), "small": torch.zeros(99)})
        again = planner.share(2, {**state, "drawn": torch.tensor(backend.rank), "small": torch.zeros(99)})
        assert share.table is again.table  # the same structure is planned once
        shares.append((sorted(share.flat.tensors), share.num_files))
    return shares


def test_more_ranks_write_a_larger_state_and_rank_0_writes_the_small_tensors(ranks: Ranks) -> None:
    assert SMALL_TENSOR_BYTES < WORTH_A_FILE_BYTES // 4
    by_rank = ranks(3, share_whole_tensors)
    for size, num_files in enumerate((1, 2, 3)):
        shares = [names for names, number in (shares[size] for shares in by_rank) if number == num_files]
        assert len(shares) == 3
        if num_files > 1:
            written = sorted(name for names in shares for name in names)
            assert written == ["drawn", "small", "t0", "t1", "t2", "t3"]
            assert {"drawn", "small"} <= set(shares[0])
            assert [bool(names) for names in shares] == [True, True, num_files == 3]


def share_dtensors(backend: Backend) -> Share:
    return Planner(backend).share(1, spread(backend, 1))


def test_each_element_of_a_dtensor_is_in_one_share(ranks: Ranks) -> None:
    shares = ranks(2, share_dtensors)
    assert shares[0].table == shares[1].table
    for name in SHAPES:
        entry = shares[0].table[f"model.{name}"]
        held = [share.flat.tensors.get(f"model.{name}") for share in shares]
        if isinstance(entry, Cut):
            chunks = sorted(entry.chunks, key=lambda chunk: chunk[1])
            assert same(torch.cat([held[number - 1] for number, _, _ in chunks], entry.dim), whole(name, 1))
        else:
            assert [part is not None for part in held] == [entry == 1, entry == 2]
            assert same(held[entry - 1], whole(name, 1))
    assert shares[0].flat.tensors.keys() >= {"optimizer.0.step"}


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


def test_a_state_that_cannot_be_spread_is_refused_on_every_rank(ranks: Ranks, tmp_path: Path) -> None:
    ranks(2, save_in_vain, tmp_path)
    assert os.listdir(tmp_path) == []
