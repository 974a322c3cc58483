"""State of handlers that a kill loses is told from state that is saved, and from state that differs in every run."""

from pathlib import Path

import pytest

from disttrain.commands.lost_state import lost_values, read_handler_state
from disttrain.run.directory import RunDirectory

WHOLE = {"ema.shadow": "a", "ema.count": "b", "timer": "c"}
AGAIN = {"ema.shadow": "a", "ema.count": "b", "timer": "d"}


@pytest.mark.parametrize(
    ("killed", "lost"),
    [
        ({"ema.shadow": "a", "ema.count": "b", "timer": "e"}, []),
        ({"ema.shadow": "x", "ema.count": "b", "timer": "e"}, ["ema.shadow"]),
        ({"ema.shadow": "x", "ema.count": "y", "timer": "c"}, ["ema.shadow", "ema.count"]),
        ({}, []),  # its last life had no step to do
        ({"Death.step": "z"}, []),
    ],
)
def test_lost_is_what_undisturbed_runs_agree_on_and_a_killed_one_has_not(
    killed: dict[str, str], lost: list[str]
) -> None:
    assert lost_values([WHOLE, AGAIN], [killed]) == lost
    assert lost_values([WHOLE, AGAIN], [WHOLE, killed]) == lost


def test_without_kills_nothing_is_lost() -> None:
    assert lost_values([WHOLE, AGAIN], []) == []
    assert lost_values([], [WHOLE]) == []


def test_a_run_that_wrote_nothing_has_no_state(tmp_path: Path) -> None:
    assert read_handler_state(RunDirectory(tmp_path)) == {}
