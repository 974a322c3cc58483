"""The plan of a verification: its runs, and the same plan each time."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from disttrain.commands.scenarios import Life, killed, plan


def test_a_plan_holds_each_number_of_ranks_and_of_workers() -> None:
    scenarios = plan([1, 2, 3], [0, 2], 3, 40)
    assert [s.name for s in scenarios] == ["reference", "again", "2 ranks", "3 ranks", "killed", "killed, resized"]
    assert scenarios[0].lives == scenarios[1].lives == (Life(1, 0),)
    assert [s.lives for s in scenarios[2:4]] == [(Life(2, 2),), (Life(3, 2),)]
    assert {(life.num_ranks, life.num_workers) for life in scenarios[4].lives} == {(1, 0)}
    assert [(life.num_ranks, life.num_workers) for life in scenarios[5].lives] == [(3, 0), (2, 2), (1, 0), (3, 2)]


def test_a_plan_for_one_number_of_ranks() -> None:
    assert [s.name for s in plan([2], [0], 0, 40)] == ["reference", "again"]
    assert [s.name for s in plan([2], [0], 1, 40)] == ["reference", "again", "killed"]
    assert [s.lives[0].num_workers for s in plan([2], [0, 1, 3], 0, 40)] == [0, 0, 1, 3]


@given(st.integers(1, 60), st.data())
def test_kills_are_spread_over_the_run_and_come_in_order(num_steps: int, data: st.DataObject) -> None:
    num_kills = data.draw(st.integers(1, num_steps))
    scenario = killed("killed", [3, 2], [0, 1], num_kills, num_steps)
    steps = [life.killed_at for life in scenario.lives]
    assert steps.pop() is None
    assert len(steps) == num_kills
    for number, step in enumerate(steps):
        assert step is not None
        assert num_steps * number // num_kills < step <= num_steps * (number + 1) // num_kills
    assert all(a != b for a, b in itertools.pairwise(life.num_ranks for life in scenario.lives))
    assert scenario == killed("killed", [3, 2], [0, 1], num_kills, num_steps)


def test_with_as_many_kills_as_steps_there_is_one_at_every_step() -> None:
    assert [life.killed_at for life in killed("x", [1], [0], 30, 30).lives] == [*range(1, 31), None]
