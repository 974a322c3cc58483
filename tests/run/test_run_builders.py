"""The model, the optimizer and the schedule of a run: what their factories may return."""

from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import net, small_run
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from disttrain.errors import ConfigError


class SteppedByEpoch:
    def step(self, epoch: int) -> None: ...


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": torch.optim.LBFGS}, "optimizer: LBFGS.step needs closure"),
        ({"optimizer": lambda parameters: [torch.optim.SGD(parameters)]}, "got a list; return one optimizer over all"),
        (
            {"schedule": lambda optimizer, n: ReduceLROnPlateau(optimizer), "valid_data": None},
            "ReduceLROnPlateau.step needs metrics: a run gives it the monitored value after each evaluation, but there",
        ),
        ({"schedule": lambda optimizer, n: SteppedByEpoch()}, "SteppedByEpoch.step needs epoch"),
        ({"schedule": lambda optimizer, n: 0.1}, "expected a function that returns a schedule with step(), got 0.1"),
    ],
)
def test_an_optimizer_or_a_schedule_that_cannot_step_is_refused_before_the_first_step(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        small_run(tmp_path, **changes)
    assert message in str(caught.value)


@pytest.mark.parametrize("make", [lambda layer: layer, lambda layer: torch.nn.Sequential(torch.nn.Flatten(), layer)])
def test_a_model_of_torchscript_is_refused_with_fsdp_alone(tmp_path: Path, make: Any) -> None:
    changes = {"model": lambda: make(torch.jit.script(torch.nn.Linear(3, 1))), "optimizer": no_closure}
    assert small_run(tmp_path, **changes).optimizer is not None
    with pytest.raises(ConfigError, match=r"(the model|1) is compiled by torch.jit, which takes no hooks"):
        small_run(tmp_path, **changes, strategy="fsdp")


def no_closure(parameters: Any) -> Any:
    return torch.optim.SGD(parameters, lr=0.1)


SCHEDULES: list[Any] = [
    lambda optimizer, n: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n),
    lambda optimizer, n: ReduceLROnPlateau(optimizer),
    lambda optimizer, n: torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=n),
    lambda optimizer, n: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 3),
    lambda optimizer, n: torch.optim.lr_scheduler.SequentialLR(
        optimizer, [torch.optim.lr_scheduler.ConstantLR(optimizer), torch.optim.lr_scheduler.StepLR(optimizer, 2)], [4]
    ),
]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_torchs_schedules_are_accepted(tmp_path: Path, schedule: Any) -> None:
    assert small_run(tmp_path, optimizer=no_closure, schedule=schedule).schedule is not None


def test_threads_that_a_factory_sets_for_its_machine_do_not_count(tmp_path: Path) -> None:
    def greedy() -> nn.Module:
        torch.set_num_threads(before + 2)
        return net()

    before = torch.get_num_threads()
    try:
        small_run(tmp_path, model=greedy, cpu_threads=2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
