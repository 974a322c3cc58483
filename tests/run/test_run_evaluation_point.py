"""The two points of a schedule-free optimizer, over a real one."""

import runpy
from pathlib import Path
from typing import Any

import torch
from small_run import trained
from torch import Tensor, nn

from disttrain.checkpoint import load
from disttrain.run.evaluation_point import EvaluationPoint, begin_training, evaluating, has_two_points

MATRIX = Path(__file__).parent.parent / "integration" / "matrix"


def schedule_free(parameters: Any) -> Any:
    return runpy.run_path(str(MATRIX / "schedule_free.py"))["ScheduleFreeSGD"](parameters, lr=0.2)


class Averages:
    """x by its definition: the mean of the z of all steps, in float64."""

    def __init__(self, weight: Tensor) -> None:
        self.z = self.y = weight.detach().double()
        self.seen: list[Tensor] = []

    def step(self, gradient: Tensor, lr: float = 0.2, beta: float = 0.9) -> None:
        self.z = self.z - lr * gradient.double()
        self.seen.append(self.z)
        self.y = (1 - beta) * self.z + beta * self.x

    @property
    def x(self) -> Tensor:
        return torch.stack(self.seen).mean(0)


def test_a_checkpoint_gets_the_evaluation_point_and_the_training_point_keeps_its_bits() -> None:
    torch.manual_seed(1)
    model = nn.Linear(30, 20)
    optimizer = schedule_free(model.parameters())
    begin_training(optimizer)
    point, averages = EvaluationPoint(model, optimizer), Averages(model.weight)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(5, 30)).square().sum().mul(0.05).backward()
        averages.step(model.weight.grad)  # type: ignore[arg-type]
        optimizer.step()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    saved = point.state_dict()
    assert list(saved) == ["weight", "bias"]
    torch.testing.assert_close(saved["weight"].double(), averages.x, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(before[0].double(), averages.y, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert optimizer.param_groups[0]["train_mode"]
    optimizer.eval()
    optimizer.train()
    assert not all(
        torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)
    )  # the switch alone rounds


def test_parameters_that_only_the_optimizer_has_keep_their_bits_too() -> None:
    model, loss = nn.Linear(1, 1), nn.Linear(40, 1)
    optimizer = schedule_free([*model.parameters(), *loss.parameters()])
    begin_training(optimizer)
    loss(torch.ones(1, 40)).sum().backward()
    optimizer.step()
    optimizer.step()
    before = loss.weight.detach().clone()
    with evaluating(optimizer, model):
        assert not torch.equal(loss.weight, before)
    assert torch.equal(loss.weight, before)


def test_tied_weights_have_both_names_and_frozen_ones_none() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 1).requires_grad_(False))
    model[1].weight = model[0].weight
    saved = EvaluationPoint(model, schedule_free(model.parameters())).state_dict()
    assert list(saved) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert saved["0.weight"] is saved["1.weight"]


def test_other_optimizers_have_one_point(tmp_path: Path) -> None:
    assert not has_two_points(torch.optim.SGD(nn.Linear(1, 1).parameters()))
    trained(tmp_path, max_epochs=1)
    assert "evaluation_point" not in load(tmp_path / "small" / "checkpoints" / "step-00000004").state


def test_a_run_in_two_parts_has_the_bits_of_the_whole(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole", optimizer=schedule_free)
    trained(tmp_path / "parts", optimizer=schedule_free, max_epochs=1)
    parts = trained(tmp_path / "parts", optimizer=schedule_free)
    assert (parts["params_sha256"], parts["metrics"]) == (whole["params_sha256"], whole["metrics"])
