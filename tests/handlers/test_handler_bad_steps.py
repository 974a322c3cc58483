"""Which step is bad follows from the lines up to it, however they come."""

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
    """Return the step and the reason of the first bad line, (0, "") where none is."""
    looking = BadSteps(spike_factor)
    try:
        for start in range(0, len(lines), at_a_time):
            looking.look(lines[start : start + at_a_time])
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
def test_the_first_bad_step_is_told(bad: dict[str, Any], reason: str) -> None:
    assert first_bad([line(1), line(2), bad, line(4, math.nan)]) == (3, reason)


def test_what_was_left_out_does_no_harm() -> None:
    overflowed = line(2, norm=math.inf, left_out="its gradient's norm is inf")
    assert first_bad([line(1), overflowed, line(3, None, None, left_out="the loss became nan")]) == (0, "")


def test_it_says_so_again_to_who_goes_on_all_the_same() -> None:
    looking = BadSteps()
    for lines in ([line(1, math.nan)], [line(2)], []):
        with pytest.raises(NonFiniteError, match=r"^the loss became nan at step 1 \(epoch 1\); .*on_nan=rollback$"):
            looking.look(lines)


def test_a_loss_that_jumps_is_measured_by_the_median_of_the_last_ones() -> None:
    usual = [line(step, 1.0 + step % 3) for step in range(1, FEWEST + 1)]  # median 2
    assert first_bad([*usual, line(20, 6.1)]) == (0, "")
    assert first_bad([*usual, line(20, 6.0)], 3.0) == (0, "")
    assert first_bad([*usual, line(20, 6.1)], 3.0) == (20, "the loss jumped to 6.1, from a median of 2,")
    assert first_bad([*usual[1:], line(20, 6.1)], 3.0) == (0, "")  # too few to say
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
def test_it_is_the_same_step_however_the_lines_come_and_wherever_the_run_was_resumed(
    losses: list[float | None], at_a_time: int, resumed_at: int
) -> None:
    lines = [line(step, loss) for step, loss in enumerate(losses, start=1)]
    whole = first_bad(lines, 2.0)
    assert first_bad(lines, 2.0, at_a_time) == whole
    before, after = BadSteps(2.0), lines[resumed_at:]
    if whole[0] == 0 or whole[0] > resumed_at:
        before.look(lines[:resumed_at])
        resumed = BadSteps(2.0, before.recent)
        found = 0
        try:
            resumed.look(after)
        except NonFiniteError as error:
            found = error.step
        assert found == whole[0]
        assert len(resumed.recent) <= RECENT
