"""Values beside the loss in whole runs: those of a plain loop, with the same bits on any ranks and after any kill."""

import io
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset
from torchmetrics import MeanAbsoluteError, MeanSquaredError, MetricCollection, R2Score

from disttrain import Config, Events
from disttrain.backend.base import Backend
from disttrain.data import IndexShuffle
from disttrain.errors import ConfigError
from disttrain.handlers.preemption import Preemption
from disttrain.run.directory import RunDirectory
from disttrain.run.train import train
from disttrain.seeding import manual_seed, seed_for

NUM_SAMPLES, BATCH, NUM_STEPS = 32, 8, 7


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.scale = nn.Linear(3, 1), nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.body(x)


def points(num_samples: int) -> Dataset[Any]:
    x = torch.randn(num_samples, 3, generator=torch.Generator().manual_seed(num_samples), dtype=torch.float64)
    return TensorDataset(x, x.sum(1, keepdim=True))


def with_values(model: Any, batch: Any) -> Any:
    x, y = batch
    y_pred = model(x)
    mse = (y_pred - y).pow(2).mean()
    penalty = model.body.weight.pow(2).sum()
    high = y > 0
    values = {
        "mse": mse,
        "penalty": penalty,
        "high": ((y_pred - y)[high].abs().sum(), high.sum()),
        "scale": model.scale,  # which the optimizer changes in place, before the values are fetched
    }
    return mse + 0.1 * penalty, (y_pred, y), values


def config(**changes: Any) -> Config:
    usual: dict[str, Any] = {
        "name": "values",
        "seed": 3,
        "model": lambda: Net().double(),
        "train_data": partial(points, NUM_SAMPLES),
        "valid_data": partial(points, 11),
        "forward": with_values,
        "optimizer": partial(torch.optim.SGD, lr=0.05, momentum=0.9),
        "global_batch_size": BATCH,
        "num_slots": 4,
        "max_steps": NUM_STEPS,
        "log": {"every_steps": 3},
    }
    return Config(**(usual | changes))


def lives(backend: Backend, folder: str, changes: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str], str]:
    """Train in `folder`; return the result, the curves, and what was printed."""
    directory, console = RunDirectory(Path(folder)), Console(file=io.StringIO(), width=200)
    with Preemption() as preemption:
        result = train(config(**changes), backend, directory, console, preemption)
    curves = {path.name: path.read_text() for path in sorted(directory.metrics.glob("*.jsonl"))}
    assert isinstance(console.file, io.StringIO)
    return result, curves, console.file.getvalue()


def by_hand(grad_clip_norm: float = math.inf) -> tuple[list[dict[str, float]], dict[str, float]]:
    """Train by whole global batches; return the values of each step and those of the validation data at the end."""
    manual_seed(seed_for(3, "init"))
    model = config().model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    x, y = points(NUM_SAMPLES)[:]
    steps: list[dict[str, float]] = []
    for epoch in range(2):
        for batch in torch.tensor(list(IndexShuffle(NUM_SAMPLES, key=seed_for(3, "order", epoch)))).split(BATCH):
            if len(steps) < NUM_STEPS:
                optimizer.zero_grad()
                loss, _, values = with_values(model, (x[batch], y[batch]))
                steps.append(numbers(values))
                loss.backward()
                norm = nn.utils.clip_grad_norm_(model.parameters(), grad_clip_norm)
                steps[-1]["grad_norm"] = norm.item()
                optimizer.step()
    return steps, numbers(with_values(model, points(11)[:])[2])


def numbers(values: dict[str, Any]) -> dict[str, float]:
    return {name: (v[0] / v[1] if isinstance(v, tuple) else v).item() for name, v in values.items()}


def test_the_values_are_those_of_a_loop_over_global_batches(ranks: Ranks, tmp_path: Path) -> None:
    _, curves, _ = ranks(1, lives, str(tmp_path / "one"), {})[0]
    lines = [json.loads(line) for line in curves["train.jsonl"].splitlines()]
    steps, validation = by_hand()
    assert [{name: line[name] for name in steps[0]} for line in lines] == [
        {name: pytest.approx(value, rel=1e-9) for name, value in step.items()} for step in steps
    ]
    last = json.loads(curves["valid.jsonl"].splitlines()[-1])
    assert {name: last[name] for name in validation} == {
        name: pytest.approx(value, rel=1e-9) for name, value in validation.items()
    }


@pytest.mark.parametrize("limit", [None, 0.5])
def test_the_norm_is_that_of_the_gradient_before_clipping(ranks: Ranks, tmp_path: Path, limit: float | None) -> None:
    norms = []
    for strategy in ("ddp", "fsdp"):
        changes = {"strategy": strategy, "grad_clip_norm": limit}
        result, curves, _ = ranks(2, lives, str(tmp_path / strategy), changes)[0]
        norms.append([json.loads(line)["grad_norm"] for line in curves["train.jsonl"].splitlines()])
        assert result["train"]["grad_norm"] == norms[-1][-1]
    steps, _ = by_hand(math.inf if limit is None else limit)
    assert norms[0] == norms[1] == [pytest.approx(step["grad_norm"], rel=1e-9) for step in steps]
    assert max(norms[0]) > 0.5


