"""`terminate`, `terminate_epoch`, and the end at `max_iters`."""

import pytest
from recorded import IN_AN_ITERATION, INSIDE, at, log_of, recording

from disttrain.engine import Engine, EventEnum, Events


class Mine(EventEnum):
    LOSS = "loss"


@pytest.mark.parametrize("event", INSIDE)
def test_terminate_after_the_current_event(event):
    run = {"max_epochs": 3}
    whole = log_of(lambda engine: engine.run("ab", **run))
    position = [i for i, name in enumerate(whole) if name == event.name][:2][-1]
    engine, log = recording()
    at(engine, event, 1 if event is Events.STARTED else 2, Engine.terminate)
    engine.run("ab", **run)
    assert log == [*whole[: position + 1], "TERMINATE", "COMPLETED"]
    assert engine.should_terminate


def test_terminate_lets_the_current_event_finish():
    engine, seen = Engine(lambda engine, batch: None), []
    engine.add_event_handler(Events.ITERATION_STARTED, Engine.terminate)
    engine.add_event_handler(Events.ITERATION_STARTED, seen.append, "still called")
    engine.run("ab")
    assert seen == ["still called"]
    assert engine.state.output is None


@pytest.mark.parametrize("event", INSIDE)
def test_terminate_may_skip_completed(event):
    engine, log = recording()
    engine.add_event_handler(event, lambda engine: engine.terminate(skip_completed=True))
    engine.run("ab")
    assert log[-1] == "TERMINATE"
    assert "COMPLETED" not in log


def test_terminate_from_the_process_function_and_from_the_data():
    engine, log = recording(lambda engine, batch: engine.terminate() if batch == "b" else None)
    engine.run("abc")
    assert log[-5:] == ["ITERATION_STARTED", "b", "ITERATION_COMPLETED", "TERMINATE", "COMPLETED"]

    def data():
        yield "a"
        engine.terminate()
        yield "b"

    engine, log = recording()
    engine.run(data())
    assert log[-4:] == ["GET_BATCH_STARTED", "GET_BATCH_COMPLETED", "TERMINATE", "COMPLETED"]


@pytest.mark.parametrize("length", [None, 3])
def test_a_stop_requested_by_data_that_ends_comes_before_epoch_completed(length):
    def data():
        yield "a"
        engine.terminate()

    engine, log = recording()
    engine.run(data(), epoch_length=length)
    assert log[-3:] == ["DATALOADER_STOP_ITERATION" if length else "GET_BATCH_STARTED", "TERMINATE", "COMPLETED"]
    assert "EPOCH_COMPLETED" not in log


def test_a_stop_needs_no_handler_on_the_event_after_which_it_happens():
    seen = []

    def step(engine, batch):
        seen.append(batch)
        if batch == 3:
            engine.should_terminate = True

    Engine(step).run(range(10))
    assert seen == [0, 1, 2, 3]


def test_terminate_from_a_custom_event_inside_an_event():
    engine, log = recording()
    engine.register_events(*Mine)
    engine.add_event_handler(Mine.LOSS, Engine.terminate)
    at(engine, Events.ITERATION_STARTED, 2, lambda engine: engine.fire_event(Mine.LOSS))
    engine.run("abc")
    assert log[-3:] == ["ITERATION_STARTED", "TERMINATE", "COMPLETED"]


def test_terminate_from_an_event_of_the_loop_that_is_fired_by_hand():
    seen = []

    def step(engine, batch):
        seen.append(batch)
        engine.fire_event(Events.ITERATION_COMPLETED)

    engine = Engine(step)
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), Engine.terminate)
    engine.add_event_handler(Events.TERMINATE, lambda engine: seen.append(engine.last_event_name))
    engine.add_event_handler(Events.GET_BATCH_STARTED(after=0), seen.append, "fetch")
    engine.run("abcd")
    assert seen == ["a", "fetch", "b", Events.TERMINATE]


def test_a_stop_is_seen_though_the_events_last_handler_is_removed_after_it():
    seen = []

    def step(engine, batch):
        seen.append(batch)
        engine.terminate()
        handle.remove()

    engine = Engine(step)
    handle = engine.add_event_handler(Events.ITERATION_COMPLETED, seen.append, "completed")
    engine.add_event_handler(Events.GET_BATCH_STARTED, seen.append, "fetch")
    engine.run("ab")
    assert seen == ["fetch", "a"]


def test_terminate_before_a_run_is_forgotten():
    engine = Engine(lambda engine, batch: None)
    engine.terminate()
    engine.run("ab")
    assert engine.state.iteration == 2
    assert not engine.should_terminate


@pytest.mark.parametrize("event", [Events.TERMINATE, Events.COMPLETED])
@pytest.mark.parametrize("stop", [Engine.terminate, Engine.terminate_epoch, Engine.interrupt])
def test_a_stop_when_the_run_is_ending_comes_too_late(event, stop):
    engine, log = recording()
    engine.add_event_handler(event, lambda engine: stop(engine))
    engine.run("abc", max_iters=2)
    assert log[-2:] == ["TERMINATE", "COMPLETED"]
    engine.run("abc", max_iters=3)
    assert engine.state.iteration == 3


