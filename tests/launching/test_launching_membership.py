"""The agreement's functions one by one; the simulator (test_launching_procedures.py) tries them together."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disttrain.launching.membership import (
    Agreement,
    Generation,
    asks,
    decode,
    died,
    encode,
    finished,
    host_of,
    left,
    overdue,
    refused,
    settled,
    silent,
    started,
)

A, B, C = "one/0.1", "one/1.2", "two/0.1"


def begun(*names: str) -> Agreement:
    """Return the state of a run in whose first generation these ranks are."""
    state = Agreement()
    for host in dict.fromkeys(map(host_of, names)):
        state = started(
            state, host, [name for name in names if host_of(name) == host], hosts=len({*map(host_of, names)})
        )
    for name in names:
        state = asks(state, name)
    assert (state.number, state.members, state.ended) == (1, names, None)
    return state


def test_the_first_generation_waits_for_all_ranks_of_all_hosts() -> None:
    state = asks(asks(started(Agreement(), "one", [A, B], hosts=2), A), B)
    assert (state.number, state.missing) == (0, ())
    state = started(state, "two", [C], hosts=2)
    assert (state.number, state.missing) == (0, (C,))
    assert asks(state, C).generation == Generation(1, (A, B, C), "the run begins", (None, None, None))


def test_survivors_go_on_once_all_of_them_have_left() -> None:
    state = died(begun(A, B, C), B, "B was killed")
    assert (state.ended, state.missing) == ("B was killed", (A, C))
    state = left(state, C, 1, 7, "lost a peer")
    assert (state.number, state.missing) == (1, (A,))
    found = left(state, A, 1, 8, "lost a peer").generation
    assert found == Generation(2, (A, C), "B was killed", (8, 7))
    assert (found.step, found.source, found.behind) == (8, 0, (1,))


def test_one_that_joins_ends_the_generation_and_stands_behind_the_survivors_of_its_host() -> None:
    new = "one/1.3"
    state = started(died(begun(A, B, C), B, "B was killed"), "one", [new])
    for name in (C, A):
        state = left(state, name, 1, 4, "lost a peer")
    assert (state.number, state.ended) == (2, None)  # a rank that starts is not waited for
    state = asks(state, new)
    assert state.ended == f"{new} joins"
    for name in (C, A):
        state = left(state, name, 2, 5, "somebody joins")
    assert state.generation == Generation(3, (A, new, C), f"{new} joins", (5, None, 5))
    assert state.generation.behind == (1,)


def test_ranks_of_a_host_join_together() -> None:
    state = started(begun(A, B), "two", [C, "two/1.2"])
    state = asks(state, C)
    assert (state.number, state.ended) == (1, None)
    assert asks(state, "two/1.2").ended == "two/1.2 joins"
    assert overdue(state, 1, "it does not start").ended == "it does not start"


def test_no_generation_is_without_a_state_nor_with_steps_apart() -> None:
    state = begun(A, B)
    new = started(died(state, A, "A was killed"), "one", ["one/0.3"])
    lost = asks(died(new, B, "B was killed"), "one/0.3")
    assert lost.number == 1
    assert lost.restart == "no rank is left that holds the state of the run: A was killed"
    apart = left(left(state, A, 1, 3, "broken"), B, 1, 5, "broken")
    assert apart.number == 1
    assert apart.restart == "the ranks are at steps 3 to 5: broken"


def test_a_silent_member_is_left_out_and_may_join() -> None:
    state = silent(begun(A, B), [B], "nothing was heard of B")
    state = left(state, A, 1, 3, "lost a peer")
    assert state.members == (A,)
    assert left(state, B, 1, 3, "woke up") == state  # its generation is over
    state = asks(state, B)
    state = left(state, A, 2, 4, "somebody joins")
    assert state.generation == Generation(3, (A, B), f"{B} joins", (4, None))


def test_a_silent_member_that_is_heard_in_time_is_waited_for() -> None:
    state = left(silent(begun(A, B), [B], "nothing was heard of B"), B, 1, 3, "woke up")
    assert state.number == 1
    assert left(state, A, 1, 3, "lost a peer").members == (A, B)


def test_waiting_ends_for_the_generation_in_which_it_began_alone() -> None:
    state = left(begun(A, B, C), A, 1, 3, "broken")
    assert overdue(state, 0, "too long") == state
    state = left(overdue(state, 1, "too long"), A, 1, 3, "broken")
    assert state.members == (A,)
    assert overdue(state, 1, "too long") == state  # it has just begun
    assert overdue(started(Agreement(), "one", [A, B]), 0, "too long").restart == "too long"


def test_a_member_that_has_finished_dies_without_effect() -> None:
    state = died(finished(begun(A, B), A), A, "it ended")
    assert (state.number, state.ended, state.restart) == (1, None, None)
    state = left(died(state, B, "B was killed"), B, 1, 3, "no")
    assert (state.number, state.restart) == (1, None)  # the run is done


def test_survivors_of_one_that_has_finished_go_on() -> None:
    assert left(finished(begun(A, B), A), B, 1, 9, "broken").generation.members == (B,)


STEPS = st.integers(0, 2)
NAMES = st.sampled_from([A, B, C, "two/1.9"])
EVENTS: st.SearchStrategy[tuple[Callable[..., Agreement], tuple[Any, ...]]] = st.one_of(
    st.tuples(st.just(started), st.tuples(st.sampled_from(["one", "two"]), st.lists(NAMES, max_size=2))),
    st.tuples(st.just(asks), st.tuples(NAMES)),
    st.tuples(st.just(left), st.tuples(NAMES, st.integers(0, 3), STEPS, st.just("broken"))),
    st.tuples(st.just(died), st.tuples(NAMES, st.just("killed"))),
    st.tuples(st.just(silent), st.tuples(st.lists(NAMES, max_size=2), st.just("silent"))),
    st.tuples(st.just(overdue), st.tuples(st.integers(0, 3), st.just("overdue"))),
    st.tuples(st.just(finished), st.tuples(NAMES)),
    st.tuples(st.just(refused), st.tuples(st.just("refused"))),
)


@given(st.lists(EVENTS, max_size=25))
def test_any_event_may_come_twice_at_any_time(events: list[tuple[Callable[..., Agreement], tuple[Any, ...]]]) -> None:
    state = begun(A, B, C)
    for event, arguments in events:
        before, state = state, event(state, *arguments)
        assert event(state, *arguments) == state
        assert decode(encode(state)) == state
        assert settled(state) == state
        assert state.number - before.number in (0, 1)
        if state.number == before.number:
            assert state.members == before.members
        else:
            assert len({*state.members}) == len(state.members) > 0
            assert any(step is not None for step in state.steps)
            assert not state.ready


@pytest.mark.parametrize("name", [A, B])
def test_a_generation_without_a_state_has_no_source(name: str) -> None:
    assert Generation(1, (name,), steps=(None,)).source is None
    assert Generation(1, (name,), steps=(None,)).behind == ()
