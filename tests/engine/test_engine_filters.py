"""Filters: the firings at which a handler is called, and the cost of a handler that is not due."""

import functools
import sys

import pytest

from disttrain.engine import Engine, Events


def idle():
    return Engine(lambda engine, batch: None)


@pytest.mark.parametrize("event", [Events.ITERATION_STARTED, Events.ITERATION_COMPLETED])
def test_filters_of_iterations_over_epochs(event):
    engine, seen = idle(), []
    add = functools.partial(engine.add_event_handler, handler=lambda e, kind: seen.append((kind, e.state.iteration)))
    for kind, arguments in {
        "every": {"every": 4},
        "once": {"once": [3, 7]},
        "window": {"after": 5, "before": 8},
        "from": {"after": 1, "every": 3},
        "filter": {"event_filter": lambda e, v: v % 5 == 0},
    }.items():
        add(event(**arguments), kind=kind)
    engine.run(range(3), max_epochs=3)
    assert [i for kind, i in seen if kind == "every"] == [4, 8]
    assert [i for kind, i in seen if kind == "once"] == [3, 7]
    assert [i for kind, i in seen if kind == "window"] == [6, 7]
    assert [i for kind, i in seen if kind == "from"] == [2, 5, 8]
    assert [i for kind, i in seen if kind == "filter"] == [5]
    assert [i for _, i in seen] == sorted(i for _, i in seen)


def test_filters_of_fetching_go_by_the_iterations_before():
    engine, seen = idle(), []
    engine.add_event_handler(Events.GET_BATCH_STARTED(every=2), lambda e: seen.append(("s", e.state.iteration)))
    engine.add_event_handler(Events.GET_BATCH_COMPLETED(once=2), lambda e: seen.append(("c", e.state.iteration)))
    engine.run(range(4))
    assert seen == [("s", 0), ("s", 2), ("c", 2)]


@pytest.mark.parametrize("event", [Events.EPOCH_STARTED, Events.EPOCH_COMPLETED])
def test_filters_of_epochs(event):
    engine, seen = idle(), []
    engine.add_event_handler(event(every=2), lambda e: seen.append(e.state.epoch))
    engine.add_event_handler(event(once=3), lambda e: seen.append(e.state.epoch))
    engine.run([1], max_epochs=5)
    assert seen == [2, 3, 4]


def test_filters_of_started_and_completed_go_by_the_epoch():
    engine, seen = idle(), []
    engine.add_event_handler(Events.STARTED(every=2), lambda e: seen.append("started"))
    engine.add_event_handler(Events.COMPLETED(once=2), lambda e: seen.append("completed"))
    engine.run([1], max_epochs=1)
    assert seen == ["started"]
    engine.run([1], max_epochs=2)
    assert seen == ["started", "completed"]


def test_filters_start_again_with_the_counters():
    engine, seen = idle(), []
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda e: seen.append(e.state.iteration))
    for _ in range(3):
        engine.run(range(3))
    assert seen == [2, 2, 2]


def test_filters_follow_counters_that_a_handler_moves():
    engine, seen = idle(), []
    engine.add_event_handler(Events.ITERATION_STARTED(every=10), lambda e: seen.append(e.state.iteration))

    jumps = {2: 8, 12: 0, 3: 3}

    @engine.on(Events.ITERATION_COMPLETED)
    def jump(engine):
        engine.state.iteration = jumps.pop(engine.state.iteration, engine.state.iteration)

    engine.run(range(100), max_iters=21)
    assert seen == [10, 10, 20]


def test_firing_by_hand_does_not_use_up_the_loops_own_firing():
    engine, seen = idle(), []
    engine.add_event_handler(Events.GET_BATCH_STARTED(once=1), lambda e: seen.append(e.last_event_name))
    engine.add_event_handler(Events.ITERATION_STARTED(once=1), lambda e: e.fire_event(Events.GET_BATCH_STARTED))
    engine.run(range(3))
    assert seen == [Events.GET_BATCH_STARTED] * 2


def calls_made(run):
    """Return the number of functions, builtin or not, that a call of `run` calls."""
    count = 0

    def profile(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count


def calls_added(*events):
    """Return the number of calls that handlers of these events add to 10,000 iterations at which none is due."""
    bare, engine = idle(), idle()
    for event in events:
        engine.add_event_handler(event, print)
    return calls_made(lambda: engine.run(range(10_000))) - calls_made(lambda: bare.run(range(10_000)))


@pytest.mark.parametrize(
    "arguments", [{"every": 20_000}, {"once": 20_000}, {"once": [*range(10_001, 12_001)]}, {"after": 10_000}]
)
def test_a_handler_that_is_not_due_costs_no_call(arguments):
    assert calls_added(*[Events.ITERATION_COMPLETED(**arguments)] * 5) < 100
    assert calls_added(Events.GET_BATCH_COMPLETED(**arguments), Events.ITERATION_STARTED(**arguments)) < 100


def test_a_handler_whose_window_is_over_costs_no_call():
    engine = idle()
    engine.add_event_handler(Events.ITERATION_COMPLETED(before=2), lambda: None)
    bare = calls_made(lambda: idle().run(range(10_000)))
    assert calls_made(lambda: engine.run(range(10_000))) - bare < 100


def test_an_iteration_without_handlers_calls_only_next_and_the_process_function():
    engine = idle()
    assert calls_made(lambda: engine.run(range(10_000))) < 20_000 + 200


def test_many_onces_cost_as_many_calls_as_one():
    few, many = (calls_added(Events.ITERATION_STARTED(once=once)) for once in (20_000, [*range(20_000, 22_000)]))
    assert many == few
