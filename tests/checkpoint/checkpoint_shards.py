"""A state of DTensors, like that of a sharded model and its optimizer, for the tests on several ranks."""

from pathlib import Path
from typing import Any

import torch
from checkpoint_states import same
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from disttrain.backend import Backend
from disttrain.checkpoint import AsynchronousSaver, load_newest, save

SHAPES = {"a": (7, 3), "b": (2, 5), "c": (9,), "d": (0, 4), "e": (6, 8)}


def whole(name: str, step: int) -> torch.Tensor:
    """Return all values of the tensor `name` at `step`."""
    size = torch.Size(SHAPES[name]).numel()
    return torch.arange(size, dtype=torch.float32).reshape(SHAPES[name]) * 10 + step


def mesh_of(backend: Backend) -> DeviceMesh:
    assert backend.process_group is not None
    return DeviceMesh.from_group(backend.process_group, "cpu")


def placement_of(name: str) -> Placement:
    return {"c": Replicate(), "e": Shard(1)}.get(name, Shard(0))


def spread(backend: Backend, step: int) -> dict[str, Any]:
    """Return a state of DTensors, two of them tied, and of whole tensors."""
    mesh = mesh_of(backend)
    model: dict[str, torch.Tensor] = {
        name: distribute_tensor(whole(name, step), mesh, [placement_of(name)], src_data_rank=None) for name in SHAPES
    }
    model["tied"] = model["a"].detach()
    return {"model": model, "optimizer": {0: {"step": torch.tensor(step), "exp_avg": model["b"] * 1}}, "lr": step / 7}


def plain(step: int) -> dict[str, Any]:
    """Return the same state with all tensors whole."""
    model = {name: whole(name, step) for name in SHAPES} | {"tied": whole("a", step)}
    return {"model": model, "optimizer": {0: {"step": torch.tensor(step), "exp_avg": whole("b", step)}}, "lr": step / 7}


def save_spread(backend: Backend, root: Path, steps: list[int], asynchronous: bool = False) -> None:
    """Save the state of `spread` at each of `steps`."""
    if not asynchronous:
        for step in steps:
            save(root, step, spread(backend, step), backend=backend)
        return
    with AsynchronousSaver(root, backend=backend) as saver:
        for step in steps:
            saver(spread(backend, step), f"step-{step:08d}", {})
            saver.poll()
        saver.settle()


def load_spread(backend: Backend, root: Path | str) -> None:
    """Load the newest checkpoint in three ways, and check it: whole, cut as it was, cut otherwise."""
    found = load_newest(root, backend)
    assert found is not None
    assert same(found.state, plain(found.manifest.step))
    assert found.state["model"]["tied"] is found.state["model"]["a"]
    mesh, shapes = mesh_of(backend), {}
    for dim in (0, 1):

        def sharded(path: str, shape: tuple[int, ...], cut_dim: int = dim) -> Any:
            shapes[path] = shape
            if not path.startswith("model.") or path == "model.d":
                return None
            return mesh, [Shard(cut_dim % len(shape))]

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
    assert set(shapes) == {f"model.{name}" for name in (*SHAPES, "tied")} | {"optimizer.0.step", "optimizer.0.exp_avg"}
