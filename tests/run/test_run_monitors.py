"""A monitored result is good if it is small or large, as its metric says, with one validation set or several."""

import json
from pathlib import Path
from typing import Any

import pytest
from small_run import points, small_run, trained
from torch import Tensor, nn
from torchmetrics import MeanMetric, MeanSquaredError

from disttrain.errors import ConfigError


def test_nothing_is_monitored_without_a_wish(tmp_path: Path) -> None:
    run = small_run(tmp_path)
    assert (run.best, run.early_stop) == (None, None)


def test_the_metric_of_a_set_says_whether_small_values_are_good(tmp_path: Path) -> None:
    monitored = {"monitor": "clean/error"}
    sets = {"clean": points, "noisy": points}
    run = small_run(
        tmp_path, valid_data=sets, metrics={"error": MeanSquaredError}, checkpoint=monitored, early_stop=monitored
    )
    assert run.best is not None
    assert run.early_stop is not None
    assert (run.best.monitor, run.best.mode) == ("clean/error", "min")
    assert (run.early_stop.monitor, run.early_stop.mode) == ("clean/error", "min")


def with_values(model: nn.Module, batch: Any) -> tuple[Tensor, None, dict[str, Tensor]]:
    x, y = batch
    error = model(x) - y
    return error.square().mean(), None, {"error": error.abs().mean()}


def test_a_value_that_forward_returns_can_be_followed(tmp_path: Path) -> None:
    followed = {"monitor": "error", "mode": "min"}
    result = trained(tmp_path, loss=None, forward=with_values, checkpoint=followed, early_stop=followed)
    curve = [json.loads(line) for line in (tmp_path / "small/metrics/valid.jsonl").read_text().splitlines()]
    assert result["best"]["value"] == min(line["error"] for line in curve)


def test_a_value_in_which_nothing_counts_is_no_improvement(tmp_path: Path) -> None:
    def forward(model: nn.Module, batch: Any) -> tuple[Tensor, None, dict[str, Any]]:
        x, y = batch
        return (model(x) - y).square().mean(), None, {"found": (0.0, 0)}

    followed = {"monitor": "found", "mode": "max"}
    followed_early = {**followed, "patience": 2}
    result = trained(tmp_path, loss=None, forward=forward, checkpoint=followed, early_stop=followed_early, max_epochs=4)
    assert "best" not in result
    assert result["stopped"] == "early: valid/found has not been finite for 2 evaluations"


def test_a_result_that_no_evaluation_has_is_an_error_that_names_those_that_it_has(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint\.monitor='eror': expected one of .* \(loss, error\)"):
        trained(tmp_path, loss=None, forward=with_values, checkpoint={"monitor": "eror", "mode": "min"})


def test_a_metric_that_does_not_say_it_needs_a_mode_in_the_group_that_follows_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"early_stop\.monitor='mean'.*set early_stop\.mode"):
        small_run(tmp_path, metrics={"mean": MeanMetric}, early_stop={"monitor": "mean"})
    run = small_run(tmp_path, metrics={"mean": MeanMetric}, early_stop={"monitor": "mean", "mode": "max"})
    assert run.early_stop is not None
    assert run.early_stop.mode == "max"
