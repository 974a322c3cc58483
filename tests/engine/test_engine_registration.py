"""Handlers on an event: the list of them, how each is called, and when each is due."""

import pickle
import weakref
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disttrain.engine import Events
from disttrain.engine.events import NEVER, Event
from disttrain.engine.registration import ALWAYS, REMOVED, HandlerList, OwnMethod, Registration


class Owner:
    """An object with a method that can be a handler."""

    def handle(self, number: int = 1) -> tuple["Owner", int]:
        return self, number


def first(engine: Any) -> None:
    """Do nothing; the three handlers are at module level so that they can be pickled."""


def second(engine: Any) -> None:
    """Do nothing."""


def third(engine: Any) -> None:
    """Do nothing."""


HANDLERS = [first, second, third]


def registered(handler: Any, event: Any = Events.STARTED, engine: object = None, **kwargs: Any) -> Registration:
    return Registration(event, handler, getattr(event, "filter", None), (), kwargs, engine)


def handlers_of(handler_list: HandlerList) -> list[Any]:
    return [registration.function for registration in handler_list.registrations]


actions = st.one_of(
    st.tuples(st.sampled_from(["add", "remove"]), st.sampled_from(HANDLERS)),
    st.tuples(st.sampled_from(["wake", "fire", "fired"]), st.none()),
)


@given(st.lists(actions, max_size=20))
def test_a_list_holds_the_handlers_that_were_added_and_not_removed(steps: list[tuple[str, Any]]) -> None:
    handler_list, expected = HandlerList(Events.STARTED), []
    for action, handler in steps:
        if action == "add":
            handler_list.add(registered(handler))
            expected.append(handler)
        elif action == "remove":
            assert handler_list.remove(handler) == (handler in expected)
            expected = [other for other in expected if other is not handler]
        elif action == "wake":
            handler_list.wake()
        elif action == "fire":
            handler_list.firing += 1
        elif handler_list.firing:  # the end of a firing, as in Emitter._fire
            handler_list.firing -= 1
            if handler_list.stale and not handler_list.firing:
                handler_list.sweep()
        present = [r.function for r in handler_list.registrations if r.due != REMOVED]
        assert present == expected
        assert handler_list.stale == (handlers_of(handler_list) != expected)
        assert not handler_list.stale or handler_list.firing
        assert handler_list.due <= min((r.due for r in handler_list.registrations), default=NEVER)


def test_a_firing_under_way_keeps_its_list() -> None:
    handler_list = HandlerList(Events.STARTED)
    for handler in HANDLERS:
        handler_list.add(registered(handler))
    handler_list.firing = 1
    under_way = handler_list.registrations
    handler_list.remove(second)
    handler_list.add(registered(first))
    assert handler_list.registrations is under_way
    assert handlers_of(handler_list) == [first, second, third, first]


def test_waking_makes_all_but_the_removed_handlers_due() -> None:
    handler_list = HandlerList(Events.ITERATION_STARTED)
    kept, removed = registered(first, Events.ITERATION_STARTED(every=5)), registered(second)
    handler_list.add(kept)
    handler_list.add(removed)
    handler_list.firing = 1
    handler_list.remove(second)
    kept.due = handler_list.due = 5
    handler_list.wake()
    assert (kept.due, removed.due, handler_list.due) == (ALWAYS, REMOVED, ALWAYS)


def test_a_pickled_list_has_the_handlers_that_are_left_all_of_them_due() -> None:
    handler_list = HandlerList(Events.STARTED)
    for handler in HANDLERS:
        handler_list.add(registered(handler))
    handler_list.firing, handler_list.due = 1, 7
    handler_list.remove(second)
    copy = pickle.loads(pickle.dumps(handler_list))
    assert (copy.event, handlers_of(copy)) == (Events.STARTED, [first, third])
    assert (copy.firing, copy.stale, copy.due) == (0, False, ALWAYS)


@pytest.mark.parametrize(
    ("event", "handler", "kwargs", "takes_engine", "bare"),
    [
        (Events.STARTED, first, {}, True, True),
        (Events.STARTED, lambda: None, {}, False, False),
        (Events.STARTED, lambda engine, a: None, {"a": 1}, True, False),
        (Events.EXCEPTION_RAISED, lambda engine, error: None, {}, True, False),
        (Events.EXCEPTION_RAISED, lambda error: None, {}, False, False),
        (Events.TERMINATE_SINGLE_EPOCH, lambda engine, iter_counter: None, {}, True, False),
    ],
)
def test_only_a_handler_of_the_engine_alone_is_bare(
    event: Event, handler: Any, kwargs: dict[str, int], takes_engine: bool, bare: bool
) -> None:
    registration = registered(handler, event, **kwargs)
    assert (registration.takes_engine, registration.bare) == (takes_engine, bare)
    assert registration.due == ALWAYS


def test_only_a_filter_of_numbers_gives_the_next_value() -> None:
    numeric = registered(first, Events.ITERATION_STARTED(every=4)).following
    assert numeric is not None
    assert numeric(5) == 8
    assert registered(first, Events.ITERATION_STARTED(event_filter=lambda engine, value: True)).following is None
    assert registered(first).following is None


@pytest.mark.usefixtures("no_collector")
def test_a_method_of_the_engine_itself_does_not_keep_it_alive() -> None:
    owner, other = Owner(), Owner()
    registration = registered(owner.handle, engine=owner)
    assert isinstance(registration.function, OwnMethod)
    assert registration.function == owner.handle == registration.function
    assert registration.function == OwnMethod(owner.handle)
    assert hash(registration.function) == hash(OwnMethod(owner.handle))
    assert registration.function != OwnMethod(other.handle)
    assert registration.function != other.handle
    assert registration.function(3) == (owner, 3)
    assert registered(other.handle, engine=owner).function == other.handle
    reference = weakref.ref(owner)
    del owner
    assert reference() is None


def test_a_pickled_method_belongs_to_the_pickled_engine() -> None:
    owner = Owner()
    copied_owner, copied_method = pickle.loads(pickle.dumps((owner, OwnMethod(owner.handle))))
    assert copied_method(2) == (copied_owner, 2)
