"""Handlers: how they are called, added, removed; custom events; filters at work."""

import functools
import sys
from unittest.mock import MagicMock

import pytest

from disttrain.engine import Engine, EventEnum, Events, EventsList


class Mine(EventEnum):
    LOSS = "loss"
    STARTED = "started"


class Theirs(EventEnum):
    LOSS = "loss"


def idle():
    return Engine(lambda engine, batch: None)


def test_process_function_is_called_with_the_engine_and_the_batch():
    seen = []
    engine = Engine(lambda engine, batch: seen.append((engine, batch)))
    engine.run([5])
    assert seen == [(engine, 5)]


@pytest.mark.parametrize("wrong", [None, 3, lambda: None, lambda engine: None, lambda a, b, c: None])
def test_process_function_must_take_two_arguments(wrong):
    with pytest.raises(ValueError, match="process_function"):
        Engine(wrong)


@pytest.mark.parametrize("right", [lambda *a: None, lambda a, b, c=None: None, functools.partial(lambda x, a, b: 1, 1)])
def test_process_function_that_can_take_two_is_taken(right):
    assert Engine(right).run([1]).iteration == 1


def test_attributes_of_a_fresh_engine():
    engine = idle()
    assert engine.state.iteration == 0
    assert engine.last_event_name is None
    assert engine.should_terminate is engine.should_terminate_single_epoch is engine.should_interrupt is False
    assert engine.logger.name.endswith("Engine")
    assert engine.state_dict_user_keys == []
    engine.state_dict_user_keys.append("alpha")
    assert engine.state_dict_user_keys == ["alpha"]
    with pytest.raises(AttributeError):
        engine.state_dict_user_keys = []


def test_engine_is_passed_first_if_the_handler_takes_it():
    engine, seen = idle(), []
    for handler, args in (
        (lambda: seen.append(()), ()),
        (lambda e: seen.append((e,)), ()),
        (lambda *a: seen.append(a), ()),
        (lambda a, b: seen.append((a, b)), (1, 2)),
        (lambda e, a, b: seen.append((e, a, b)), (1, 2)),
        (lambda e, a=5: seen.append((e, a)), ()),
    ):
        engine.add_event_handler(Events.STARTED, handler, *args)
    engine.add_event_handler(Events.STARTED, seen.append, "x")
    engine.fire_event(Events.STARTED)
    assert seen == [(), (engine,), (engine,), (1, 2), (engine, 1, 2), (engine, 5), "x"]


def test_handler_gets_its_keyword_arguments():
    engine, seen = idle(), []
    engine.add_event_handler(Events.STARTED, lambda e, a, *, b: seen.append((a, b)), 1, b=2)
    engine.add_event_handler(Events.STARTED, lambda *, b: seen.append(b), b=3)
    engine.fire_event(Events.STARTED)
    assert seen == [(1, 2), 3]


def test_on_adds_the_decorated_function_and_returns_it():
    engine, seen = idle(), []

    @engine.on(Events.STARTED, 1, b=2)
    def handler(engine, a, b):
        seen.append((a, b))

    engine.fire_event(Events.STARTED)
    assert seen == [(1, 2)]
    assert engine.has_event_handler(handler, Events.STARTED)


def test_exception_raised_adds_the_exception():
    engine, seen = Engine(lambda engine, batch: 1 / 0), []
    engine.add_event_handler(Events.EXCEPTION_RAISED, lambda e, error: seen.append((e, type(error))))
    engine.add_event_handler(Events.EXCEPTION_RAISED, lambda error: seen.append(type(error)))
    engine.add_event_handler(Events.EXCEPTION_RAISED, lambda e, error, a, b: seen.append((a, b)), 1, b=2)
    engine.run([1])
    assert seen == [(engine, ZeroDivisionError), ZeroDivisionError, (1, 2)]


def test_terminate_single_epoch_adds_iter_counter():
    engine, seen = idle(), []
    engine.add_event_handler(Events.TERMINATE_SINGLE_EPOCH, lambda e, iter_counter: seen.append((e, iter_counter)))
    engine.add_event_handler(Events.TERMINATE_SINGLE_EPOCH, lambda iter_counter: seen.append(iter_counter))
    engine.add_event_handler(Events.TERMINATE_SINGLE_EPOCH, lambda e, a, iter_counter: seen.append(a), "a")
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=3), lambda e: e.terminate_epoch())
    engine.run(range(5))
    assert seen == [(engine, 3), 3, "a"]


