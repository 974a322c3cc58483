"""Handlers: how they are called, added and removed, also by a handle."""

import functools
import weakref
from unittest.mock import MagicMock

import pytest

from disttrain.engine import Engine, EventEnum, Events, EventsList, RemovableEventHandle


class Mine(EventEnum):
    LOSS = "loss"


def idle():
    return Engine(lambda engine, batch: None)


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


@pytest.mark.parametrize("also", [lambda engine: None, Engine.terminate, Engine.interrupt])
def test_a_handler_removed_in_a_firing_is_gone_at_once_whatever_stop_is_requested(also):
    engine, later, had = idle(), MagicMock(), []

    @engine.on(Events.ITERATION_STARTED)
    def remove(engine):
        engine.remove_event_handler(later, Events.ITERATION_STARTED)
        had.append(engine.has_event_handler(later))
        also(engine)

    engine.add_event_handler(Events.ITERATION_STARTED, later)
    engine.run([1])
    assert had == [False]
    assert not later.called


def test_handlers_removed_and_added_in_firings_inside_firings():
    engine, seen = idle(), []
    engine.register_events("again")

    def outer(engine):
        if seen == []:
            seen.append("outer")
            engine.fire_event("again")
            engine.add_event_handler("again", seen.append, "new")

    def inner(engine):
        seen.append("inner")
        engine.remove_event_handler(inner, "again")

    engine.add_event_handler("again", outer)
    engine.add_event_handler("again", inner)
    engine.add_event_handler("again", seen.append, "last")
    engine.fire_event("again")
    assert seen == ["outer", "inner", "last", "last", "new"]


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


class Counter:
    def __init__(self):
        self.calls = 0

    def count(self):
        self.calls += 1


def test_handle_removes_any_number_of_times():
    engine, counter = idle(), Counter()
    handle = engine.add_event_handler(Events.STARTED, counter.count)
    assert isinstance(handle, RemovableEventHandle)
    engine.fire_event(Events.STARTED)
    for _ in range(3):
        handle.remove()
        assert not engine.has_event_handler(counter.count)
    engine.fire_event(Events.STARTED)
    assert counter.calls == 1


def test_handle_of_several_events_removes_from_all():
    engine, counter = idle(), Counter()
    events = Events.STARTED | Events.COMPLETED(every=2)
    handle = engine.add_event_handler(events, counter.count)
    engine.remove_event_handler(counter.count, Events.STARTED)
    handle.remove()
    assert not engine.has_event_handler(counter.count)


def test_handle_is_a_context_manager_that_removes_on_exit():
    engine, counter = idle(), Counter()
    with engine.add_event_handler(Events.ITERATION_STARTED, counter.count) as handle:
        assert isinstance(handle, RemovableEventHandle)
        engine.run([1, 2, 3])
    engine.run([1, 2, 3])
    assert counter.calls == 3
    with pytest.raises(ZeroDivisionError), engine.add_event_handler(Events.STARTED, counter.count):
        1 / 0
    assert not engine.has_event_handler(counter.count)


@pytest.mark.usefixtures("no_collector")
def test_handle_keeps_neither_engine_nor_handler_alive():
    engine, counter = idle(), Counter()
    handle = engine.add_event_handler(Events.STARTED, counter.count)
    assert handle.handler() == counter.count
    assert handle.engine() is engine
    gone = weakref.ref(engine), weakref.ref(counter)
    engine.remove_event_handler(counter.count, Events.STARTED)
    del counter
    assert gone[1]() is None
    del engine
    assert gone[0]() is None
    handle.remove()
    assert handle.handler() is handle.engine() is None


@pytest.mark.parametrize("handler", [print, [].append, len, str.upper])
def test_handle_of_a_builtin(handler):
    engine = idle()
    engine.add_event_handler(Events.STARTED, handler).remove()
    assert not engine.has_event_handler(handler)
