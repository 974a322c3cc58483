"""A monitored result is good if it is small or large, as its metric says, with one validation set or several."""

from pathlib import Path

import pytest
from small_run import points, small_run
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


def test_a_metric_that_does_not_say_it_needs_a_mode_in_the_group_that_follows_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"early_stop\.monitor='mean'.*set early_stop\.mode"):
        small_run(tmp_path, metrics={"mean": MeanMetric}, early_stop={"monitor": "mean"})
    run = small_run(tmp_path, metrics={"mean": MeanMetric}, early_stop={"monitor": "mean", "mode": "max"})
    assert run.early_stop is not None
    assert run.early_stop.mode == "max"
