"""Whether a step is bad depends only on the lines up to it, however many come at a time."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disttrain.errors import NonFiniteError
from disttrain.handlers.bad_steps import FEWEST, RECENT, BadSteps


def line(step: int, loss: float | None = 1.0, norm: float | None = 1.0, **more: Any) -> dict[str, Any]:
    return {"step": step, "epoch": 1, "loss": loss, "grad_norm": norm, **more}


def first_bad(lines: list[dict[str, Any]], spike_factor: float | None = None, at_a_time: int = 100) -> tuple[int, str]:
    """Return the step and the reason of the first bad line; (0, "") if there is none."""
    checker = BadSteps(spike_factor)
    try:
        for start in range(0, len(lines), at_a_time):
            checker.check(lines[start : start + at_a_time])
    except NonFiniteError as error:
        return error.step, error.reason
    return 0, ""


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (line(3, math.nan), "the loss became nan"),
        (line(3, -math.inf), "the loss became -inf"),
        (line(3, norm=math.inf), "the gradient's norm became inf"),
        (line(3, math.nan, math.inf, left_out="its gradient's norm is inf"), "the loss became nan"),
    ],
)
def test_the_first_bad_step_is_reported(bad: dict[str, Any], reason: str) -> None:
    assert first_bad([line(1), line(2), bad, line(4, math.nan)]) == (3, reason)


def test_a_step_or_an_update_that_was_left_out_is_not_bad() -> None:
    overflowed = line(2, norm=math.inf, left_out="its gradient's norm is inf")
    assert first_bad([line(1), overflowed, line(3, None, None, left_out="the loss became nan")]) == (0, "")


def test_a_later_check_raises_the_same_error_again() -> None:
    checker = BadSteps()
    for lines in ([line(1, math.nan)], [line(2)], []):
        with pytest.raises(NonFiniteError, match=r"^the loss became nan at step 1 \(epoch 1\); .*on_nan=rollback$"):
            checker.check(lines)


def test_a_loss_jumps_compared_with_the_median_of_the_last_losses() -> None:
    usual = [line(step, 1.0 + step % 3) for step in range(1, FEWEST + 1)]  # median 2
    assert first_bad([*usual, line(20, 6.1)]) == (0, "")
    assert first_bad([*usual, line(20, 6.0)], 3.0) == (0, "")
    assert first_bad([*usual, line(20, 6.1)], 3.0) == (20, "the loss jumped to 6.1, from a median of 2,")
    assert first_bad([*usual[1:], line(20, 6.1)], 3.0) == (0, "")  # too few losses for a median
    assert first_bad([line(step, 100.0) for step in range(1, 9)] + [line(step) for step in range(9, 99)], 3.0) == (
        0,
        "",
    )
    negative = [line(step, -1.0) for step in range(1, 20)]
    assert first_bad([*negative, line(20, 5.0)], 3.0) == (0, "")


@given(
    st.lists(st.sampled_from([0.5, 1.0, 1.5, 4.0, math.nan, None]), max_size=3 * FEWEST),
    st.integers(1, 9),
    st.integers(0, 3 * FEWEST),
)
def test_the_same_step_is_bad_however_many_lines_come_at_a_time_and_wherever_the_run_was_resumed(
    losses: list[float | None], at_a_time: int, resumed_at: int
) -> None:
    lines = [line(step, loss) for step, loss in enumerate(losses, start=1)]
    whole = first_bad(lines, 2.0)
    assert first_bad(lines, 2.0, at_a_time) == whole
    before, after = BadSteps(2.0), lines[resumed_at:]
    if whole[0] == 0 or whole[0] > resumed_at:
        before.check(lines[:resumed_at])
        resumed = BadSteps(2.0, before.recent)
        bad_step = 0
        try:
            resumed.check(after)
        except NonFiniteError as error:
            bad_step = error.step
        assert bad_step == whole[0]
        assert len(resumed.recent) <= RECENT
