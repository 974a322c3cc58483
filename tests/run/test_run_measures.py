"""The evaluation of a run has batches of the wanted size, and every metric is one of torchmetrics."""

from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import points, small_run
from torch import Tensor, nn
from torch.utils.data import default_collate
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


def doubled(samples: list[Any]) -> list[Tensor]:
    return [2 * part for part in default_collate(samples)]


@pytest.mark.parametrize("weight", [None, lambda batch: len(batch[0])])
def test_the_batches_of_an_evaluation_may_have_a_collate_of_their_own(tmp_path: Path, weight: Any) -> None:
    changes = {"weight": weight, "train_data": lambda: points(12), "valid_data": lambda: points(12)}

    def first(run: Any) -> tuple[Tensor, Tensor]:
        trained, evaluated = next(iter(run.loader))[0], next(iter(run.evaluation.batches()))[1]
        return tuple(each.batch[0] if weight else each[0] for each in (trained, evaluated))  # type: ignore[return-value]

    plain = first(small_run(tmp_path, **changes))
    one = first(small_run(tmp_path, **changes, collate=doubled, validate={"collate": default_collate}))
    both = first(small_run(tmp_path, **changes, collate=doubled))
    assert [torch.equal(a, b) for a, b in zip(one, (2 * plain[0], plain[1]), strict=True)] == [True, True]
    assert [torch.equal(a, 2 * b) for a, b in zip(both, plain, strict=True)] == [True, True]


def test_without_metrics_of_the_training_data_none_are_built(tmp_path: Path) -> None:
    assert small_run(tmp_path).slot_results.metrics is None
    assert small_run(tmp_path, train_metrics={"error": MeanSquaredError}).slot_results.metrics is not None
