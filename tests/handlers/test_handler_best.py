"""The best evaluation: which it is, what a checkpoint says of it, and which way is up."""

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
def test_it_is_the_first_of_the_best_also_for_who_goes_on_from_a_checkpoint(
    values: list[float], mode: Mode, stop: int
) -> None:
    best = Best("accuracy", mode)
    saved = []
    for step, value in enumerate(values, 1):
        if step == stop:
            position, best = best.about(), Best("accuracy", mode)
            best.stands(position)
        if best.improved(step, {"loss": 9.0, "accuracy": value}):
            saved.append(step)
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        assert (best.found, saved, best.about()) == (None, [], {})
        return
    value = max(finite) if mode == "max" else min(finite)
    assert best.found == BestStep(values.index(value) + 1, "accuracy", value)
    assert saved[-1] == best.found.step
    assert best.keeps(f"step-{saved[-1]:08d}")
    assert best.keeps(f"step-{saved[-1]:08d}.1f2e3d4c")  # as an object store has it
    assert not best.keeps(f"step-{saved[-1] + 1:08d}")


def test_whole_numbers_will_do_and_lists_will_not() -> None:
    best = Best("hits", "max")
    assert best.improved(1, {"hits": 3})
    assert best.about() == {"best": {"step": 1, "monitor": "hits", "value": 3.0, "mode": "max"}}
    with pytest.raises(ConfigError, match=r"checkpoint.monitor='hits': expected .* one number, got \[1, 2\]"):
        best.improved(2, {"hits": [1, 2]})


def differing_in_the_last_bit(backend: Backend) -> tuple[list[bool], BestStep | None]:
    best = Best("accuracy", "max", backend)
    own = [0.1 + 0.2, 0.3][backend.rank]
    return [best.improved(1, {"accuracy": own}), best.improved(2, {"accuracy": 0.1 + 0.2})], best.found


def test_ranks_that_compute_another_last_bit_act_alike(ranks: Ranks) -> None:
    assert ranks(2, differing_in_the_last_bit) == [([True, False], BestStep(1, "accuracy", 0.1 + 0.2))] * 2


def test_another_result_begins_anew() -> None:
    best = Best("loss", "min")
    best.stands({"best": {"step": 4, "monitor": "accuracy", "value": 0.5, "mode": "min"}})
    assert best.found is None
    best.stands({"best": {"step": 4, "monitor": "loss", "value": 0.5, "mode": "max"}})
    assert best.found is None
    best.stands({"best": {"step": 4, "monitor": "loss", "value": 0.5, "mode": "min"}})
    assert best.found == BestStep(4, "loss", 0.5)


@pytest.mark.parametrize(
    "said",
    [None, 3, {}, {"step": "4", "monitor": "loss", "value": 0.5}, {"step": 4, "monitor": "loss", "value": math.nan}],
)
def test_what_is_no_best_step_is_none(said: object) -> None:
    assert best_in({"best": said}) is None


def test_which_way_is_up() -> None:
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
        with pytest.raises(ConfigError, match="does not say whether higher is better"):
            mode_of("auto", name, metrics)