@pytest.mark.parametrize(
    ("event", "handler", "args", "kwargs"),
    [
        (Events.STARTED, lambda e, a: None, (), {}),
        (Events.STARTED, lambda e: None, (1, 2), {}),
        (Events.STARTED, lambda e: None, (), {"a": 1}),
        (Events.STARTED, lambda e, *, a: None, (), {}),
        (Events.EXCEPTION_RAISED, lambda: None, (), {}),
        (Events.EXCEPTION_RAISED, lambda e, error, more: None, (), {}),
        (Events.TERMINATE_SINGLE_EPOCH, lambda e: None, (), {}),
        (Events.TERMINATE_SINGLE_EPOCH, lambda: None, (), {}),
        (Events.TERMINATE_SINGLE_EPOCH, lambda e, iter_counter: None, (), {"iter_counter": 3}),
        (Events.STARTED | Events.EXCEPTION_RAISED, lambda: None, (), {}),
        (Events.STARTED, None, (), {}),
        (Events.STARTED, "handler", (), {}),
        (Events.STARTED, dict, (), {}),
    ],
)
def test_handler_that_does_not_fit_is_refused_when_it_is_added(event, handler, args, kwargs):
    engine = idle()
    with pytest.raises(ValueError, match="handler"):
        engine.add_event_handler(event, handler, *args, **kwargs)
    with pytest.raises(ValueError, match="handler"):
        engine.on(event, *args, **kwargs)(handler)
    assert not engine.has_event_handler(handler)


@pytest.mark.parametrize("event", ["LOSS", Mine.LOSS, None, 3, Events.STARTED | Mine.LOSS, [Events.STARTED]])
def test_event_that_is_not_registered_is_refused(event):
    engine = idle()
    with pytest.raises(ValueError, match="registered event"):
        engine.add_event_handler(event, print)
    assert not engine.has_event_handler(print)
    if not isinstance(event, EventsList):
        with pytest.raises(ValueError, match="registered event"):
            engine.fire_event(event)


def test_the_same_handler_may_be_added_twice():
    engine, handler = idle(), MagicMock()
    engine.add_event_handler(Events.STARTED, handler)
    engine.add_event_handler(Events.STARTED, handler)
    engine.fire_event(Events.STARTED)
    assert handler.call_count == 2


def test_handlers_run_in_the_order_they_were_added():
    engine, seen = idle(), []
    for i in range(5):
        engine.add_event_handler(Events.STARTED, seen.append, i)
    engine.fire_event(Events.STARTED)
    assert seen == [0, 1, 2, 3, 4]


def test_handler_added_while_its_event_fires_runs_in_that_firing():
    engine, seen = idle(), []

    @engine.on(Events.ITERATION_STARTED(once=2))
    def add(engine):
        engine.add_event_handler(Events.ITERATION_STARTED, lambda: seen.append("now"))
        engine.add_event_handler(Events.ITERATION_STARTED(every=2), lambda: seen.append("even"))
        engine.add_event_handler(Events.ITERATION_COMPLETED(every=3), lambda: seen.append("later"))

    engine.run(range(4))
    assert seen == ["now", "even", "now", "later", "now", "even"]


def test_handler_added_during_its_firing_after_a_removal_runs_in_that_firing():
    engine, seen = idle(), []

    @engine.on(Events.STARTED)
    def replace(engine):
        engine.remove_event_handler(replace, Events.STARTED)
        engine.add_event_handler(Events.STARTED, lambda: seen.append("new"))

    engine.add_event_handler(Events.STARTED, lambda: seen.append("old"))
    engine.fire_event(Events.STARTED)
    assert seen == ["old", "new"]
    engine.fire_event(Events.STARTED)
    assert seen == ["old", "new", "old", "new"]


def test_handler_removed_before_its_turn_does_not_run():
    engine, seen = idle(), []
    later = MagicMock()
    engine.add_event_handler(Events.STARTED, lambda: engine.remove_event_handler(later, Events.STARTED))
    engine.add_event_handler(Events.STARTED, later)
    engine.add_event_handler(Events.STARTED, lambda: seen.append("after"))
    engine.fire_event(Events.STARTED)
    assert seen == ["after"]
    assert not later.called


def test_every_handler_runs_when_one_removes_itself():
    engine, seen = idle(), []

    def once(i):
        seen.append(i)
        handles[i].remove()

    handles = [engine.add_event_handler(Events.ITERATION_COMPLETED, functools.partial(once, i)) for i in range(4)]
    engine.run(range(3))
    assert seen == [0, 1, 2, 3]


