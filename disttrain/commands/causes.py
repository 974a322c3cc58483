"""The cause of a difference, or of a run that cannot be run, among the settings with which its lives were started.

*Contract*: runs the scenario again, with fewer settings changed each time, until it is seen which one matters. What is
found is left as in the reference from then on (`Verification.left_alone`), so that later scenarios show other causes.

*Cost*: at most four runs for a difference, and six for a run that cannot be run. Those for a difference stop after its
step, if the scenario has one life.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

from disttrain.commands.attacks import (
    ATTACKED,
    REFERENCE,
    Setting,
    as_in_reference,
    setting_that_matters,
    settings_changed_in,
    shown_value,
    values_in,
)
from disttrain.commands.scenarios import Scenario
from disttrain.commands.verification import CannotRun, Verification
from disttrain.evidence import Comparison
from disttrain.run.directory import RunDirectory


class Finding(NamedTuple):
    """The result of running a scenario again; `setting` is None if none of the settings matters."""

    setting: Setting | None
    text: str


def run_where_possible(
    verification: Verification, scenario: Scenario, following: Scenario | None, notes: list[str]
) -> RunDirectory:
    """Run a scenario; leave alone the settings with which it cannot be run, and add a note about each.

    *Errors*: CannotRun if it cannot be run with the settings of the reference either.
    """
    while True:
        try:
            return verification.run(scenario, following)
        except CannotRun as error:
            setting, run = _why_it_cannot_run(verification, scenario, following)
            if setting is None:
                raise
            notes.append(
                f"the run depends on {setting.name}: with another one ({values_in(scenario, setting)}) "
                f"{scenario.name!r} ended with: {error.last_line}. So the other runs kept yours. {setting.advice}"
            )
            verification.left_alone.append(setting)
            if run is not None:
                return run


def _why_it_cannot_run(
    verification: Verification, scenario: Scenario, following: Scenario | None
) -> tuple[Setting | None, RunDirectory | None]:
    """Return the setting with which a scenario cannot be run, and a run without it, if there was one on the way."""
    changed, fails = _search(verification, scenario, lambda tried: _fails(verification, tried))
    if not changed:
        return None, None
    verification.left_alone.append(changed[0])  # the likeliest; if it is the one, the next run is the wanted one
    try:
        return changed[0], verification.run(scenario, following)
    except CannotRun:
        pass
    finally:
        verification.left_alone.pop()
    return setting_that_matters(changed, fails), None


def find_cause(
    verification: Verification,
    scenario: Scenario,
    comparison: Comparison,
    compare: Callable[[RunDirectory], Comparison],
) -> Finding | None:
    """Return the setting because of which a scenario differs from the reference; None if no setting was changed.

    `comparison` is that of the scenario's run, with a difference, and `compare` compares another run of it.
    """
    step = verification.num_steps if comparison.difference is None else max(1, comparison.difference.step)

    def differs(changed: Scenario) -> bool:
        try:
            found = compare(verification.run(up_to(changed, step, verification.num_steps)))
        except CannotRun:
            return True
        return not found.same if found.difference is None else found.difference.step <= step

    changed, is_wrong = _search(verification, scenario, differs)
    if not changed:
        return None
    setting = setting_that_matters(changed, is_wrong)
    if setting is None:
        return Finding(
            None,
            "It differs too if its processes are started with the same settings as the reference's, such as the hash "
            "seed and the working directory. So look for what is new in each process (the clock, os.urandom, the "
            "process's id, a random name of tempfile, id() of an object, the hash seed of a program that your code "
            "starts), or for what a kill or other ranks change.",
        )
    verification.left_alone.append(setting)
    return Finding(
        setting,
        f"The cause is {setting.name}: {values_in(scenario, setting)} in {scenario.name!r}, "
        f"{shown_value(getattr(REFERENCE, setting.field), setting)} in the reference. With that of the reference the "
        f"bits are the same. {setting.advice}",
    )


def up_to(scenario: Scenario, step: int, num_steps: int) -> Scenario:
    """Return a scenario that dies after `step`, if only its last life gets there; otherwise the whole scenario."""
    *before, last = scenario.lives
    if step >= num_steps or any(life.killed_at is None or life.killed_at > step for life in before):
        return scenario
    return dataclasses.replace(scenario, lives=(*before, dataclasses.replace(last, killed_at=step + 1)))


def _fails(verification: Verification, scenario: Scenario) -> bool:
    try:
        verification.run(scenario)
    except CannotRun:
        return True
    return False


def _search(
    verification: Verification, scenario: Scenario, is_wrong: Callable[[Scenario], bool]
) -> tuple[list[Setting], Callable[[Sequence[Setting]], bool]]:
    """Return the settings that are changed in a scenario, and a trial of it with some of them changed alone."""
    changed = [setting for setting in settings_changed_in(scenario) if setting not in verification.left_alone]

    def tried(settings: Sequence[Setting]) -> bool:
        others = [setting for setting in ATTACKED if setting not in settings]
        lives = tuple(as_in_reference(life, others) for life in scenario.lives)
        return is_wrong(dataclasses.replace(scenario, lives=lives))

    return changed, tried