def test_progress_and_the_result_have_the_values(ranks: Ranks, tmp_path: Path) -> None:
    changes = {"log": {"every_steps": 2, "every_s": 1e-6}, "max_steps": 4}
    result, curves, shown = ranks(2, lives, str(tmp_path / "shown"), changes)[0]
    line = json.loads(curves["train.jsonl"].splitlines()[-1])
    written = json.loads((tmp_path / "shown" / "result.json").read_text())["train"]
    assert written == result["train"] == {name: line[name] for name in line if name not in ("step", "epoch")}
    assert list(written) == ["loss", "grad_norm", "learning_rate", "mse", "penalty", "high", "scale"]
    second = json.loads(curves["train.jsonl"].splitlines()[1])
    assert f"mse {second['mse']:.4g}  penalty {second['penalty']:.4g}" in shown
    again, _, _ = ranks(1, lives, str(tmp_path / "shown"), changes)[0]  # which has no step to do
    assert again["train"] == written


def without_parameters(model: Any, batch: Any) -> Any:
    x, y = batch
    loss = (model(x) - y).pow(2).mean()
    return loss, None, {"mse": loss}


def test_a_model_that_is_gathered_by_module_has_values(ranks: Ranks, tmp_path: Path) -> None:
    by_module = {"strategy": "fsdp", "fsdp_gather": "module", "num_slots": 2, "max_steps": 3}
    _, curves, _ = ranks(2, lives, str(tmp_path / "right"), by_module | {"forward": without_parameters})[0]
    for line in map(json.loads, curves["train.jsonl"].splitlines()):
        assert line["mse"] == line["loss"]


def test_ranks_kills_and_fsdp_change_no_bit(ranks: Ranks, tmp_path: Path) -> None:
    whole, curves, _ = ranks(1, lives, str(tmp_path / "whole"), {})[0]
    for strategy in ("ddp", "fsdp"):
        place = str(tmp_path / strategy)
        ranks(3, lives, place, {"strategy": strategy, "max_steps": 5})
        resumed, its_curves, _ = ranks(2, lives, place, {"strategy": strategy})[0]
        assert resumed["params_sha256"] == whole["params_sha256"]
        assert its_curves["train.jsonl"] == curves["train.jsonl"]


class Killed(Exception):
    """Ends a life as SIGKILL would."""


def killed_at_6(trainer: Any, run: Any) -> None:
    @trainer.on(Events.ITERATION_COMPLETED(once=6))
    def kill() -> None:
        raise Killed


def several() -> MetricCollection:
    return MetricCollection([MeanAbsoluteError(), R2Score()])


OTHER: dict[str, Any] = {"train_metrics": {"largest": MeanAbsoluteError}}
MEASURED: dict[str, Any] = {
    "train_metrics": {"error": MeanSquaredError, "all": several},
    "checkpoint": {"every_steps": 1},
    "valid_data": None,
}


def test_train_metrics_are_over_the_steps_of_a_window(ranks: Ranks, tmp_path: Path) -> None:
    result, curves, _ = ranks(1, lives, str(tmp_path / "one"), MEASURED)[0]
    lines = [json.loads(line) for line in curves["train.jsonl"].splitlines()]
    mse = [line["mse"] for line in lines]
    windows = {3: mse[:3], 4: mse[3:4], 6: mse[4:6], 7: mse[6:]}  # an epoch has 4 steps, and the run 7
    found = {line["step"]: line["error"] for line in lines if "error" in line}
    assert found == {step: pytest.approx(sum(of) / len(of), rel=1e-6) for step, of in windows.items()}
    assert set(lines[2]["all"]) == {"MeanAbsoluteError", "R2Score"}
    assert result["train"]["error"] == found[7]


def test_train_metrics_have_the_same_bits_whatever_kills_and_ranks(ranks: Ranks, tmp_path: Path) -> None:
    whole, curves, _ = ranks(1, lives, str(tmp_path / "whole"), MEASURED)[0]
    for strategy, asynchronous in (("ddp", False), ("fsdp", True)):
        checkpoint = {"every_steps": 1, "asynchronous": asynchronous}
        place, changes = str(tmp_path / strategy), MEASURED | {"strategy": strategy, "checkpoint": checkpoint}
        killed = ranks.outcomes(3, lives, place, changes | {"handlers": [killed_at_6]})
        assert all("Killed" in outcome.text for outcome in killed)
        resumed, its_curves, _ = ranks(2, lives, place, changes)[0]
        assert its_curves == curves
        assert resumed["params_sha256"] == whole["params_sha256"]
        assert resumed["train"] == whole["train"]


def test_metrics_may_be_added_taken_away_and_changed_between_launches(ranks: Ranks, tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = []
    for max_steps, changes in ((2, {}), (5, MEASURED), (6, MEASURED | OTHER), (7, {})):
        _, curves, _ = ranks(1, lives, str(tmp_path / "one"), changes | {"max_steps": max_steps, "valid_data": None})[0]
        lines = [json.loads(line) for line in curves["train.jsonl"].splitlines()]
    assert [sorted({"error", "largest"} & line.keys()) for line in lines] == [
        [],
        [],
        ["error"],
        ["error"],
        ["error"],
        ["largest"],
        [],
    ]
    assert lines[2]["error"] == pytest.approx(lines[2]["mse"])  # of the steps since they were added


def test_outputs_of_none_are_refused_where_metrics_need_them(ranks: Ranks, tmp_path: Path) -> None:
    (outcome,) = ranks.outcomes(1, lives, str(tmp_path / "none"), MEASURED | {"forward": without_parameters})
    assert isinstance(outcome.error, ConfigError)
    assert "train_metrics: expected outputs of the forward" in str(outcome.error)
