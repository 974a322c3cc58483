"""What is saved when the time is short: chosen by how long the last save took, where, and whether one is under way."""

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disttrain.checkpoint import AsynchronousSaver, DirectorySaver
from disttrain.saving import MARGIN, Choice, choose


class Known(AsynchronousSaver):
    """A saver of which a test says how long its saves take and whether one is under way."""

    def __init__(self, expected_s: float | None, is_under_way: bool = False) -> None:
        super().__init__("nowhere")
        self._expected_s = expected_s
        self._is_under_way = is_under_way

    def expected_s(self) -> float | None:
        return self._expected_s

    @property
    def under_way(self) -> bool:
        return self._is_under_way


@pytest.mark.parametrize(
    ("expected_s", "left_s", "is_under_way", "has_target", "choice"),
    [
        (None, 0.0, False, True, Choice.AS_ALWAYS),  # nobody knows how long it takes
        (4.0, 30.0, True, True, Choice.AS_ALWAYS),
        (4.0, math.inf, True, True, Choice.AS_ALWAYS),
        (60.0, 30.0, False, True, Choice.IN_THE_RUN_DIRECTORY),
        (60.0, 30.0, True, True, Choice.IN_THE_RUN_DIRECTORY),
        (60.0, 30.0, True, False, Choice.WHAT_IS_UNDER_WAY),
        (60.0, 30.0, False, False, Choice.AS_ALWAYS),  # there is nothing better to do with the time
        (60.0, -5.0, True, False, Choice.WHAT_IS_UNDER_WAY),
    ],
)
def test_choices(expected_s: float | None, left_s: float, is_under_way: bool, has_target: bool, choice: Choice) -> None:
    assert choose(Known(expected_s, is_under_way), left_s, has_target) == choice


@given(st.floats(0, 1e6), st.floats(0, 1e6), st.booleans(), st.booleans())
def test_a_save_for_which_there_is_time_is_always_made(
    expected_s: float, more_s: float, is_under_way: bool, has_target: bool
) -> None:
    assert choose(Known(expected_s, is_under_way), MARGIN * expected_s + more_s, has_target) == Choice.AS_ALWAYS


def test_a_synchronous_saver_knows_how_long_its_last_save_took(tmp_path: Path) -> None:
    saver = DirectorySaver(tmp_path)
    assert saver.expected_s() is None
    saver({"n": 1}, "step-00000001", {})
    took_s = saver.expected_s()
    assert took_s is not None
    assert 0 < took_s < 60
    assert choose(saver, took_s * MARGIN, False) == Choice.AS_ALWAYS
    assert choose(saver, took_s, True) == Choice.IN_THE_RUN_DIRECTORY
