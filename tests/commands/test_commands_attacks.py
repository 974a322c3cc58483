"""Every life of a verification has other surroundings, and a search finds the setting that matters."""

from collections.abc import Sequence
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from disttrain.commands.attacks import (
    ATTACKED,
    REFERENCE,
    Setting,
    as_in_reference,
    attacked,
    setting_that_matters,
    settings_changed_in,
    values_in,
)
from disttrain.commands.scenarios import plan
from disttrain.launching.interpreter import Surroundings

SCENARIOS = attacked(plan([1, 2], [0, 1], 2, 30), Path("/f"))


def surroundings_of(number: int) -> list[Surroundings]:
    found = [life.surroundings for life in SCENARIOS[number].lives]
    return [each for each in found if each is not None]


def test_the_reference_is_as_verify_was_started_and_no_other_life_shares_anything_with_it() -> None:
    assert surroundings_of(0) == [REFERENCE]
    others = [each for number in range(1, len(SCENARIOS)) for each in surroundings_of(number)]
    assert len(others) == len({life for scenario in SCENARIOS[1:] for life in scenario.lives}) == 8
    fields = {setting.field for setting in ATTACKED} - {"start_method"}
    for field in fields:
        assert all(getattr(each, field) != getattr(REFERENCE, field) for each in others)
    for field in ("hash_seed", "working_directory", "temporary_directory"):
        assert len({getattr(each, field) for each in others}) == len(others)
    assert fields | {"start_method"} == set(Surroundings.__dataclass_fields__)


def test_one_life_with_workers_starts_them_in_another_way() -> None:
    lives = [(scenario.name, life) for scenario in SCENARIOS for life in scenario.lives]
    ((name, life),) = [(n, life) for n, life in lives if life.surroundings and life.surroundings.start_method]
    assert (name, life.num_ranks, life.num_workers) == ("killed, resized", 1, 1)
    without = attacked(plan([1, 2], [0], 1, 9), Path("/f"))
    assert all(not life.surroundings.start_method for s in without for life in s.lives if life.surroundings)


def test_settings_of_the_reference_are_put_back_one_by_one() -> None:
    scenario = SCENARIOS[1]
    assert [setting.field for setting in settings_changed_in(scenario)] == [s.field for s in ATTACKED[1:]]
    (life,) = scenario.lives
    assert as_in_reference(life, ATTACKED).surroundings == REFERENCE
    for setting in ATTACKED[1:]:
        back = as_in_reference(life, [setting]).surroundings
        assert back is not None
        differing = {f for f in Surroundings.__dataclass_fields__ if getattr(back, f) != getattr(REFERENCE, f)}
        assert differing == {s.field for s in ATTACKED[1:]} - {setting.field}
    umask = next(setting for setting in ATTACKED if setting.field == "umask")
    assert values_in(scenario, umask) == "077"
    assert values_in(SCENARIOS[0], umask) == "yours"


@given(st.sets(st.sampled_from(ATTACKED), min_size=1), st.data())
def test_the_setting_that_is_found_matters(changed_set: set[Setting], data: st.DataObject) -> None:
    changed = [setting for setting in ATTACKED if setting in changed_set]
    guilty = data.draw(st.sets(st.sampled_from(changed), min_size=1))
    tried: list[Sequence[Setting]] = []

    def is_wrong(settings: Sequence[Setting]) -> bool:
        tried.append(settings)
        return not guilty.isdisjoint(settings)

    assert setting_that_matters(changed, is_wrong) in guilty
    assert len(tried) <= 4
    assert len(set(map(tuple, tried))) == len(tried)


def test_no_setting_matters_if_it_is_wrong_without_any() -> None:
    assert setting_that_matters(ATTACKED, lambda settings: True) is None
    assert setting_that_matters([], lambda settings: False) is None
