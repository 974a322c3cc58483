"""Events, their filters, and lists of events."""

import pickle

import pytest

from disttrain.engine import CallableEventWithFilter, EventEnum, Events, EventsList
from disttrain.engine.events import NEVER, Listed, Periodic


class Other(EventEnum):
    STARTED = "started"
    LOSS = "loss_event"


def passing(event, values=range(31)):
    """Return the values at which the event's filter lets a handler be called."""
    return [value for value in values if event.filter(None, value)]


def test_events_are_these_13_valued_with_their_lower_case_names():
    names = """EPOCH_STARTED EPOCH_COMPLETED STARTED COMPLETED ITERATION_STARTED ITERATION_COMPLETED EXCEPTION_RAISED
        GET_BATCH_STARTED GET_BATCH_COMPLETED DATALOADER_STOP_ITERATION TERMINATE TERMINATE_SINGLE_EPOCH INTERRUPT"""
    assert {event.name: event.value for event in Events} == {name: name.lower() for name in names.split()}


def test_event_enum_is_the_base_of_users_enums():
    assert issubclass(Events, EventEnum)
    assert Other.LOSS.name == "LOSS"
    assert Other.LOSS.value == "loss_event"
    assert Other("loss_event") is Other.LOSS


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"event_filter": lambda e, v: True, "once": 1},
        {"event_filter": lambda e, v: True, "every": 2},
        {"event_filter": lambda e, v: True, "before": 2},
        {"once": 1, "every": 2},
        {"once": 1, "after": 2},
        {"event_filter": lambda e, v: True, "once": 1, "every": 2, "before": 3, "after": 4},
    ],
)
def test_filter_is_exactly_one_of_three_kinds(arguments):
    with pytest.raises(ValueError, match="exactly one of"):
        Events.ITERATION_STARTED(**arguments)


def test_every_before_and_after_go_together():
    assert passing(Events.ITERATION_STARTED(every=3, after=4, before=15)) == [5, 8, 11, 14]


@pytest.mark.parametrize("wrong", [1, "every", [lambda e, v: True]])
def test_event_filter_must_be_callable(wrong):
    with pytest.raises(TypeError, match="event_filter must be a callable"):
        Events.STARTED(event_filter=wrong)


@pytest.mark.parametrize("wrong", [lambda: True, lambda engine: True, lambda engine, event, more: True])
def test_event_filter_must_take_two_arguments(wrong):
    with pytest.raises(ValueError, match="two arguments"):
        Events.STARTED(event_filter=wrong)


@pytest.mark.parametrize("wrong", [0, -1, 1.5, "2", True])
def test_every_must_be_a_positive_integer(wrong):
    with pytest.raises(ValueError, match="every must be a positive integer"):
        Events.STARTED(every=wrong)


def test_every_1_means_no_filter():
    assert Events.STARTED(every=1).filter is None
    assert passing(Events.STARTED(every=1, after=28)) == [29, 30]


@pytest.mark.parametrize("wrong", [0, -1, 1.5, "2", [], (), [1, 0], [1, "2"], True])
def test_once_must_be_a_positive_integer_or_a_sequence_of_them(wrong):
    with pytest.raises(ValueError, match="once must be a positive integer"):
        Events.STARTED(once=wrong)


@pytest.mark.parametrize("name", ["before", "after"])
@pytest.mark.parametrize("wrong", [-1, 1.5, "2", False])
def test_before_and_after_must_be_integers_from_0(name, wrong):
    with pytest.raises(ValueError, match=f"{name} must be an integer of at least 0"):
        Events.STARTED(**{name: wrong})


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"every": 10}, [0, 10, 20, 30]),
        ({"once": 7}, [7]),
        ({"once": [9, 3, 3, 40]}, [3, 9]),
        ({"before": 3}, [0, 1, 2]),
        ({"before": 0}, []),
        ({"after": 27}, [28, 29, 30]),
        ({"after": 0, "before": 3}, [1, 2]),
        ({"after": 2, "every": 10}, [3, 13, 23]),
        ({"before": 15, "every": 10}, [0, 10]),
    ],
)
def test_meaning_of_the_numeric_filters(arguments, expected):
    assert passing(Events.ITERATION_COMPLETED(**arguments)) == expected


