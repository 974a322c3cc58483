"""The start and the limits of a run, as values: when it begins anew, when it continues, and its dict."""

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disttrain.engine import State
from disttrain.engine.run_plan import Plan, check_iterable, is_done, plan_from_dict, plan_run, progress_dict


@st.composite
def begun_runs(draw: Any) -> State:
    """Draw the state of a run that has begun: whole epochs so far and some iterations, and one of the two maxima."""
    length = draw(st.integers(1, 9))
    iteration = draw(st.integers(0, 50))
    state = State(iteration=iteration, epoch=iteration // length, epoch_length=length)
    if draw(st.booleans()):
        state.max_epochs = draw(st.integers(-(-iteration // length) or 1, 60))
    else:
        state.max_iters = draw(st.integers(iteration or 1, 60))
    return state


def counters(progress: Any) -> tuple[Any, ...]:
    names = ("iteration", "epoch", "epoch_length", "max_epochs", "max_iters")
    return tuple(getattr(progress, name) for name in names)


@given(begun_runs())
def test_a_plan_from_the_dict_of_a_state_has_its_progress(state: State) -> None:
    plan = plan_from_dict(progress_dict(state, []), [])
    assert counters(plan) == counters(state)
    fresh = State()
    plan.apply(fresh)
    assert counters(fresh) == counters(state)


def test_the_dict_has_the_user_keys_and_a_plan_requires_them() -> None:
    state = State(alpha=0.5)
    saved = progress_dict(state, ["alpha"])
    assert saved == {"epoch_length": None, "iteration": 0, "max_epochs": None, "alpha": 0.5}
    with pytest.raises(ValueError, match="state_dict must hold beta"):
        plan_from_dict(saved, ["alpha", "beta"])


@given(begun_runs(), st.booleans())
def test_a_run_begins_anew_if_it_is_done_and_not_paused(state: State, paused: bool) -> None:
    before = copy.deepcopy(vars(state))
    plan = plan_run(state, paused, None, None, None, None)
    assert vars(state) == before
    assert plan.anew == (is_done(state) and not paused)
    if plan.anew:
        assert counters(plan) == (0, 0, state.epoch_length, 1, None)
    else:
        assert counters(plan) == counters(state)


@given(begun_runs(), st.integers(1, 60))
def test_a_maximum_of_the_same_kind_is_taken_unless_it_is_below_the_progress(state: State, maximum: int) -> None:
    kind, reached = ("max_epochs", state.epoch) if state.max_iters is None else ("max_iters", state.iteration)
    arguments: dict[str, Any] = {"max_epochs": None, "max_iters": None, kind: maximum}
    if maximum < reached:
        with pytest.raises(ValueError, match=f"{kind} must be at least {reached}, which the run has already reached"):
            plan_run(state, False, None, epoch_length=None, **arguments)
    else:
        assert getattr(plan_run(state, False, None, epoch_length=None, **arguments), kind) == maximum
    other = "max_iters" if kind == "max_epochs" else "max_epochs"
    with pytest.raises(ValueError, match=f"expected {kind}, the kind of maximum of this run"):
        plan_run(state, False, None, epoch_length=None, **{"max_epochs": None, "max_iters": None, other: maximum})


@given(begun_runs())
def test_a_run_is_done_exactly_when_no_iteration_is_left(state: State) -> None:
    left = state.epoch_length * state.max_epochs if state.max_iters is None else state.max_iters
    assert is_done(state) == (state.iteration >= left)


def test_a_terminated_last_epoch_is_done_whatever_its_iterations() -> None:
    assert is_done(Plan(iteration=1, epoch=2, epoch_length=5, max_epochs=2, max_iters=None))
    assert not is_done(Plan(iteration=1, epoch=2, epoch_length=5, max_epochs=3, max_iters=None))
    assert not is_done(Plan(iteration=0, epoch=0, epoch_length=None, max_epochs=None, max_iters=None))


def test_data_is_iterable_if_it_has_iter_or_getitem_and_it_is_not_iterated() -> None:
    class Costly:
        def __iter__(self) -> None:
            raise AssertionError("iter was called")

    class Indexed:
        def __getitem__(self, index: int) -> int:
            return index

    check_iterable(Costly())
    check_iterable(Indexed())
    with pytest.raises(TypeError, match="data must be iterable, got 3 of type int"):
        check_iterable(3)
