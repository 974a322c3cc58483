"""A mistake of the user's code in a run becomes one line with its place; a defect of ours keeps its traceback."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import net, small_config, trained
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from disttrain.engine import Engine, Events
from disttrain.errors import CodeError
from disttrain.run.code_errors import explained


class Slips(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = net()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).nonsense  # type: ignore[no-any-return]


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = net()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.body(x), x


def classes(num_classes: int) -> Dataset[tuple[Tensor, ...]]:
    return TensorDataset(torch.zeros(16, 3), torch.full((16,), num_classes - 1))


def doubles() -> Dataset[tuple[Tensor, ...]]:
    return TensorDataset(torch.zeros(16, 3, dtype=torch.float64), torch.zeros(16, 1))


def handler(trainer: Engine, run: Any) -> None:
    def looks(engine: Engine) -> None:
        raise KeyError("learning_rate")

    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), looks)


def constant(model: nn.Module, batch: Any) -> tuple[Tensor, None]:
    return model(batch[0]).mean().detach(), None


CASES: list[tuple[dict[str, Any], str]] = [
    ({"model": Slips}, r"^\S+code_errors.py:\d+ in forward: AttributeError: .* 'nonsense'$"),
    ({"model": Two}, r"^loss: TypeError|^loss: AttributeError.*the loss takes one tensor: let the model return one"),
    (
        {"model": lambda: nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.ReLU(), nn.Linear(5, 1)))},
        r"^model \(\S+code_errors.py:\d+\), in its module 1\.1 \(Linear\): RuntimeError: mat1 and mat2 shapes",
    ),
    (
        {"train_data": doubles},
        r"in its module 0 \(Linear\): RuntimeError: .*; give the samples and the model one dtype",
    ),
    (
        {"train_data": partial(classes, 4), "loss": nn.CrossEntropyLoss(), "model": lambda: nn.Linear(3, 3)},
        r"^loss: IndexError: Target 3 .*y_pred, float32\[4, 3\].*; classes count from 0, so the model needs one more",
    ),
    (
        {"train_data": partial(classes, 4), "loss": nn.functional.cross_entropy, "model": lambda: nn.Linear(3, 3)},
        r"^loss: IndexError: Target 3 ",
    ),
    (
        {
            "train_data": partial(classes, 3),
            "loss": nn.CrossEntropyLoss(),
            "model": lambda: nn.Linear(3, 3),
            "valid_data": partial(classes, 3),
            "metrics": {"accuracy": partial(MulticlassAccuracy, num_classes=2)},
        },
        r"^metrics: ValueError: .*number of classes",
    ),
    ({"handlers": [handler]}, r"^\S+code_errors.py:\d+ in looks: KeyError: 'learning_rate'$"),
    (
        {"loss": None, "forward": constant},
        r"^the backward of forward \(.*\): RuntimeError: element 0 .*; compute the loss from parameters",
    ),
]


def error_of(folder: Path, **changes: Any) -> Exception:
    with pytest.raises(Exception) as caught:
        trained(folder, **changes)
    return caught.value


@pytest.mark.parametrize(("changes", "message"), CASES)
def test_a_mistake_is_explained_in_one_line(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    changes = {"valid_data": None, **changes}
    error = error_of(tmp_path, **changes)
    found = explained(error, small_config(**changes))
    assert type(found) is CodeError, repr(found)
    assert re.search(message, str(found)), str(found)
    assert "\n" not in str(found)
    assert found.__cause__ is error


def test_what_may_pass_or_is_ours_stays_as_it_is(tmp_path: Path) -> None:
    class Reads(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ConnectionResetError("the feature store is away")

    lost = error_of(tmp_path, model=Reads, optimizer=lambda parameters: torch.optim.SGD(net().parameters(), 0.1))
    assert explained(lost, small_config()) is lost
    ours = TypeError("raised by no line of the user and by no part of the config")
    assert explained(ours, small_config()) is ours
    told = CodeError("told already")
    assert explained(told, small_config()) is told
