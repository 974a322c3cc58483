"""Saving, resuming and exporting fit into twice the memory of a rank's state: the state, and one copy of it.

The operating system refuses all private writable memory beyond that. A third copy would take twice the memory that is
left over for threads and pieces.
"""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from checkpoint_children import fork, wait
from ranks import Ranks
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from disttrain.backend import Backend
from disttrain.checkpoint import AsynchronousSaver, DirectorySaver, export, load_newest, save

MB = 2**20
NUM_TENSORS = 3
TENSOR_MB = 40
"""More than 32 MB, up to which glibc may keep freed memory."""
SHARD_MB = NUM_TENSORS * TENSOR_MB
SPARE_MB = 64
ROWS = TENSOR_MB * MB // 4 // 1024


def used_bytes() -> int:
    """Return the private writable memory of this process, which RLIMIT_DATA counts."""
    with open("/proc/self/status") as file:
        [line] = [line for line in file if line.startswith("VmData:")]
    return int(line.split()[1]) * 1024


@contextmanager
def limited(num_mb: int) -> Iterator[None]:
    """Refuse more than `num_mb` of memory beyond the memory that is in use now."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (used_bytes() + num_mb * MB, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def test_the_limit_refuses_memory() -> None:
    with limited(SHARD_MB), pytest.raises(RuntimeError, match="allocate memory"):
        torch.ones(2 * SHARD_MB * MB // 4)


def save_resume_and_export(root: Path) -> None:
    with limited(2 * SHARD_MB + SPARE_MB):
        model = {f"{i}.weight": torch.full((ROWS, 1024), float(i)) for i in range(NUM_TENSORS)}
        save(root, 1, {"model": model})
        with AsynchronousSaver(root) as saver:
            saver({"model": model}, "step-00000002", {})
            saver.settle()
        del saver
        found = load_newest(root)
        assert found is not None
        for name, tensor in model.items():
            tensor.copy_(found.state["model"][name])
        del found
        assert export(root / "step-00000002", root / "model.safetensors").num_tensors == NUM_TENSORS


def test_one_process_needs_twice_its_state(tmp_path: Path) -> None:
    assert wait(fork(lambda: save_resume_and_export(tmp_path))) == 0
    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as file:
        for i in range(NUM_TENSORS):
            assert file.get_tensor(f"{i}.weight")[-1, -1] == i


def save_and_resume(backend: Backend, root: Path) -> None:
    """Save and load on a rank that holds `SHARD_MB`; the whole state would not fit."""
    assert backend.process_group is not None
    mesh = DeviceMesh.from_group(backend.process_group, "cpu")
    DTensor.from_local(torch.ones(1), mesh, [Shard(0)])  # torch's imports for a DTensor do not count
    # Before the limit, because the first save imports DCP's planner, and the first load more of torch's DTensors.
    save(root, 1, {"t": DTensor.from_local(torch.ones(1), mesh, [Shard(0)])}, backend=backend)
    with limited(2 * SHARD_MB + SPARE_MB):
        local = [torch.full((ROWS, 1024), float(backend.rank + i)) for i in range(NUM_TENSORS)]
        model: dict[str, Any] = {f"{i}": DTensor.from_local(t, mesh, [Shard(0)]) for i, t in enumerate(local)}
        DirectorySaver(root, backend=backend)({"model": model}, "step-00000002", {})
        with AsynchronousSaver(root, backend=backend) as saver:
            saver({"model": model}, "step-00000003", {})
            saver.settle()
        del saver
        found = load_newest(root, backend, lambda path, shape: (mesh, [Shard(0)]))
        assert found is not None
        assert found.manifest.step == 3
        for i, tensor in enumerate(local):
            assert torch.equal(found.state["model"][f"{i}"].to_local(), tensor)


def test_of_several_ranks_each_needs_twice_its_shard(ranks: Ranks, tmp_path: Path) -> None:
    ranks(2, save_and_resume, tmp_path, timeout_s=120)