@pytest.mark.parametrize("event", [*IN_AN_ITERATION, Events.DATALOADER_STOP_ITERATION])
def test_terminate_epoch_after_the_current_event(event):
    run = {"max_epochs": 3, "epoch_length": 4}
    whole = log_of(lambda engine: engine.run("abc", **run))
    position = [i for i, name in enumerate(whole) if name == event.name][:2][-1]
    engine, log = recording()
    at(engine, event, 2, Engine.terminate_epoch)
    engine.run("abc", **run)
    assert log[: position + 4] == [
        *whole[: position + 1],
        "TERMINATE_SINGLE_EPOCH",
        "EPOCH_COMPLETED",
        "EPOCH_STARTED" if log.count("EPOCH_STARTED") > whole[: position + 1].count("EPOCH_STARTED") else "COMPLETED",
    ]
    assert engine.state.epoch == 3
    assert not engine.should_terminate_single_epoch


def test_terminate_epoch_takes_a_fresh_iterator_before_epoch_completed():
    seen = []

    class Data(list):
        def __iter__(self):
            seen.append("iter")
            return super().__iter__()

    engine = Engine(lambda engine, batch: seen.append((engine.state.epoch, batch)))
    at(engine, Events.ITERATION_COMPLETED, 2, Engine.terminate_epoch)
    engine.add_event_handler(Events.TERMINATE_SINGLE_EPOCH, lambda iter_counter: seen.append(iter_counter))
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda: seen.append("completed"))
    engine.run(Data(range(3)), max_epochs=2)
    first = ["iter", (1, 0), (1, 1), 2, "iter", "completed"]
    assert seen == [*first, (2, 0), (2, 1), (2, 2), "completed"]
    assert engine.state.iteration == 5


def test_terminate_epoch_may_skip_epoch_completed():
    engine, log = recording()
    at(engine, Events.ITERATION_COMPLETED, 1, lambda engine: engine.terminate_epoch(skip_epoch_completed=True))
    at(engine, Events.ITERATION_COMPLETED, 3, lambda engine: engine.terminate_epoch())
    engine.run("ab", max_epochs=3)
    assert log.count("EPOCH_COMPLETED") == 2
    assert log[log.index("TERMINATE_SINGLE_EPOCH") + 1] == "EPOCH_STARTED"
    assert log[-1] == "COMPLETED"


@pytest.mark.parametrize("event", [Events.STARTED, Events.EPOCH_STARTED])
def test_terminate_epoch_before_the_first_iteration_is_an_error(event):
    engine = Engine(lambda engine, batch: None)
    engine.add_event_handler(event, Engine.terminate_epoch)
    with pytest.raises(RuntimeError, match="terminate_epoch"):
        engine.run("ab")
    assert engine.state.iteration == 0
    engine.remove_event_handler(Engine.terminate_epoch, event)
    engine.run("ab", max_epochs=2)
    assert engine.state.epoch == 2


def test_terminate_epoch_in_epoch_completed_is_ignored():
    run = {"max_epochs": 2}
    engine, log = recording()
    engine.add_event_handler(Events.EPOCH_COMPLETED, Engine.terminate_epoch)
    engine.run("ab", **run)
    assert log == log_of(lambda engine: engine.run("ab", **run))


def test_terminate_wins_over_terminate_epoch_over_interrupt():
    engine, log = recording()

    def all_three(engine):
        engine.interrupt()
        engine.terminate_epoch()
        engine.terminate()

    at(engine, Events.ITERATION_STARTED, 1, all_three)
    engine.run("ab")
    assert log[-3:] == ["ITERATION_STARTED", "TERMINATE", "COMPLETED"]

    engine, log = recording()
    at(engine, Events.ITERATION_STARTED, 1, lambda engine: (engine.interrupt(), engine.terminate_epoch()))
    engine.run("ab")
    assert log[-3:] == ["ITERATION_STARTED", "TERMINATE_SINGLE_EPOCH", "INTERRUPT"]
    engine.run()
    assert log[-3:] == ["INTERRUPT", "EPOCH_COMPLETED", "COMPLETED"]


def test_terminate_in_terminate_single_epoch():
    engine, log = recording()
    engine.add_event_handler(Events.TERMINATE_SINGLE_EPOCH, lambda engine, iter_counter: engine.terminate())
    at(engine, Events.ITERATION_COMPLETED, 1, Engine.terminate_epoch)
    engine.run("ab")
    assert log[-3:] == ["TERMINATE_SINGLE_EPOCH", "TERMINATE", "COMPLETED"]


def test_max_iters_inside_an_epoch():
    engine, log = recording()
    engine.run("abc", max_iters=5)
    assert log[-4:] == ["b", "ITERATION_COMPLETED", "TERMINATE", "COMPLETED"]
    assert engine.state.iteration == engine.state.max_iters == 5
    assert engine.state.max_epochs is None


def test_max_iters_on_an_epochs_boundary():
    engine, log = recording()
    engine.run("abc", max_iters=6)
    assert log[-4:] == ["c", "ITERATION_COMPLETED", "EPOCH_COMPLETED", "COMPLETED"]
    assert "TERMINATE" not in log
    assert engine.state.iteration == 6
