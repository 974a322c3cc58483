"""The choice of a save when time is short, by the duration of the last save, the target, and a save under way."""

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_run import dies_after, trained

from disttrain.checkpoint import AsynchronousSaver, DirectorySaver, is_anchor, survey
from disttrain.run.saving import MARGIN, SaveChoice, choose_save


class Known(AsynchronousSaver):
    """A saver whose expected duration, and whose save under way, the test sets."""

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
        (None, 0.0, False, True, SaveChoice.AS_ALWAYS),  # the duration is unknown
        (4.0, 30.0, True, True, SaveChoice.AS_ALWAYS),
        (4.0, math.inf, True, True, SaveChoice.AS_ALWAYS),
        (60.0, 30.0, False, True, SaveChoice.IN_THE_RUN_DIRECTORY),
        (60.0, 30.0, True, True, SaveChoice.IN_THE_RUN_DIRECTORY),
        (60.0, 30.0, True, False, SaveChoice.ONLY_THE_ONE_UNDER_WAY),
        (60.0, 30.0, False, False, SaveChoice.AS_ALWAYS),  # there is no better choice
        (60.0, -5.0, True, False, SaveChoice.ONLY_THE_ONE_UNDER_WAY),
    ],
)
def test_choices(
    expected_s: float | None, left_s: float, is_under_way: bool, has_target: bool, choice: SaveChoice
) -> None:
    assert choose_save(Known(expected_s, is_under_way), left_s, has_target) == choice


@given(st.floats(0, 1e6), st.floats(0, 1e6), st.booleans(), st.booleans())
def test_a_save_for_which_there_is_time_is_always_made(
    expected_s: float, more_s: float, is_under_way: bool, has_target: bool
) -> None:
    assert (
        choose_save(Known(expected_s, is_under_way), MARGIN * expected_s + more_s, has_target) == SaveChoice.AS_ALWAYS
    )


def test_a_synchronous_saver_knows_the_duration_of_its_last_save(tmp_path: Path) -> None:
    saver = DirectorySaver(tmp_path)
    assert saver.expected_s() is None
    saver({"n": 1}, "step-00000001", {})
    took_s = saver.expected_s()
    assert took_s is not None
    assert 0 < took_s < 60
    assert choose_save(saver, took_s * MARGIN, False) == SaveChoice.AS_ALWAYS
    assert choose_save(saver, took_s, True) == SaveChoice.IN_THE_RUN_DIRECTORY


def test_anchors_stay_for_good_over_kills_and_resumes(tmp_path: Path, torch_settings: None) -> None:
    """Saved at their multiples, whatever else is due, and never removed; the others are removed as ever."""
    fields: dict[str, Any] = {"checkpoint": {"anchor_every_steps": 3, "keep": 2}, "max_epochs": 5}
    with pytest.raises(ValueError, match="on purpose"):
        trained(tmp_path, handlers=[dies_after(8)], **fields)
    saved = tmp_path / "small" / "checkpoints"
    assert steps_in(saved) == [3, 4, 6]
    trained(tmp_path, **fields)  # 20 steps, 4 in an epoch
    assert steps_in(saved) == [3, 6, 9, 12, 15, 18, 20]
    assert [is_anchor(each) for each in survey(saved, quick=True)] == [False, *[True] * 6]


def test_the_bits_of_a_run_are_the_same_with_anchors(tmp_path: Path, torch_settings: None) -> None:
    plain = trained(tmp_path / "plain")
    anchored = trained(tmp_path / "anchored", checkpoint={"anchor_every_steps": 3})
    assert plain["params_sha256"] == anchored["params_sha256"]


def steps_in(checkpoints: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in checkpoints.glob("step-*"))
