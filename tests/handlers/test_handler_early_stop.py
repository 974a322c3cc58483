"""The early end of a run: counted as a plain loop counts, the same after a resume, and said in words."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disttrain.errors import CheckpointError, ConfigError
from disttrain.handlers.best import Mode
from disttrain.handlers.early_stop import EarlyStop

VALUES = st.lists(st.sampled_from([0.25, 0.5, 0.625, 0.75, 1.0, math.nan, math.inf, -math.inf]), max_size=10)


def plain_end(values: list[float], patience: int, mode: Mode, min_delta: float) -> int | None:
    """Return the number of the evaluation that ends a run, as a loop of one's own would find it."""
    best, waited = None, 0
    for number, value in enumerate(values, 1):
        gain = math.inf if best is None else (best - value if mode == "min" else value - best)
        if math.isfinite(value) and gain > min_delta:
            best, waited = value, 0
        else:
            waited += 1
            if waited == patience:
                return number
    return None


@given(
    VALUES, st.integers(1, 3), st.sampled_from(["min", "max"]), st.sampled_from([0.0, 0.125, 0.25]), st.integers(0, 9)
)
def test_a_run_ends_where_a_plain_loop_ends_also_after_a_resume(
    values: list[float], patience: int, mode: Mode, min_delta: float, resumed: int
) -> None:
    early_stop, ended = EarlyStop("accuracy", patience, mode, min_delta), None
    for number, value in enumerate(values, 1):
        if number == resumed:
            position, early_stop = early_stop.position(), EarlyStop("accuracy", patience, mode, min_delta)
            early_stop.load_position(position)
        early_stop.evaluated(10 * number, {"loss": 3.0, "accuracy": value})
        if early_stop.reason is not None:
            ended = number
            break
    assert ended == plain_end(values, patience, mode, min_delta)


def counted(*values: float, **changes: Any) -> EarlyStop:
    early_stop = EarlyStop(**{"monitor": "loss", "patience": 2, "mode": "min", "min_delta": 0.0, **changes})
    for number, value in enumerate(values, 1):
        early_stop.evaluated(40 * number, {"loss": value})
    return early_stop


def test_the_reason_says_what_has_not_improved_by_how_much_for_how_long() -> None:
    assert counted(0.5, 0.6).reason is None
    assert counted(0.5, 0.31, 0.31, 0.4).reason == (
        "valid/loss has not improved for 2 evaluations (best 0.31 at step 80)"
    )
    assert counted(0.31, 0.3095, patience=1, min_delta=0.001).reason == (
        "valid/loss has not improved by 0.001 for 1 evaluation (best 0.31 at step 40)"
    )
    assert counted(math.nan, math.inf).reason == "valid/loss has not been finite for 2 evaluations"


def test_another_patience_decides_anew_about_the_same_count() -> None:
    position = counted(0.5, 0.6, 0.6).position()
    for patience, ends in ((1, True), (2, True), (3, False)):
        again = counted(patience=patience)
        again.load_position(position)
        assert (again.reason is not None) == ends
        assert not again.changed


@pytest.mark.parametrize("changes", [{"mode": "max"}, {"min_delta": 0.5}, {"monitor": "accuracy"}])
def test_another_rule_counts_anew_and_says_so(changes: dict[str, Any]) -> None:
    again = counted(**changes)
    again.load_position(counted(0.5, 0.6, 0.6).position())
    assert (again.reason, again.best) == (None, None)
    assert again.changed == (
        "early_stop counts anew from here: until now it had monitor='loss', mode='min', min_delta=0.0"
    )


def test_a_run_that_had_no_early_stop_counts_from_the_resume() -> None:
    again = counted()
    again.load_position({"epoch": 3})
    assert (again.reason, again.changed) == (None, "")


def test_a_list_cannot_improve() -> None:
    with pytest.raises(
        ConfigError, match=r"early_stop.monitor='loss': expected a result that is one number, got \[1\]"
    ):
        counted().evaluated(1, {"loss": [1]})


SOUND: dict[str, Any] = counted(0.5).position()["early_stop"]


@pytest.mark.parametrize(
    "strange",
    [
        3,
        {},
        {"monitor": "loss"},
        SOUND | {"best": [1]},
        SOUND | {"best": [1, math.nan]},
        SOUND | {"evaluations_since": "2"},
    ],
)
def test_a_position_that_no_run_wrote_is_one_clear_error(strange: Any) -> None:
    with pytest.raises(CheckpointError, match=r"^the checkpoint's position has early_stop=.*, which no run wrote"):
        counted().load_position({"early_stop": strange})
