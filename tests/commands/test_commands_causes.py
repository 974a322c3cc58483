"""The setting because of which a scenario differs, or cannot be run, is found, named and left alone afterwards.

In the place of a `Verification`: runs that are written at once, and depend on the settings of their lives.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from written_runs import NUM_STEPS, write_run

from disttrain.commands.attacks import ATTACKED, REFERENCE, Setting, as_in_reference, attacked
from disttrain.commands.causes import find_cause, run_where_possible, up_to
from disttrain.commands.compare import compare_runs
from disttrain.commands.scenarios import Life, Scenario, plan
from disttrain.commands.verification import CannotRun
from disttrain.launching.interpreter import Surroundings
from disttrain.run.directory import RunDirectory

SCENARIOS = attacked(plan([1], [0], 1, NUM_STEPS), Path("/f"))
BAD_STEP = 3


class Written:
    """Runs have another loss at `BAD_STEP` if `differs`, and cannot be run if `fails`, for one of their lives."""

    num_steps = NUM_STEPS

    def __init__(self, folder: Path, **rules: Callable[[Surroundings], bool]) -> None:
        self.folder = folder
        self.rules = rules
        self.left_alone: list[Setting] = []
        self.ran: list[Scenario] = []

    def run(self, scenario: Scenario, following: Scenario | None = None) -> RunDirectory:
        lives = [as_in_reference(life, self.left_alone).surroundings for life in scenario.lives]
        self.ran.append(scenario)
        if any(self.rules["fails"](each) for each in lives if each) if "fails" in self.rules else False:
            raise CannotRun("the whole output", "OSError: no such thing")
        differs = self.rules.get("differs", lambda _: False)
        bad_step = BAD_STEP if any(differs(each) for each in lives if each) else None
        killed_at = scenario.lives[-1].killed_at
        num_steps = NUM_STEPS if killed_at is None else killed_at - 1
        return write_run(self.folder / str(len(self.ran)), num_steps=num_steps, bad_step=bad_step)


def has_other(field: str, surroundings: Surroundings) -> bool:
    return getattr(surroundings, field) != getattr(REFERENCE, field)


@pytest.mark.parametrize("setting", ATTACKED[1:], ids=[setting.field for setting in ATTACKED[1:]])
@pytest.mark.parametrize("number", [1, 2], ids=["again", "killed"])
def test_the_cause_of_a_difference(setting: Setting, number: int, tmp_path: Path) -> None:
    verification = Written(tmp_path, differs=partial(has_other, setting.field))
    reference, *others = SCENARIOS
    compare = partial(compare_runs, verification.run(reference))  # type: ignore[arg-type]
    scenario = others[number - 1]
    comparison = compare(verification.run(scenario))
    found = find_cause(verification, scenario, comparison, compare)  # type: ignore[arg-type]
    assert found is not None
    assert found.setting == setting
    assert found.text.startswith(f"The cause is {setting.name}: ")
    assert compare(verification.run(scenario)).same  # it is left alone now
    trials = verification.ran[2:-1]
    assert len(trials) <= 4
    if number == 1:
        assert {trial.lives[-1].killed_at for trial in trials} == {BAD_STEP + 1}


def test_a_difference_that_no_setting_explains(tmp_path: Path) -> None:
    numbers = iter(range(99))
    verification = Written(tmp_path, differs=lambda _: next(numbers) > 0)
    compare = partial(compare_runs, verification.run(SCENARIOS[0]))  # type: ignore[arg-type]
    comparison = compare(verification.run(SCENARIOS[1]))
    found = find_cause(verification, SCENARIOS[1], comparison, compare)  # type: ignore[arg-type]
    assert found is not None
    assert found.setting is None
    assert "It differs too if its processes are started with the same settings" in found.text
    plain = Scenario("plain", (Life(1, 0),))
    assert find_cause(verification, plain, comparison, compare) is None  # type: ignore[arg-type]


@pytest.mark.parametrize("fields", [["working_directory"], ["umask"], ["working_directory", "time_zone"]])
def test_settings_with_which_it_cannot_be_run_are_noted_and_left_alone(fields: list[str], tmp_path: Path) -> None:
    verification = Written(tmp_path, fails=lambda s: any(has_other(field, s) for field in fields))
    notes: list[str] = []
    run = run_where_possible(verification, SCENARIOS[1], None, notes)  # type: ignore[arg-type]
    assert run.ledger_jsonl.exists()
    assert sorted(setting.field for setting in verification.left_alone) == sorted(fields)
    assert len(notes) == len(fields)
    for setting, note in zip(verification.left_alone, notes, strict=True):
        assert note.startswith(f"the run depends on {setting.name}: with another one (")
        assert "'again' ended with: OSError: no such thing. So the other runs kept yours." in note


def test_what_cannot_be_run_in_any_way_is_an_error(tmp_path: Path) -> None:
    verification = Written(tmp_path, fails=lambda _: True)
    notes: list[str] = []
    with pytest.raises(CannotRun, match="the whole output"):
        run_where_possible(verification, SCENARIOS[1], None, notes)  # type: ignore[arg-type]
    assert (notes, verification.left_alone) == ([], [])


def test_a_scenario_stops_after_a_step_if_its_last_life_alone_gets_there() -> None:
    scenario = Scenario("x", (Life(2, 0, 4), Life(1, 0)))
    shorter = dataclasses.replace(scenario, lives=(Life(2, 0, 4), Life(1, 0, 8)))
    assert up_to(scenario, 7, 9) == shorter
    assert up_to(scenario, 3, 9) == up_to(scenario, 9, 9) == scenario
    assert up_to(Scenario("x", (Life(1, 0),)), 1, 9).lives == (Life(1, 0, 2),)
