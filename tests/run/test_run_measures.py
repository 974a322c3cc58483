"""The evaluation of a run has batches of the wanted size, and every metric is one of torchmetrics."""

from pathlib import Path
from typing import Any

import pytest
from small_run import points, small_run
from torch import nn
from torchmetrics import MeanSquaredError

from disttrain.errors import ConfigError
from disttrain.run.evaluation import Evaluation


@pytest.mark.parametrize("field", ["metrics", "train_metrics"])
def test_anything_else_than_a_metric_is_refused(tmp_path: Path, field: str) -> None:
    with pytest.raises(ConfigError, match=r"metric error: expected a function that returns a torchmetrics\.Metric"):
        small_run(tmp_path, **{field: {"error": nn.MSELoss}})


@pytest.mark.parametrize(("validate", "sizes"), [({}, [4, 4, 4]), ({"batch_size": 5}, [5, 5, 2])])
def test_a_batch_of_the_evaluation_is_a_slot_or_as_large_as_wanted(
    tmp_path: Path, validate: dict[str, Any], sizes: list[int]
) -> None:
    run = small_run(tmp_path, validate=validate, valid_data=lambda: points(12))
    assert isinstance(run.evaluation, Evaluation)
    assert [(len(x), run.evaluation.count(number, (x, y))) for number, (x, y) in run.evaluation.batches()] == [
        (size, size) for size in sizes
    ]


def test_without_metrics_of_the_training_data_none_are_built(tmp_path: Path) -> None:
    assert small_run(tmp_path).slot_results.metrics is None
    assert small_run(tmp_path, train_metrics={"error": MeanSquaredError}).slot_results.metrics is not None
