"""A state of DTensors as a model and an optimizer with shards have it, for the tests on several ranks."""

from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor

from disttrain.backend import Backend
from disttrain.checkpoint import AsynchronousSaver, save

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
        name: distribute_tensor(whole(name, step), mesh, [placement_of(name)], src_data_rank=None) for name in SHAPES
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
