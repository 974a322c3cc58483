"""The best evaluation: the first with the best value, its entry in a checkpoint, and whether small or large is good."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ranks import Ranks
from torch import nn
from torchmetrics import MeanSquaredError
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from disttrain.backend import Backend
from disttrain.checkpoint import BestStep, best_in
from disttrain.errors import ConfigError
from disttrain.handlers.best import Best, Mode, mode_of

VALUES = st.lists(st.sampled_from([0.25, 0.5, 0.75, 1.0, math.nan, math.inf, -math.inf]), max_size=8)


@given(VALUES, st.sampled_from(["min", "max"]), st.integers(0, 8))
def test_the_best_is_the_first_with_the_best_value_also_after_a_resume(
    values: list[float], mode: Mode, stop: int
) -> None:
    best = Best("accuracy", mode)
    saved = []
    for step, value in enumerate(values, 1):
        if step == stop:
            position, best = best.position(), Best("accuracy", mode)
            best.load_position(position)
        if best.improved(step, {"loss": 9.0, "accuracy": value}):
            saved.append(step)
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        assert (best.found, saved, best.position()) == (None, [], {})
        return
    value = max(finite) if mode == "max" else min(finite)
    assert best.found == BestStep(values.index(value) + 1, "accuracy", value)
    assert saved[-1] == best.found.step
    assert best.keeps(f"step-{saved[-1]:08d}")
    assert best.keeps(f"step-{saved[-1]:08d}.1f2e3d4c")  # the name in an object store
    assert not best.keeps(f"step-{saved[-1] + 1:08d}")


def test_whole_numbers_are_accepted_and_lists_are_not() -> None:
    best = Best("hits", "max")
    assert best.improved(1, {"hits": 3})
    assert best.position() == {"best": {"step": 1, "monitor": "hits", "value": 3.0, "mode": "max"}}
    with pytest.raises(ConfigError, match=r"checkpoint.monitor='hits': expected .* one number, got \[1, 2\]"):
        best.improved(2, {"hits": [1, 2]})


def differing_in_the_last_bit(backend: Backend) -> tuple[list[bool], BestStep | None]:
    best = Best("accuracy", "max", backend)
    own = [0.1 + 0.2, 0.3][backend.rank]
    return [best.improved(1, {"accuracy": own}), best.improved(2, {"accuracy": 0.1 + 0.2})], best.found


def test_ranks_whose_values_differ_in_the_last_bit_decide_the_same(ranks: Ranks) -> None:
    assert ranks(2, differing_in_the_last_bit) == [([True, False], BestStep(1, "accuracy", 0.1 + 0.2))] * 2


def test_the_best_of_another_monitor_or_mode_is_ignored() -> None:
    best = Best("loss", "min")
    best.load_position({"best": {"step": 4, "monitor": "accuracy", "value": 0.5, "mode": "min"}})
    assert best.found is None
    best.load_position({"best": {"step": 4, "monitor": "loss", "value": 0.5, "mode": "max"}})
    assert best.found is None
    best.load_position({"best": {"step": 4, "monitor": "loss", "value": 0.5, "mode": "min"}})
    assert best.found == BestStep(4, "loss", 0.5)


@pytest.mark.parametrize(
    "entry",
    [None, 3, {}, {"step": "4", "monitor": "loss", "value": 0.5}, {"step": 4, "monitor": "loss", "value": math.nan}],
)
def test_an_entry_that_is_no_best_step_is_ignored(entry: object) -> None:
    assert best_in({"best": entry}) is None


def test_the_mode_is_that_of_the_config_or_of_the_metric() -> None:
    metrics = {
        "accuracy": MulticlassAccuracy(3),
        "error": MeanSquaredError(),
        "confusion": MulticlassConfusionMatrix(3),
        "mine": nn.Identity(),
    }
    assert mode_of("auto", "accuracy", metrics) == "max"
    assert mode_of("auto", "error", metrics) == "min"
    assert mode_of("auto", "loss", metrics) == "min"
    assert mode_of("min", "accuracy", metrics) == "min"
    assert mode_of("max", "mine", metrics) == "max"
    for name in ("confusion", "mine"):
        with pytest.raises(ConfigError, match="expected a metric whose higher_is_better is True or False, got"):
            mode_of("auto", name, metrics)
