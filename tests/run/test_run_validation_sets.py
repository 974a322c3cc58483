"""Several validation sets are evaluated as if each were alone, in batches of any size, on any number of ranks."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks
from small_run import console, net, points, small_config, small_run, trained
from torch import nn
from torchmetrics import MeanMetric

from disttrain.backend import Backend
from disttrain.errors import ConfigError, DataError
from disttrain.handlers.preemption import Preemption
from disttrain.run.directory import RunDirectory
from disttrain.run.train import train
from disttrain.run.validation_sets import NamedSets, ValidationSets, named_sets


class MeanOutput(MeanMetric):
    """The mean of the model's outputs."""

    def update(self, y_pred: torch.Tensor, y: torch.Tensor) -> None:  # type: ignore[override]
        super().update(y_pred)


SETS = {"clean": partial(points, 12), "noisy": partial(points, 7)}
MEAN = {"mean": MeanOutput}


def evaluated(folder: Path, **changes: Any) -> dict[str, Any]:
    """Return the values of a new run's model."""
    evaluation = small_run(folder, **changes).evaluation
    assert evaluation is not None
    values = evaluation.run()
    assert values is not None
    return values


def by_hand(dataset: Any, batch_size: int) -> float:
    """Return the mean loss of a new run's model in eval mode, in a plain loop over batches."""
    folder = small_run(Path("unused")).model.eval()
    x, y = dataset.tensors
    with torch.no_grad():
        pairs = [
            (nn.MSELoss()(folder(x[i : i + batch_size]), y[i : i + batch_size]), len(x[i : i + batch_size]))
            for i in range(0, len(x), batch_size)
        ]
    return sum(float(loss) * count for loss, count in pairs) / len(x)


def test_each_set_has_the_values_that_it_has_alone(tmp_path: Path) -> None:
    values = evaluated(tmp_path, valid_data=SETS, metrics=MEAN)
    assert list(values) == ["clean/loss", "clean/mean", "noisy/loss", "noisy/mean"]
    for name, data in SETS.items():
        alone = evaluated(tmp_path, valid_data=data, metrics=MEAN)
        assert alone == {"loss": values[f"{name}/loss"], "mean": values[f"{name}/mean"]}


def test_the_loss_is_that_of_a_plain_loop_for_any_size_of_a_batch(tmp_path: Path) -> None:
    for name, data in SETS.items():
        # By default a batch is as large as a slot, 8 samples in 2 slots.
        assert evaluated(tmp_path, valid_data=SETS)[f"{name}/loss"] == by_hand(data(), 4)
        for size in (1, 5, 100):
            values = evaluated(tmp_path, valid_data=SETS, validate={"batch_size": size})
            assert values[f"{name}/loss"] == by_hand(data(), size)


def test_a_signal_during_one_set_means_that_nothing_is_evaluated(tmp_path: Path) -> None:
    evaluation = small_run(tmp_path, valid_data=SETS).evaluation
    assert isinstance(evaluation, ValidationSets)
    answers = iter([False] * 5 + [True] * 99)
    assert evaluation.run(lambda: next(answers)) is None


def test_the_best_is_that_of_the_set_that_is_named(tmp_path: Path) -> None:
    result = trained(tmp_path, valid_data=SETS, metrics=MEAN, checkpoint={"monitor": "noisy/loss"})
    lines = [json.loads(line) for line in (tmp_path / "small" / "metrics" / "valid.jsonl").read_text().splitlines()]
    assert [list(line) for line in lines] == [
        ["step", "epoch", "clean/loss", "clean/mean", "noisy/loss", "noisy/mean"]
    ] * 2
    best = min(lines, key=lambda line: line["noisy/loss"])
    assert (result["best"]["step"], result["best"]["value"]) == (best["step"], best["noisy/loss"])
    assert result["metrics"]["noisy/loss"] == lines[-1]["noisy/loss"]


def test_a_metric_of_a_set_knows_whether_higher_is_better(tmp_path: Path) -> None:
    class Higher(MeanOutput):
        higher_is_better = True

    run = small_run(tmp_path, valid_data=SETS, metrics={"mean": Higher}, checkpoint={"monitor": "clean/mean"})
    assert run.best is not None
    assert run.best.mode == "max"


def test_a_schedule_that_follows_values_needs_the_name_of_one(tmp_path: Path) -> None:
    def plateau(optimizer: torch.optim.Optimizer, total_steps: int) -> Any:
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=10.0)

    with pytest.raises(ConfigError, match=r"name it, such as schedule_monitor=clean/loss"):
        small_run(tmp_path, valid_data=SETS, schedule=plateau)
    changes = {"valid_data": SETS, "schedule": plateau, "max_epochs": 3}
    trained(tmp_path / "whole", **changes, checkpoint={"monitor": "noisy/loss"})
    lines = (tmp_path / "whole" / "small" / "metrics" / "train.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["learning_rate"] < 0.1


def test_mistakes_in_the_data_name_the_set(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"valid_data\.noisy raised ZeroDivisionError"):
        small_run(tmp_path, valid_data={"clean": points, "noisy": lambda: 1 / 0})


def test_the_samples_of_each_set_are_compared(tmp_path: Path) -> None:
    assert named_sets(None) == {}
    assert named_sets("data") == {"valid_data": "data"}
    assert named_sets(NamedSets(a=1)) == {"valid_data.a": 1}
    size = [7]

    def noisy() -> Any:
        return points(size[0])

    trained(tmp_path, max_epochs=1, valid_data={**SETS, "noisy": noisy})
    size[0] = 6
    with pytest.raises(DataError, match=r"valid_data\.noisy\[0\] was .* restore it"):
        trained(tmp_path, max_epochs=2, valid_data={**SETS, "noisy": noisy})


def live(backend: Backend, folder: Path, steps: int) -> None:
    config = small_config(
        model=net,
        valid_data=SETS,
        validate={"every_steps": 1, "batch_size": 3},
        num_slots=4,
        max_epochs=None,
        max_steps=steps,
    )
    with Preemption() as preemption:
        train(config, backend, RunDirectory(folder / "small"), console(), preemption)


def test_killed_and_resized_the_curves_are_the_same(tmp_path: Path, ranks: Ranks) -> None:
    changes = {"valid_data": SETS, "validate": {"every_steps": 1, "batch_size": 3}, "num_slots": 4}
    trained(tmp_path / "whole", **changes, max_epochs=None, max_steps=6)
    ranks(3, live, tmp_path, 3)
    ranks(2, live, tmp_path, 6)
    curves = [(folder / "small" / "metrics" / "valid.jsonl").read_text() for folder in (tmp_path, tmp_path / "whole")]
    assert curves[0] == curves[1]
