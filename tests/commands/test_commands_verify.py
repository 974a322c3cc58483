"""`disttrain verify` without its processes: options, the outcome of runs that are there, and what it prints of them."""

import argparse
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from written_runs import NUM_STEPS, write_run

from disttrain.commands.exit_codes import DIFFERENT, SAME, USAGE
from disttrain.commands.scenarios import Life, Scenario, plan
from disttrain.commands.verification import CannotRun
from disttrain.commands.verify import (
    list_from,
    number_from,
    run_scenarios,
    scenario_cells,
)
from disttrain.run.directory import RunDirectory


class Prepared:
    """In the place of a `Verification`: its runs have been written before; a missing one cannot be run."""

    num_steps = NUM_STEPS

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.done: list[str] = []

    def run(self, scenario: Scenario, following: Scenario | None = None) -> RunDirectory:
        path = self.folder / scenario.name
        if not path.exists():
            raise CannotRun(f"{scenario.name}: the ranks ended with 1, expected 0")
        self.done.append(scenario.name)
        return RunDirectory(path)


SCENARIOS = plan([1, 2], [0], 1, NUM_STEPS)
WHOLE = ["reference", "again", "2 ranks", "killed", "killed, resized"]


def verified(
    folder: Path, changes: dict[str, dict[str, Any] | None], *, first_only: bool = False
) -> tuple[int, str, list[str]]:
    """Verify runs that are alike but for `changes`; return the exit code, the output and the runs done."""
    for name in WHOLE:
        change = changes.get(name, {})
        if change is not None:
            write_run(folder / name, **change)
    screen, prepared = StringIO(), Prepared(folder)
    console = Console(file=screen, width=200)
    code = run_scenarios(prepared, SCENARIOS, console, first_only=first_only)  # type: ignore[arg-type]
    return code, screen.getvalue(), prepared.done


def test_all_runs_are_the_same(tmp_path: Path) -> None:
    assert [scenario.name for scenario in SCENARIOS] == WHOLE
    code, out, done = verified(tmp_path, {})
    assert (code, done) == (SAME, WHOLE)
    assert f"the same bits in all 5 runs: at each of {NUM_STEPS} steps" in out
    assert [line.split()[-1] for line in out.splitlines() if "0123456789ab" in line] == ["-", *["yes"] * 4]


@pytest.mark.parametrize("first_only", [False, True])
def test_the_first_run_that_differs_is_described_and_the_others_named(tmp_path: Path, first_only: bool) -> None:
    changes: dict[str, Any] = {"2 ranks": {"bad_step": 3}, "killed, resized": {"bad_step": 1}}
    code, out, done = verified(tmp_path, changes, first_only=first_only)
    assert code == DIFFERENT
    assert done == (WHOLE[:3] if first_only else WHOLE)
    assert "not the same bits: 2 ranks\n" in out
    assert "first difference at step 3: the loss" in out
    assert ("also not the same bits: killed, resized" in out) != first_only


@pytest.mark.parametrize("change", [{"num_steps": NUM_STEPS - 1}, {"every_steps": 2}])
def test_steps_that_were_not_compared_are_not_the_same(tmp_path: Path, change: dict[str, Any]) -> None:
    code, out, _ = verified(tmp_path, {"killed": change})
    assert code == DIFFERENT
    assert "not the same bits: killed\n" in out


@pytest.mark.parametrize(("missing", "code"), [("reference", USAGE), ("killed", DIFFERENT)])
def test_a_run_that_fails(tmp_path: Path, missing: str, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    got, _, done = verified(tmp_path, {missing: None})
    assert (got, done) == (code, WHOLE[: WHOLE.index(missing)])
    assert capsys.readouterr().err == f"\n{missing}: the ranks ended with 1, expected 0\n"


def test_what_was_found_before_a_run_failed_is_printed_too(tmp_path: Path) -> None:
    code, out, _ = verified(tmp_path, {"2 ranks": {"bad_step": 3}, "killed": None})
    assert code == DIFFERENT
    assert "first difference at step 3: the loss" in out


def test_an_evaluation_that_is_missing_is_not_the_same(tmp_path: Path) -> None:
    evaluations = {2: {"loss": 0.5}, NUM_STEPS: {"loss": 0.25}}
    every: dict[str, Any] = {name: {"evaluations": evaluations} for name in WHOLE}
    code, out, _ = verified(tmp_path / "same", every)
    assert code == SAME
    assert "optimizer states; and the results of 2 evaluations" in out
    code, out, _ = verified(tmp_path / "other", {**every, "killed": {"evaluations": {2: {"loss": 0.5}}}})
    assert code == DIFFERENT
    assert "not the same bits: killed\n" in out


def test_a_quick_verification_says_what_it_does_not_see(tmp_path: Path) -> None:
    assert "--quick: all runs began in one process, so this does not show" in verified(tmp_path, {})[1]


def test_the_cells_of_a_scenario() -> None:
    assert scenario_cells(Scenario("a", (Life(2, 0),))) == ("a", "2", "0", "-")
    lives = (Life(3, 1, killed_at=4), Life(2, 1, killed_at=9), Life(3, 1))
    assert scenario_cells(Scenario("b", lives)) == ("b", "3, 2, 3", "1", "4, 9")


@given(st.lists(st.integers(0, 99), min_size=1), st.integers(0, 9))
def test_lists_of_numbers_are_read_as_they_are_typed(numbers: list[int], low: int) -> None:
    text = ", ".join(map(str, numbers))
    if min(numbers) < low:
        with pytest.raises(argparse.ArgumentTypeError, match=f"expected a whole number from {low} on"):
            list_from(low)(text)
    else:
        assert list_from(low)(text) == sorted(set(numbers), key=numbers.index)


@given(st.text(max_size=3).filter(lambda text: not text.isdecimal()))
def test_other_words_are_no_numbers(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="expected a whole number from 0 on"):
        number_from(0)(text)
