"""A monitored result is good if it is small or large, as its metric says, with one validation set or several."""

import json
from pathlib import Path
from typing import Any

import pytest
from small_run import points, small_run, trained
from torch import Tensor, nn
from torchmetrics import MeanMetric, MeanSquaredError

from disttrain.engine import Engine, Events
from disttrain.errors import ConfigError
from disttrain.run.state import Run


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


@pytest.mark.parametrize("field", ["checkpoint", "early_stop"])
def test_a_result_that_no_evaluation_has_is_refused_before_the_first_step(tmp_path: Path, field: str) -> None:
    steps: list[int] = []

    def counting(trainer: Engine, run: Run) -> None:
        trainer.add_event_handler(Events.ITERATION_STARTED, lambda: steps.append(1))

    followed = {field: {"monitor": "eror", "mode": "min"}, "handlers": [counting]}
    with pytest.raises(ConfigError, match=rf"{field}\.monitor='eror': expected one of .* \(loss, error\)"):
        trained(tmp_path, loss=None, forward=with_values, **followed)
    assert steps == []


def test_looking_for_a_value_changes_no_bit(tmp_path: Path) -> None:
    found = [
        trained(tmp_path / name, loss=None, forward=with_values, checkpoint=followed)["params_sha256"]
        for name, followed in (("with", {"monitor": "error", "mode": "min"}), ("without", {}))
    ]
    assert found[0] == found[1]


def test_a_run_that_has_the_result_already_does_not_look_for_it(tmp_path: Path) -> None:
    calls: list[bool] = []

    def forward(model: nn.Module, batch: Any) -> tuple[Tensor, None, dict[str, Tensor]]:
        calls.append(model.training)
        return with_values(model, batch)

    changes = {"loss": None, "forward": forward, "early_stop": {"monitor": "error", "mode": "min"}}
    num_batches = 3  # of 12 samples in batches of a slot's size
    for max_epochs, evaluations in ((1, 1), (2, 1)):
        calls.clear()
        trained(tmp_path, max_epochs=max_epochs, **changes)
        looked = 1 if max_epochs == 1 else 0
        assert calls.count(False) == looked + evaluations * num_batches


def test_a_metric_that_does_not_say_it_needs_a_mode_in_the_group_that_follows_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"early_stop\.monitor='mean'.*set early_stop\.mode"):
        small_run(tmp_path, metrics={"mean": MeanMetric}, early_stop={"monitor": "mean"})
    run = small_run(tmp_path, metrics={"mean": MeanMetric}, early_stop={"monitor": "mean", "mode": "max"})
    assert run.early_stop is not None
    assert run.early_stop.mode == "max"