def test_has_event_handler():
    engine = idle()
    engine.add_event_handler(Events.STARTED(every=3), print)
    assert engine.has_event_handler(print)
    assert engine.has_event_handler(print, Events.STARTED)
    assert engine.has_event_handler(print, "STARTED")
    assert engine.has_event_handler(print, Events.STARTED | Events.COMPLETED)
    assert not engine.has_event_handler(print, Events.COMPLETED)
    assert not engine.has_event_handler(print, Mine.LOSS)
    assert not engine.has_event_handler(len)


def test_remove_event_handler_removes_every_copy():
    engine, handler = idle(), MagicMock()
    for event in (Events.STARTED, Events.STARTED(every=1), Events.STARTED(every=3)):
        engine.add_event_handler(event, handler)
    engine.add_event_handler(Events.COMPLETED, handler)
    engine.remove_event_handler(handler, Events.STARTED)
    assert not engine.has_event_handler(handler, Events.STARTED)
    assert engine.has_event_handler(handler, Events.COMPLETED)
    engine.fire_event(Events.STARTED)
    assert not handler.called


def test_handle_removes_every_copy_too():
    engine, handler = idle(), MagicMock()
    engine.add_event_handler(Events.STARTED, handler)
    engine.add_event_handler(Events.STARTED, handler).remove()
    assert not engine.has_event_handler(handler)


@pytest.mark.parametrize("event", [Events.STARTED, Events.COMPLETED, Mine.LOSS, "nothing"])
def test_remove_event_handler_that_is_unknown(event):
    engine = idle()
    engine.add_event_handler(Events.COMPLETED, len)
    with pytest.raises(ValueError):
        engine.remove_event_handler(print, event)


def test_methods_are_handlers_too():
    class Log:
        def __init__(self):
            self.seen = []

        def write(self, engine):
            self.seen.append(engine.state.epoch)

        def __call__(self, word):
            self.seen.append(word)

    engine, log = idle(), Log()
    engine.add_event_handler(Events.EPOCH_STARTED, log.write)
    engine.add_event_handler(Events.EPOCH_STARTED, log, "called")
    engine.run([1], max_epochs=2)
    assert log.seen == [1, "called", 2, "called"]
    engine.remove_event_handler(log.write, Events.EPOCH_STARTED)
    assert not engine.has_event_handler(log.write)
    assert engine.has_event_handler(log)


def test_an_engines_own_method_is_a_handler_too():
    class Counting(Engine):
        def __init__(self):
            super().__init__(lambda engine, batch: None)
            self.count = 0
            self.add_event_handler(Events.ITERATION_COMPLETED(every=2), self.more)
            self.add_event_handler(Events.COMPLETED, self.more, 10)

        def more(self, step=1):
            self.count += step if isinstance(step, int) else 1

    engine = Counting()
    engine.run(range(6))
    assert engine.count == 13
    assert engine.has_event_handler(engine.more, Events.COMPLETED)
    engine.remove_event_handler(engine.more, Events.COMPLETED)
    assert not engine.has_event_handler(engine.more, Events.COMPLETED)
    assert not engine.has_event_handler(Counting().more)


def test_fire_event_calls_the_handlers_whose_filters_pass_now():
    engine, seen = idle(), []
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: seen.append("all"))
    engine.add_event_handler(Events.ITERATION_COMPLETED(every=3), lambda: seen.append("third"))
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=4), lambda: seen.append("fourth"))
    for engine.state.iteration in (3, 4, 4, 3):
        engine.fire_event(Events.ITERATION_COMPLETED)
    assert seen == ["all", "third", "all", "fourth", "all", "fourth", "all", "third"]
    assert engine.last_event_name is Events.ITERATION_COMPLETED
    seen.clear()
    engine.run(range(4))
    engine.fire_event(Events.ITERATION_COMPLETED)
    assert seen == ["all", "all", "all", "third", "all", "fourth", "all", "fourth"]


def test_registered_events():
    engine = idle()
    assert all(engine.has_registered_events(event) for event in Events)
    assert engine.has_registered_events(Events.STARTED(every=2))
    assert not engine.has_registered_events("loss")
    engine.register_events("loss", Mine.LOSS, "other")
    assert engine.has_registered_events("loss")
    assert engine.has_registered_events(Mine.LOSS)
    assert not engine.has_registered_events(Theirs.LOSS)
    assert not idle().has_registered_events(Mine.LOSS)
    assert not engine.has_registered_events([])


