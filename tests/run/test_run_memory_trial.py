"""The measured memory of a run: what its tensors have by arithmetic, and what a real process then occupies."""

import resource
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks
from small_run import console, single, small_config
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from disttrain.backend import Backend
from disttrain.config import Config
from disttrain.devices import DEVICE_TYPES, DeviceType
from disttrain.errors import ConfigError
from disttrain.handlers.preemption import Preemption
from disttrain.host_memory import resident_bytes
from disttrain.run.directory import RunDirectory
from disttrain.run.memory_trial import measure_memory
from disttrain.run.train import train

WIDTH, DEPTH, BATCH = 1024, 4, 64
TOLERANCE = 0.2
"""The share by which the table may differ from what a process occupies (docs/memory.md)."""

pytestmark = pytest.mark.usefixtures("torch_settings")


def wide() -> nn.Module:
    return nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(DEPTH)))


def rows(num_samples: int = 2 * BATCH) -> TensorDataset:
    x = torch.zeros(num_samples, WIDTH)
    return TensorDataset(x, x)


def wide_config(**changes: Any) -> Config:
    defaults: dict[str, Any] = {
        "model": wide,
        "train_data": rows,
        "valid_data": None,
        "optimizer": partial(torch.optim.AdamW, lr=1e-3),
        "global_batch_size": BATCH,
        "num_slots": 2,
    }
    return small_config(**(defaults | changes))


PARAMETERS = 4 * DEPTH * WIDTH * (WIDTH + 1)
LAYER = 4 * BATCH // 2 * WIDTH
"""The bytes of one output of a layer, of one of two slots."""


def test_activations_and_states_are_those_of_arithmetic_and_nothing_is_written(tmp_path: Path) -> None:
    table = measure_memory(wide_config(), single(), RunDirectory(tmp_path / "small"))
    assert table.rows["parameters"] == table.rows["gradients"] == PARAMETERS
    assert table.rows["states of AdamW"] == 2 * PARAMETERS + 4 * 2 * DEPTH  # and a count for each
    # Kept for the backward: the output of each Tanh, and the difference of the loss.
    assert table.activations == pytest.approx((DEPTH + 1) * LAYER, rel=0.3)
    known = 4 * PARAMETERS
    assert known < (table.peak or 0) < known + 2 * PARAMETERS
    assert list(tmp_path.iterdir()) == []


def test_activation_checkpointing_is_seen(tmp_path: Path) -> None:
    deep = partial(nn.Sequential, *[nn.Sequential(nn.Tanh(), nn.Sigmoid(), nn.Tanh()) for _ in range(6)])

    def net() -> nn.Module:
        return nn.Sequential(nn.Linear(WIDTH, WIDTH), deep())

    found = [
        measure_memory(wide_config(model=net, activation_checkpointing=chosen), single(), RunDirectory(tmp_path / "r"))
        for chosen in (False, True)
    ]
    assert (found[1].activations or 0) < 0.6 * (found[0].activations or 0)


def test_a_device_that_does_not_count_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DEVICE_TYPES, "cpu", DeviceType(is_lazy=True))
    with pytest.raises(ConfigError, match="--memory: expected the CPU or a device that counts its tensors, got cpu"):
        measure_memory(wide_config(), single(), RunDirectory(tmp_path / "small"))


def measured(backend: Backend, folder: str, changes: dict[str, Any]) -> dict[str, Any]:
    table = measure_memory(wide_config(**changes), backend, RunDirectory(Path(folder) / "small"))
    return {"rows": table.rows, "peak": table.peak, "ranks": table.num_sharing}


def test_a_rank_of_fsdp_has_its_part_and_in_a_step_the_whole(tmp_path: Path, ranks: Ranks) -> None:
    found = ranks(2, measured, str(tmp_path), {"strategy": "fsdp"}, timeout_s=120)[0]
    assert found["rows"]["parameters"] == PARAMETERS // 2
    assert found["rows"]["states of AdamW"] == pytest.approx(PARAMETERS, rel=0.01)
    assert found["rows"]["parameters, gathered in a step"] == PARAMETERS
    assert found["ranks"] == 2


@pytest.mark.slow
def test_a_gather_by_module_needs_less(tmp_path: Path, ranks: Ranks) -> None:
    by_step, by_module = (
        ranks(2, measured, str(tmp_path), {"strategy": "fsdp", "fsdp_gather": gather}, timeout_s=120)[0]
        for gather in ("step", "module")
    )
    assert by_module["rows"]["parameters, gathered in a step"] == PARAMETERS // 2  # two of the four layers
    assert by_module["peak"] < by_step["peak"]


LARGE: dict[str, Any] = {"max_steps": 4, "max_epochs": None, "checkpoint": {"asynchronous": False}}


def large_config() -> Config:
    return wide_config(model=partial(wider, 3072), train_data=partial(inputs, 3072), **LARGE)


def predicted(backend: Backend, folder: str) -> int:
    """Return the most bytes of tensors that the table says."""
    return measure_memory(large_config(), backend, RunDirectory(Path(folder) / "small")).peak or 0


def occupied(backend: Backend, folder: str) -> int:
    """Return the most memory that the process has occupied in a training, beside what it had before."""
    before = resident_bytes()
    with Preemption() as preemption:
        train(large_config(), backend, RunDirectory(Path(folder) / "small"), console(), preemption)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert before is not None
    return peak - before


def wider(width: int) -> nn.Module:
    return nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(DEPTH)))


def inputs(width: int) -> TensorDataset:
    x: Tensor = torch.zeros(2 * BATCH, width)
    return TensorDataset(x, x)


@pytest.mark.slow
def test_the_table_is_what_a_process_occupies_within_the_tolerance(tmp_path: Path, ranks: Ranks) -> None:
    [said, *_], [had, *_] = (ranks(2, each, str(tmp_path), timeout_s=300, fresh=True) for each in (predicted, occupied))
    print(said, had)  # shown when the test fails
    assert had == pytest.approx(said, rel=TOLERANCE)
