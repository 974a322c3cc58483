"""DTensors that some ranks save, other ranks load: whole, cut as they were, or cut otherwise."""

from pathlib import Path

import pytest
import safetensors
import torch
from checkpoint_shards import SHAPES, load_spread, mesh_of, plain, save_spread, whole
from checkpoint_states import files, same
from ranks import Ranks
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from disttrain.backend import Backend
from disttrain.checkpoint import load, survey
from disttrain.checkpoint.dtensors import (
    check_dtensor,
    dtensor_from_local,
    dtensor_identity,
    is_dtensor,
    local_box,
    local_part,
    placement_text,
)
from disttrain.errors import CheckpointError


def test_any_ranks_load_the_tensors_that_other_ranks_saved(ranks: Ranks, tmp_path: Path) -> None:
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
    ranks(3, save_spread, tmp_path / "three", [4])  # some ranks have no part of the smallest tensor
    ranks(2, load_spread, tmp_path / "three")
    for world_size in (1, 2, 3):
        ranks(world_size, load_spread, tmp_path / "a")


def take_apart(backend: Backend) -> list[str]:
    """Check the part of every tensor against a slice of the whole one; return the placements as text."""
    mesh, texts = mesh_of(backend), []
    for name in SHAPES:
        expected = whole(name, 1)
        for placement in (Replicate(), *(Shard(dim) for dim in range(expected.ndim))):
            tensor = distribute_tensor(expected, mesh, [placement], src_data_rank=None)
            assert is_dtensor(tensor)
            sizes, offsets = local_box((mesh, [placement]), tuple(expected.shape))
            box = tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))
            assert same(local_part(tensor), expected[box])
            again = dtensor_from_local(expected[box], (mesh, [placement]), tuple(expected.shape))
            assert same(again.full_tensor(), expected)  # type: ignore[attr-defined]
            assert placement_text(again) == placement_text(tensor)
            texts.append(placement_text(tensor))
    return texts


def test_the_part_of_a_rank_is_a_box_of_the_whole_tensor(ranks: Ranks) -> None:
    first, second = ranks(2, take_apart)
    assert first == second
    assert len(set(first)) == 3  # replicated, and cut along either dimension


def compare_identities(backend: Backend) -> None:
    mesh = mesh_of(backend)
    tensor = distribute_tensor(whole("a", 1), mesh, [Shard(0)], src_data_rank=None)
    copy = distribute_tensor(whole("a", 1), mesh, [Shard(0)], src_data_rank=None)
    assert dtensor_identity(tensor) == dtensor_identity(tensor.detach())
    assert dtensor_identity(tensor) != dtensor_identity(copy)
    replicated = DTensor.from_local(torch.ones(2, 2), mesh, [Replicate()])
    as_shard = DTensor.from_local(local_part(replicated), mesh, [Shard(0)])  # the same memory, another tensor
    assert dtensor_identity(replicated) != dtensor_identity(as_shard)
    assert not is_dtensor(torch.ones(1))
    assert placement_text(torch.ones(1)) == ""
    for refused, reason in (
        (DTensor.from_local(torch.ones(2), mesh, [Partial()]), "here is a DTensor placed as P"),
        (DTensor.from_local(torch.ones(2, device="meta"), mesh, [Shard(0)]), "here is a DTensor on the meta device"),
    ):
        with pytest.raises(CheckpointError, match=reason):
            check_dtensor(refused, "here")
    kept = check_dtensor(tensor.requires_grad_(), "here")
    assert not kept.requires_grad
    assert dtensor_identity(kept) == dtensor_identity(tensor)


def test_a_tied_dtensor_is_recognized_and_an_unsuitable_one_refused(ranks: Ranks) -> None:
    ranks(2, compare_identities)
