"""A config follows a result that its evaluations have, and somebody says which values of it are good."""

from typing import Any

import pytest
import torch
from config_samples import refused, sample

from disttrain.config import apply_overrides
from disttrain.errors import ConfigError


def test_the_monitored_result_is_one_of_the_validation_data() -> None:
    there: dict[str, Any] = {"valid_data": list, "metrics": {"accuracy": lambda: None}}
    assert refused(checkpoint={"monitor": "loss"}).startswith("checkpoint.monitor: expected None without valid_data")
    assert "expected 'loss' or 'accuracy', got 'acuracy'" in refused(checkpoint={"monitor": "acuracy"}, **there)
    assert "checkpoint.mode: expected 'auto' without" in refused(checkpoint={"mode": "min"}, **there)
    assert sample(checkpoint={"monitor": "accuracy", "mode": "max"}, **there).checkpoint.monitor == "accuracy"


def test_a_value_that_forward_returns_is_monitored_with_a_mode() -> None:
    there: dict[str, Any] = {"valid_data": list, "loss": None, "forward": lambda model, batch: None, "metrics": {}}
    hint = "expected 'loss', got 'ce'; if forward returns a value of that name, set checkpoint.mode to 'min' or 'max'"
    assert hint in refused(checkpoint={"monitor": "ce"}, **there)
    assert "set early_stop.mode to 'min' or 'max' too" in refused(early_stop={"monitor": "ce"}, **there)
    assert sample(checkpoint={"monitor": "ce", "mode": "min"}, **there).checkpoint.monitor == "ce"
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau
    assert sample(schedule_monitor="ce", schedule=plateau, **there).schedule_monitor == "ce"
    sets = {**there, "valid_data": {"clean": list}}
    assert sample(checkpoint={"monitor": "clean/ce", "mode": "min"}, **sets).checkpoint.mode == "min"
    assert "expected 'clean/loss', got 'ce'." in refused(checkpoint={"monitor": "ce", "mode": "min"}, **sets)


def test_the_result_that_a_schedule_follows_is_one_of_the_validation_data() -> None:
    there: dict[str, Any] = {"valid_data": list, "metrics": {"accuracy": lambda: None}}
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau
    assert refused(schedule_monitor="loss", **there).startswith("schedule_monitor: expected None without schedule")
    refusal = refused(schedule_monitor="loss", schedule=plateau)
    assert refusal.startswith("schedule_monitor: expected None without valid_data")
    assert "got 'valid/loss'" in refused(schedule_monitor="valid/loss", schedule=plateau, **there)
    assert sample(schedule_monitor="accuracy", schedule=plateau, **there).schedule_monitor == "accuracy"


def test_an_early_end_names_the_result_that_is_to_improve() -> None:
    there: dict[str, Any] = {"valid_data": list, "metrics": {"accuracy": lambda: None}}
    assert refused(early_stop={"patience": 5}, **there).startswith(
        "early_stop.monitor: missing beside early_stop.patience; expected the result that is to improve"
    )
    assert "expected 'loss' or 'accuracy', got 'val_loss'" in refused(early_stop={"monitor": "val_loss"}, **there)
    assert refused(early_stop={"monitor": "loss"}).startswith("early_stop.monitor: expected None without valid_data")
    assert refused(early_stop={"monitor": "loss", "patience": 0}, **there).startswith(
        "early_stop.patience: expected int"
    )
    config = sample(early_stop={"monitor": "loss", "patience": 5}, **there)
    assert apply_overrides(config, ["early_stop.monitor=none"]).early_stop.monitor is None  # patience may stay
    assert apply_overrides(sample(), ["early_stop.monitor=none"]).early_stop.monitor is None
    for words in (["early_stop.patience=5"], ["early_stop.patience=5", "early_stop.min_delta=0.1"]):
        with pytest.raises(ConfigError, match=r"early_stop\.monitor: missing beside early_stop\."):
            apply_overrides(sample(**there), words)
    chosen = apply_overrides(sample(**there), ["early_stop.patience=5", "early_stop.monitor=loss"]).early_stop
    assert (chosen.monitor, chosen.patience) == ("loss", 5)
    with pytest.raises(ConfigError, match=r"ema\.decay: missing beside ema\.every_steps"):
        apply_overrides(sample(), ["ema.every_steps=2"])
