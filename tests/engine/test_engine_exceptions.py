"""Exceptions: raised to the caller, or passed to the handlers of EXCEPTION_RAISED."""

import logging
import traceback

import pytest

from disttrain.engine import Engine, Events

INSIDE_THE_LOOP = [
    Events.GET_BATCH_STARTED,
    Events.GET_BATCH_COMPLETED,
    Events.ITERATION_STARTED,
    Events.ITERATION_COMPLETED,
    Events.DATALOADER_STOP_ITERATION,
]
OUTSIDE_THE_LOOP = [Events.STARTED, Events.EPOCH_STARTED, Events.EPOCH_COMPLETED, Events.COMPLETED]
RECORDED = [e for e in Events if e not in (Events.TERMINATE_SINGLE_EPOCH, Events.EXCEPTION_RAISED)]


class Problem(Exception):
    pass


def recording(process=lambda engine, batch: None):
    log = []
    engine = Engine(process)
    for event in RECORDED:
        engine.add_event_handler(event, lambda engine, name=event.name: log.append(name))
    return engine, log


def fails(*args, **kwargs):
    raise Problem("a problem")


def fails_once(kind=Problem):
    left = [1]

    def fail(*args):
        if left:
            left.pop()
            raise kind("once")

    return fail


@pytest.mark.parametrize("event", [*INSIDE_THE_LOOP, *OUTSIDE_THE_LOOP])
@pytest.mark.parametrize("kind", [Problem, KeyboardInterrupt, SystemExit, StopIteration])
def test_without_a_handler_an_exception_propagates(event, kind):
    engine, log = recording()
    engine.add_event_handler(event, fails_once(kind))
    with pytest.raises(kind, match="once"):
        engine.run("ab", max_epochs=2)
    assert log[-1] == event.name


def test_the_traceback_leads_to_where_it_was_raised():
    engine = Engine(fails)
    with pytest.raises(Problem) as caught:
        engine.run([1])
    names = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert names[-1] == "fails"
    assert names.count("fails") == 1
    assert caught.value.__context__ is None


@pytest.mark.parametrize("event", INSIDE_THE_LOOP)
def test_raised_by_a_handler_inside_the_loop_it_is_swallowed_and_the_next_epoch_runs(event):
    engine, log = recording()
    seen = []
    engine.add_event_handler(event, fails_once())
    engine.add_event_handler(Events.EXCEPTION_RAISED, lambda engine, error: seen.append(error))
    engine.run("ab", max_epochs=3)
    assert [type(error) for error in seen] == [Problem]
    after = log[log.index(event.name) + 1 :]
    if event is Events.DATALOADER_STOP_ITERATION:
        assert after[:3] == ["EPOCH_COMPLETED", "EPOCH_STARTED", "GET_BATCH_STARTED"]
    else:
        assert after[:2] == ["EPOCH_COMPLETED", "EPOCH_STARTED"]
    assert log.count("EPOCH_COMPLETED") == log.count("EPOCH_STARTED") == 3
    assert log[-1] == "COMPLETED"
    assert engine.state.epoch == 3


def test_raised_by_the_process_function_and_the_data():
    def data():
        yield "a"
        raise Problem("in the data")

    for process, batches in ((fails, "ab"), (lambda engine, batch: None, data())):
        engine, log = recording(process)
        seen = []
        engine.add_event_handler(Events.EXCEPTION_RAISED, lambda engine, error, seen=seen: seen.append(error))
        engine.run(batches, epoch_length=2)
        assert [type(error) for error in seen] == [Problem]
        assert log[-2:] == ["EPOCH_COMPLETED", "COMPLETED"]


def test_the_next_epoch_goes_on_with_the_same_iterator():
    seen = []

    def process(engine, batch):
        seen.append((engine.state.epoch, batch))
        if batch == 1:
            raise Problem

    engine = Engine(process)
    engine.add_event_handler(Events.EXCEPTION_RAISED, lambda engine, error: None)
    engine.run(iter(range(100)), max_epochs=2, epoch_length=3)
    assert seen == [(1, 0), (1, 1), (2, 2), (2, 3), (2, 4)]


def test_each_handler_is_called_once_with_it():
    engine, seen = Engine(fails), []
    engine.add_event_handler(Events.EXCEPTION_RAISED, lambda engine, error: seen.append(("first", error)))
    engine.add_event_handler(Events.EXCEPTION_RAISED, lambda engine, error: seen.append(("second", error)))
    engine.run([1])
    assert [name for name, _ in seen] == ["first", "second"]
    assert seen[0][1] is seen[1][1]


