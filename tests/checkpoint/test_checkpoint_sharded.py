"""Checkpoints that several ranks write together: DTensors and whole tensors, loaded by any other world."""

import os
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from checkpoint_states import same
from ranks import Ranks
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from disttrain.backend import Backend
from disttrain.checkpoint import (
    AsynchronousSaver,
    load,
    load_newest,
    save,
    survey,
)

SHAPES = {"a": (7, 3), "b": (2, 5), "c": (9,), "d": (0, 4), "e": (6, 8)}


def whole(name: str, step: int) -> torch.Tensor:
    size = torch.Size(SHAPES[name]).numel()
    return torch.arange(size, dtype=torch.float32).reshape(SHAPES[name]) * 10 + step


def mesh_of(backend: Backend) -> DeviceMesh:
    assert backend.process_group is not None
    return DeviceMesh.from_group(backend.process_group, "cpu")


def placement_of(name: str) -> Placement:
    return {"c": Replicate(), "e": Shard(1)}.get(name, Shard(0))


def spread(backend: Backend, step: int) -> dict[str, Any]:
    """Return a state of DTensors, some tied, and whole tensors, as a model and an optimizer with shards have them."""
    mesh = mesh_of(backend)
    model: dict[str, torch.Tensor] = {
        name: distribute_tensor(whole(name, step), mesh, [placement_of(name)]) for name in SHAPES
    }
    model["tied"] = model["a"].detach()
    return {"model": model, "optimizer": {0: {"step": torch.tensor(step), "exp_avg": model["b"] * 1}}, "lr": step / 7}


def plain(step: int) -> dict[str, Any]:
    """Return the same state with all tensors whole."""
    model = {name: whole(name, step) for name in SHAPES} | {"tied": whole("a", step)}
    return {"model": model, "optimizer": {0: {"step": torch.tensor(step), "exp_avg": whole("b", step)}}, "lr": step / 7}


def save_spread(backend: Backend, root: Path, steps: list[int], asynchronous: bool = False) -> None:
    if not asynchronous:
        for step in steps:
            save(root, step, spread(backend, step), backend=backend)
        return
    with AsynchronousSaver(root, backend=backend) as saver:
        for step in steps:
            saver(spread(backend, step), f"step-{step:08d}", {})
            saver.poll()
        saver.settle()


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


@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_some_ranks_save_any_others_load(ranks: Ranks, tmp_path: Path, asynchronous: bool) -> None:
    ranks(2, save_spread, tmp_path, [1, 2], asynchronous)
    path = tmp_path / "step-00000002"
    names = ["MANIFEST.json", "SHA256SUMS", "tensors-00001-of-00002.safetensors", "tensors-00002-of-00002.safetensors"]
    assert sorted(os.listdir(path)) == names
    assert [entry.state for entry in survey(tmp_path)] == ["good", "good"]
    assert same(load(path).state, plain(2))
    for name in names[2:]:
        with safetensors.safe_open(path / name, "pt") as file:
            assert "model.a" in file.keys()  # noqa: SIM118 - no mapping
    for world_size in (1, 2, 3):
        ranks(world_size, load_spread, tmp_path)