@pytest.mark.parametrize(
    "numeric",
    [Periodic(1, None, 5), Periodic(7, 20, None), Periodic(3, 18, 4), Periodic(4, 3, 9), Listed([3, 4, 19])],
)
def test_numeric_filter_gives_the_next_value_that_passes(numeric):
    for value in range(-3, 25):
        later = [later for later in range(value + 1, 60) if numeric(None, later)]
        assert numeric.following(value) == (later[0] if later else NEVER)


def test_call_gives_an_event_with_a_filter_and_leaves_the_member_alone():
    before = vars(Events.STARTED).copy()
    filtered = Events.STARTED(every=3)
    assert type(filtered) is CallableEventWithFilter
    assert (filtered.name, filtered.value) == ("STARTED", "started")
    assert filtered.filter is not None
    assert Events.STARTED.filter is None
    assert vars(Events.STARTED) == before


def test_the_event_holds_the_filter_that_was_passed():
    def sometimes(engine, event):
        return event % 5 == 1

    assert Events.STARTED(event_filter=sometimes).filter is sometimes
    assert Events.STARTED(sometimes).filter is sometimes


def test_events_are_equal_and_hashed_by_name_to_a_string_too():
    filtered = Events.STARTED(every=3)
    assert filtered == Events.STARTED == "STARTED" == filtered
    assert filtered == Events.STARTED(once=2)
    assert filtered != Events.COMPLETED
    assert Events.STARTED != "started"
    assert Events.STARTED != 3
    assert {Events.STARTED: 1}[filtered] == {"STARTED": 1}[filtered] == {filtered: 1}["STARTED"] == 1


def test_two_enums_events_of_one_name_are_different_events():
    assert Events.STARTED != Other.STARTED
    assert Events.STARTED(every=2) != Other.STARTED(every=2)
    assert Other.STARTED(every=2) == Other.STARTED == "STARTED"
    assert len({Events.STARTED, Other.STARTED}) == 2


def test_events_are_joined_to_a_list():
    joined = Events.STARTED | Events.COMPLETED | Events.ITERATION_STARTED(every=3)
    assert isinstance(joined, EventsList)
    assert len(joined) == 3
    assert list(joined) == [joined[0], joined[1], joined[2]] == ["STARTED", "COMPLETED", "ITERATION_STARTED"]
    assert joined[-1].filter is not None
    assert list(joined[:2]) == [Events.STARTED, Events.COMPLETED]
    assert list(Events.STARTED(every=2) | Other.LOSS) == ["STARTED", "LOSS"]


@pytest.mark.parametrize("wrong", ["COMPLETED", 1, None, lambda: None])
def test_only_events_are_joined(wrong):
    with pytest.raises(TypeError, match="expected an event"):
        Events.STARTED | wrong
    with pytest.raises(TypeError, match="expected an event"):
        Events.STARTED | Events.COMPLETED | wrong


def test_joining_leaves_both_sides_as_they_were():
    two = Events.STARTED | Events.COMPLETED
    three = two | Events.TERMINATE
    assert list(two) == [Events.STARTED, Events.COMPLETED]
    assert list(three) == [Events.STARTED, Events.COMPLETED, Events.TERMINATE]


def test_events_can_be_pickled():
    for event in (Events.STARTED, Other.LOSS, Events.STARTED(every=3, after=2), Events.STARTED(once=[3, 5])):
        copy = pickle.loads(pickle.dumps(event))
        assert copy == event
        assert copy.value == event.value
        if event.filter is not None:
            assert passing(copy) == passing(event)
    assert pickle.loads(pickle.dumps(Events.STARTED)) is Events.STARTED