@pytest.mark.parametrize("event", OUTSIDE_THE_LOOP)
def test_raised_outside_the_loop_the_run_ends_without_completed(event):
    engine, log = recording()
    seen = []
    engine.add_event_handler(event, fails_once())
    engine.add_event_handler(Events.EXCEPTION_RAISED, lambda engine, error: seen.append(error))
    state = engine.run("ab", max_epochs=2)
    assert state is engine.state
    assert [type(error) for error in seen] == [Problem]
    assert log[-1] == event.name
    assert log.count("COMPLETED") == (event is Events.COMPLETED)


def test_terminate_whose_handler_raises_ends_the_run_without_completed():
    engine, log = recording()
    engine.add_event_handler(Events.TERMINATE, fails_once())
    engine.add_event_handler(Events.EXCEPTION_RAISED, lambda engine, error: None)
    engine.add_event_handler(Events.ITERATION_STARTED(once=1), lambda engine: engine.terminate())
    engine.run("ab", max_epochs=2)
    assert log[-2:] == ["ITERATION_STARTED", "TERMINATE"]


@pytest.mark.parametrize("event", [Events.TERMINATE_SINGLE_EPOCH, Events.INTERRUPT])
def test_stops_inside_the_loop_whose_handlers_raise_end_the_epoch(event):
    engine, log = recording()
    stop = Engine.interrupt if event is Events.INTERRUPT else Engine.terminate_epoch
    engine.add_event_handler(event, lambda engine, iter_counter=None: fails())
    engine.add_event_handler(Events.EXCEPTION_RAISED, lambda engine, error: None)
    engine.add_event_handler(Events.ITERATION_STARTED(once=1), lambda engine: stop(engine))
    engine.run("ab", max_epochs=2)
    assert log[log.index("ITERATION_STARTED") :][:3] in (
        ["ITERATION_STARTED", "EPOCH_COMPLETED", "EPOCH_STARTED"],
        ["ITERATION_STARTED", "INTERRUPT", "EPOCH_COMPLETED"],
    )
    assert log[-1] == "COMPLETED"


def test_data_that_cannot_be_iterated_ends_the_run():
    class Broken:
        def __iter__(self):
            raise Problem("no iterator")

    engine, log = recording()
    with pytest.raises(Problem):
        engine.run(Broken(), epoch_length=2)
    engine.add_event_handler(Events.EXCEPTION_RAISED, lambda engine, error: None)
    engine.state.max_epochs = None
    log.clear()
    engine.run(Broken(), epoch_length=2)
    assert log == ["STARTED", "EPOCH_STARTED"]


@pytest.mark.parametrize("event", [*INSIDE_THE_LOOP, *OUTSIDE_THE_LOOP])
def test_keyboard_interrupt_anywhere_ends_the_run_without_completed(event):
    engine, log = recording()
    seen = []
    engine.add_event_handler(event, fails_once(KeyboardInterrupt))
    engine.add_event_handler(Events.EXCEPTION_RAISED, lambda engine, error: seen.append(type(error)))
    assert engine.run("ab", max_epochs=2) is engine.state
    assert seen == [KeyboardInterrupt]
    assert log[-1] == event.name


def test_system_exit_is_passed_to_the_handlers_and_raised():
    seen = []
    engine = Engine(fails_once(SystemExit))
    engine.add_event_handler(Events.EXCEPTION_RAISED, lambda engine, error: seen.append(type(error)))
    with pytest.raises(SystemExit):
        engine.run("ab")
    assert seen == [SystemExit]


@pytest.mark.parametrize("event", [Events.ITERATION_STARTED, Events.EPOCH_STARTED])
def test_a_handler_that_raises_ends_the_run_with_what_it_raised(event):
    engine, log = recording()
    calls = []

    def worse(engine, error):
        calls.append("worse")
        raise KeyError("worse") from error

    engine.add_event_handler(event, fails)
    engine.add_event_handler(Events.EXCEPTION_RAISED, worse)
    engine.add_event_handler(Events.EXCEPTION_RAISED, lambda engine, error: calls.append("after"))
    with pytest.raises(KeyError, match="worse") as caught:
        engine.run("ab")
    assert isinstance(caught.value.__cause__, Problem)
    assert calls == ["worse"]
    assert log[-1] == event.name


def test_a_handler_may_raise_the_exception_again():
    engine, calls = Engine(fails), []

    @engine.on(Events.EXCEPTION_RAISED)
    def again(engine, error):
        calls.append(error)
        raise error

    with pytest.raises(Problem) as caught:
        engine.run("ab")
    assert calls == [caught.value]
    names = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert names[-1] == "fails"
    assert "again" not in names


def test_after_the_last_handler_is_removed_it_propagates_again():
    engine = Engine(fails)
    handle = engine.add_event_handler(Events.EXCEPTION_RAISED, lambda engine, error: None)
    engine.run([1])
    handle.remove()
    with pytest.raises(Problem):
        engine.run([1])


