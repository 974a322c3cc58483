"""The checks for every backend, tests/backend/test_conformance.py, on 1, 2 and 4 real XLA replicas."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from replicas import Replicas

sys.path.append(str(Path(__file__).parents[1] / "backend"))
from test_conformance import *  # noqa: F403 - every test of it runs with the fixtures below

from disttrain.backend import Backend

Run = Callable[..., list[Any]]


@pytest.fixture(params=["xla-1", "xla-2", "xla-4"])
def world(request: pytest.FixtureRequest, replicas: Replicas) -> Run:
    size = int(request.param.partition("-")[2])
    return lambda function, *args: replicas(size, function, *args)


@pytest.fixture
def ranks(replicas: Replicas) -> Replicas:
    return replicas


def gather_on_the_device(backend: Backend) -> list[Any]:
    """Gather, reduce and broadcast tensors that are on the device."""
    value = torch.tensor([1.5, -0.0, float("nan"), 2.0**-149]) * (backend.rank + 1)
    on_device = value.to(backend.device)
    results = [
        backend.all_gather(on_device),
        backend.all_reduce(on_device),
        backend.broadcast(on_device, backend.world_size - 1),
        backend.broadcast(on_device if backend.rank == 0 else None),
    ]
    assert all(result.device == backend.device for result in results)
    return [result.cpu() for result in results]


def test_tensors_on_the_device_are_gathered_by_xla(world: Run) -> None:
    by_rank = world(gather_on_the_device)
    size = len(by_rank)
    inputs = torch.stack([torch.tensor([1.5, -0.0, float("nan"), 2.0**-149]) * (rank + 1) for rank in range(size)])
    for gathered, reduced, from_last, from_first in by_rank:
        assert gathered.view(torch.int32).tolist() == inputs.view(torch.int32).tolist()
        assert reduced[0] == inputs[:, 0].sum()
        assert from_last.view(torch.int32).tolist() == inputs[-1].view(torch.int32).tolist()
        assert from_first.view(torch.int32).tolist() == inputs[0].view(torch.int32).tolist()


def collectives_compile(backend: Backend) -> int:
    """Return the number of programs that collectives of host data compile."""
    before = backend.programs()
    backend.barrier()
    backend.all_reduce(backend.rank)
    backend.all_gather({"rank": backend.rank})
    backend.all_reduce(torch.ones(7))
    backend.broadcast("text")
    assert before is not None
    return backend.programs().num_compiled - before.num_compiled  # type: ignore[union-attr]


def test_values_on_the_host_compile_nothing(world: Run) -> None:
    assert set(world(collectives_compile)) == {0}
