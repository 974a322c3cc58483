"""A part whose restored state differs from the saved one is named, whatever differs; an equal one is accepted."""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import console, printed, trained
from torch import nn

from disttrain.engine import Engine
from disttrain.errors import CheckpointError
from disttrain.run.restored import check_restored, state_difference
from disttrain.run.state import Run

STATE = {
    "weight": torch.tensor([1.0, -0.0, math.nan]),
    "counts": [1, (2.5, None), {"deep": torch.arange(3)}],
    "name": "adam",
    "rate": math.nan,
}


@pytest.mark.parametrize("same", [STATE, {**STATE, "added": 1}])
def test_the_same_state_and_one_with_more_are_accepted(same: dict[str, Any]) -> None:
    assert state_difference(STATE, same, "model") is None


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ({"weight": torch.tensor([1.0, 0.0, math.nan])}, "model.weight"),  # the sign of a zero
        ({"weight": torch.tensor([1.0, -0.0, 2.0])}, "model.weight"),
        ({"weight": torch.tensor([1.0, -0.0, math.nan], dtype=torch.float64)}, "model.weight"),
        ({"weight": torch.tensor([[1.0, -0.0, math.nan]])}, "model.weight"),
        ({"weight": [1.0, -0.0, math.nan]}, "model.weight"),
        ({"counts": [1, (2.5, None), {"deep": torch.tensor([0, 1, 3])}]}, "model.counts.2.deep"),
        ({"counts": [1, (2.5, 0), {"deep": torch.arange(3)}]}, "model.counts.1.1"),
        ({"counts": [1]}, "model.counts"),
        ({"name": "sgd"}, "model.name"),
        ({"rate": 0.5}, "model.rate"),
        ({"counts": [1.0, (2.5, None), {"deep": torch.arange(3)}]}, "model.counts.0"),
    ],
)
def test_the_first_difference_is_named(change: dict[str, Any], path: str) -> None:
    difference = state_difference(STATE, {**STATE, **change}, "model")
    assert difference is not None
    assert difference[0] == path


def test_a_missing_value_is_named() -> None:
    assert state_difference({"a": 1}, {}, "kept.ema") == ("kept.ema.a", "int 1", "nothing")


def test_two_tensors_of_one_shape_are_shown_with_their_values() -> None:
    class Rounding(nn.Linear):
        def state_dict(self, *args: Any, **kwargs: Any) -> Any:
            return {"weight": torch.tensor([0.25])}

    with pytest.raises(CheckpointError, match=r"expected float32 \[1\] \[0.5\].*got float32 \[1\] \[0.25\].*Rounding"):
        check_restored("model", {"weight": torch.tensor([0.5])}, Rounding(1, 1))


class Halved:
    """An object that rounds its state when it loads it."""

    def __init__(self) -> None:
        self.value = torch.full((2,), 1 / 3)

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"].half().float()


def test_a_run_does_not_resume_with_a_rounded_state(tmp_path: Path) -> None:
    def keeps(trainer: Engine, run: Run) -> None:
        run.keep("halved", Halved())

    trained(tmp_path, max_epochs=1, handlers=[keeps])
    with pytest.raises(CheckpointError, match=r"^kept\.halved\.value was not restored as it was saved"):
        trained(tmp_path, max_epochs=2, handlers=[keeps])


def test_every_part_of_a_small_run_is_accepted(tmp_path: Path) -> None:
    def schedule(optimizer: Any, total_steps: int) -> Any:
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=100)

    changes: dict[str, Any] = {"schedule": schedule, "precision": "fp16", "max_epochs": None}
    trained(tmp_path, max_steps=6, checkpoint={"every_steps": 2}, **changes)
    shutil.rmtree(tmp_path / "small" / "checkpoints" / "step-00000006")
    to = console()
    result = trained(tmp_path, to, max_steps=6, **changes)
    assert "resuming from step 4" in printed(to)
    assert result["step"] == 6