def test_a_filter_that_has_nothing_to_compare_with_does_not_lose_the_exception():
    engine = Engine(fails)
    engine.add_event_handler(Events.EXCEPTION_RAISED(event_filter=lambda e, v: False), lambda engine, error: None)
    with pytest.raises(RuntimeError, match="attribute of the state") as caught:
        engine.run([1])
    assert isinstance(caught.value.__context__, Problem)


@pytest.mark.parametrize("event", [*INSIDE_THE_LOOP, *OUTSIDE_THE_LOOP])
def test_after_an_uncaught_exception_the_next_run_works(event):
    engine, log = recording()
    engine.add_event_handler(event, fails_once())
    with pytest.raises(Problem):
        engine.run("ab", max_epochs=2)
    epoch = engine.state.epoch
    log.clear()
    state = engine.run("ab", max_epochs=2)
    assert state.epoch == 2
    assert log[0] == "STARTED"
    assert log[-1] == "COMPLETED"
    assert log.count("EPOCH_STARTED") == 2 - epoch % 2


def test_the_run_after_an_uncaught_exception_goes_on_with_the_next_epoch():
    seen = []

    def process(engine, batch):
        seen.append((engine.state.epoch, batch))
        if len(seen) == 2:
            raise Problem

    engine = Engine(process)
    with pytest.raises(Problem):
        engine.run("abc", max_epochs=2)
    engine.run("xyz", max_epochs=2)
    assert seen == [(1, "a"), (1, "b"), (2, "x"), (2, "y"), (2, "z")]


def test_a_paused_run_after_which_data_fails_is_not_paused_any_more():
    engine = Engine(lambda engine, batch: engine.interrupt() if batch == "a" else fails())
    engine.run("ab", max_epochs=3)
    with pytest.raises(Problem):
        engine.run()
    assert engine.run("a").epoch == 2


def test_no_internal_exception_is_ever_passed_to_a_handler():
    seen = []

    def data():
        try:
            yield from "abcdef"
        finally:
            seen.append("closed")

    engine = Engine(lambda engine, batch: None)
    engine.add_event_handler(Events.EXCEPTION_RAISED, lambda engine, error: seen.append(error))
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=1), lambda engine: engine.terminate_epoch())
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda engine: engine.interrupt())
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=3), lambda engine: engine.terminate())
    engine.run(data(), max_epochs=3, epoch_length=2)
    engine.run()
    del engine
    assert seen == ["closed"]
    paused = Engine(lambda engine, batch: engine.interrupt())
    paused.add_event_handler(Events.EXCEPTION_RAISED, lambda engine, error: seen.append(error))
    paused.run(data(), epoch_length=2)
    del paused
    assert seen == ["closed", "closed"]


@pytest.mark.parametrize(
    ("stop", "then"), [(Engine.terminate, "TERMINATE"), (Engine.interrupt, "INTERRUPT")], ids=["terminate", "interrupt"]
)
def test_a_handler_of_the_exception_may_stop_the_run(stop, then):
    engine, log = recording(fails_once())
    engine.add_event_handler(Events.EXCEPTION_RAISED, lambda engine, error: stop(engine))
    engine.run("ab", max_epochs=2)
    assert log[log.index("ITERATION_STARTED") + 1] == then
    assert log[-1] == ("COMPLETED" if then == "TERMINATE" else "INTERRUPT")


def test_a_handler_of_the_exception_may_end_the_epoch_with_a_fresh_iterator():
    seen = []

    def process(engine, batch):
        seen.append(batch)
        if seen == ["a", "b"]:
            raise Problem

    engine = Engine(process)
    engine.add_event_handler(Events.EXCEPTION_RAISED, lambda engine, error: engine.terminate_epoch())
    engine.add_event_handler(Events.TERMINATE_SINGLE_EPOCH, lambda iter_counter: seen.append(iter_counter))
    engine.run("abc", max_epochs=2)
    assert seen == ["a", "b", 2, "a", "b", "c"]


@pytest.mark.parametrize("handled", [True, False])
def test_an_exception_is_logged_once_at_error_level_in_one_line(handled, caplog):
    engine = Engine(fails_once())
    if handled:
        engine.add_event_handler(Events.EXCEPTION_RAISED, lambda engine, error: None)
    with caplog.at_level(logging.DEBUG, logger=engine.logger.name):
        if handled:
            engine.run("ab")
        else:
            with pytest.raises(Problem):
                engine.run("ab")
    errors = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(errors) == 1
    assert errors[0].levelno == logging.ERROR
    assert errors[0].getMessage() == "Problem at epoch 1, iteration 1: once"
    assert errors[0].exc_info is None