def test_custom_events_fire():
    engine, seen = idle(), []
    engine.register_events("after", Mine.LOSS)
    engine.add_event_handler("after", lambda e: seen.append("after"))
    engine.add_event_handler(Mine.LOSS | Events.STARTED, lambda e: seen.append(e.last_event_name))

    @engine.on(Events.ITERATION_COMPLETED)
    def fire(engine):
        engine.fire_event(Mine.LOSS)
        engine.fire_event("after")

    engine.run([1])
    assert seen == [Events.STARTED, Mine.LOSS, "after"]


@pytest.mark.parametrize("wrong", [3, None, object(), ("a", "b")])
def test_a_name_to_register_is_a_str_or_an_event_enum(wrong):
    with pytest.raises(TypeError, match="str or an EventEnum"):
        idle().register_events(wrong)


@pytest.mark.parametrize("wrong", ["losses", [Mine.LOSS], 3])
def test_event_to_attr_is_a_dict(wrong):
    with pytest.raises(ValueError, match="dict"):
        idle().register_events(Mine.LOSS, event_to_attr=wrong)


def test_mapped_attributes_start_at_0_and_filters_go_by_them():
    engine, seen = idle(), []
    engine.register_events(Mine.LOSS, "after", event_to_attr={Mine.LOSS: "losses", "after": "afters"})
    assert engine.state.losses == engine.state.afters == 0
    engine.add_event_handler(Mine.LOSS(every=3), lambda e: seen.append(e.state.losses))
    engine.add_event_handler(Mine.LOSS(once=[4, 2]), lambda e: seen.append(e.state.losses))
    for engine.state.losses in (1, 2, 3, 4, 3, 2, 6):
        engine.fire_event(Mine.LOSS)
    assert seen == [2, 3, 4, 3, 2, 6]


def test_mapped_attribute_that_exists_keeps_its_value():
    engine = idle()
    engine.state.losses = 7
    engine.register_events(Mine.LOSS, event_to_attr={Mine.LOSS: "losses"})
    assert engine.state.losses == 7


def test_mapping_survives_a_new_state():
    engine, seen = idle(), []
    engine.register_events(Mine.LOSS, event_to_attr={Mine.LOSS: "losses"})
    engine.state = type(engine.state)()
    engine.add_event_handler(Mine.LOSS(every=2), lambda e: seen.append(e.state.losses))

    @engine.on(Events.ITERATION_COMPLETED)
    def fire(engine):
        engine.state.losses += 1
        engine.fire_event(Mine.LOSS)

    engine.run(range(4))
    assert seen == [2, 4]


def test_filter_on_an_event_without_an_attribute_is_an_error_when_it_fires():
    engine = idle()
    engine.register_events(Mine.LOSS)
    engine.add_event_handler(Mine.LOSS(every=2), print)
    engine.add_event_handler(Events.TERMINATE(event_filter=lambda e, v: True), print)
    with pytest.raises(RuntimeError, match="attribute of the state"):
        engine.fire_event(Mine.LOSS)
    with pytest.raises(RuntimeError, match="attribute of the state"):
        engine.run([1, 2, 3], max_iters=2)


def test_two_enums_events_of_one_name_do_not_collide():
    engine, seen = idle(), []
    engine.register_events(*Mine, event_to_attr={Mine.LOSS: "mine"})
    engine.register_events(*Theirs, event_to_attr={Theirs.LOSS: "theirs"})
    for event in (Mine.LOSS(every=2), Theirs.LOSS(every=3), Mine.STARTED, Events.STARTED):
        engine.add_event_handler(event, seen.append, event)
    engine.state.mine, engine.state.theirs = 2, 3
    for event in (Mine.LOSS, Theirs.LOSS, Mine.STARTED, Events.STARTED):
        engine.fire_event(event)
        assert seen.pop() == event
        assert seen == []


def test_one_engines_mapping_never_leaks_into_anothers():
    one, other = idle(), idle()
    one.register_events(Mine.LOSS, event_to_attr={Mine.LOSS: "losses"})
    other.register_events(Mine.LOSS)
    assert not hasattr(other.state, "losses")
    with pytest.raises(RuntimeError):
        other.state.get_event_attrib_value(Mine.LOSS)


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


def calls_made(run):
    """Return how many functions, builtin or not, a call of `run` calls."""
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
    """Return the calls that handlers of these events add to a run of 10,000 iterations in which none is due."""
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
