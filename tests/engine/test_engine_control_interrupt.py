"""`interrupt`: a run pauses, and the next `run` continues at that point."""

import pytest
from recorded import INSIDE, at, log_of, recording

from disttrain.engine import Engine, Events


@pytest.mark.parametrize("event", [*INSIDE, Events.DATALOADER_STOP_ITERATION])
@pytest.mark.parametrize("data", [True, False], ids=["data", "no data"])
def test_interrupt_pauses_and_the_next_run_goes_on_at_that_point(event, data):
    data_events = (Events.GET_BATCH_STARTED, Events.GET_BATCH_COMPLETED, Events.DATALOADER_STOP_ITERATION)
    if not data and event in data_events:
        event = Events.ITERATION_STARTED
    run = {"max_epochs": 3, "epoch_length": 3}
    batches = "ab" if data else None
    whole = log_of(lambda engine: engine.run(batches, **run))
    for number in range(1, whole.count(event.name) + 1):
        engine, log = recording()
        at(engine, event, number, Engine.interrupt)
        position = [i for i, name in enumerate(whole) if name == event.name][number - 1]
        state = engine.run(batches, **run)
        assert state is engine.state
        assert log == [*whole[: position + 1], "INTERRUPT"]
        assert not engine.should_interrupt
        engine.run("xyz")
        assert log == [*whole[: position + 1], "INTERRUPT", *whole[position + 1 :]]


def test_interrupt_at_every_event():
    run = {"max_epochs": 2, "epoch_length": 3}
    whole = log_of(lambda engine: engine.run("ab", **run))
    engine, log = recording()
    for event in [*INSIDE, Events.DATALOADER_STOP_ITERATION]:
        engine.add_event_handler(event, Engine.interrupt)
    runs = 0
    while log[-1:] != ["COMPLETED"]:
        engine.run("ab", **run)
        runs += 1
    assert [entry for entry in log if entry != "INTERRUPT"] == whole
    assert runs == 1 + log.count("INTERRUPT") == 1 + len([entry for entry in whole if entry not in ("a", "b")]) - 1


def test_interrupt_keeps_the_iterator_and_ignores_new_data():
    seen = []
    engine = Engine(lambda engine, batch: seen.append(batch))
    at(engine, Events.ITERATION_COMPLETED, 2, Engine.interrupt)
    engine.run(iter("abcd"), epoch_length=4)
    assert engine.state.dataloader is not None
    engine.run("wxyz")
    assert seen == ["a", "b", "c", "d"]


def test_a_paused_run_honours_a_larger_maximum():
    engine, log = recording()
    at(engine, Events.ITERATION_COMPLETED, 2, Engine.interrupt)
    engine.run("ab", max_epochs=2)
    engine.run(max_epochs=4)
    assert (engine.state.epoch, engine.state.iteration, engine.state.max_epochs) == (4, 8, 4)
    assert log.count("STARTED") == 1

    engine, log = recording()
    at(engine, Events.ITERATION_COMPLETED, 2, Engine.interrupt)
    engine.run("ab", max_iters=3)
    engine.run(max_iters=7)
    assert engine.state.iteration == 7


def test_a_paused_run_that_is_done_ends_when_it_goes_on():
    engine, log = recording()
    at(engine, Events.EPOCH_COMPLETED, 1, Engine.interrupt)
    engine.run("ab", max_epochs=1)
    assert log[-1] == "INTERRUPT"
    engine.run("ab")
    assert log[-2:] == ["INTERRUPT", "COMPLETED"]
    assert log.count("STARTED") == 1


def test_data_set_while_paused_is_used():
    seen = []
    engine = Engine(lambda engine, batch: seen.append(batch))
    at(engine, Events.ITERATION_COMPLETED, 2, Engine.interrupt)
    engine.run("abcd")
    engine.set_data("wxyz")
    engine.run()
    assert seen == ["a", "b", "w", "x"]


@pytest.mark.parametrize("stop", [Engine.terminate, Engine.terminate_epoch, Engine.interrupt])
def test_a_stop_requested_while_paused_is_carried_out_first(stop):
    engine, log = recording()
    at(engine, Events.ITERATION_COMPLETED, 1, Engine.interrupt)
    engine.run("ab")
    stop(engine)
    engine.run()
    expected = {
        Engine.terminate: "TERMINATE",
        Engine.terminate_epoch: "TERMINATE_SINGLE_EPOCH",
        Engine.interrupt: "INTERRUPT",
    }
    assert log[log.index("INTERRUPT") + 1] == expected[stop]


def test_a_run_paused_and_terminated_before_its_first_epoch_keeps_its_place():
    engine, log = recording()
    at(engine, Events.STARTED, 1, Engine.interrupt)
    engine.load_state_dict({"iteration": 3, "epoch_length": 5, "max_epochs": 1})
    engine.run("vwxyz")
    engine.terminate()
    engine.run()
    assert engine.state.iteration == 3
    engine.run("vwxyz")
    assert [entry for entry in log if len(entry) == 1] == ["v", "w"]


def test_state_max_epochs_none_drops_a_paused_run():
    engine, log = recording()
    at(engine, Events.ITERATION_COMPLETED, 1, Engine.interrupt)
    engine.run("ab")
    engine.state.max_epochs = None
    log.clear()
    engine.run("xy")
    assert log == log_of(lambda engine: engine.run("xy"))


def test_loading_a_state_drops_a_paused_run():
    engine, log = recording()
    at(engine, Events.ITERATION_COMPLETED, 1, Engine.interrupt)
    engine.run("ab", max_epochs=2)
    engine.load_state_dict({"iteration": 2, "epoch_length": 2, "max_epochs": 2})
    log.clear()
    engine.run("xy")
    assert log[:2] == ["STARTED", "EPOCH_STARTED"]
    assert [entry for entry in log if len(entry) == 1] == ["x", "y"]


def test_times_do_not_count_a_pause(monkeypatch):
    clock, pause = iter(range(10_000)), [0]
    for module in ("engine", "cursor"):
        monkeypatch.setattr(f"disttrain.engine.{module}.perf_counter", lambda: next(clock) + pause[0])
    engine = Engine(lambda engine, batch: None)
    at(engine, Events.ITERATION_COMPLETED, 1, Engine.interrupt)
    engine.run("ab")
    pause[0] = 1_000_000
    engine.run()
    assert 0 < engine.state.times[Events.EPOCH_COMPLETED] < 100
    assert 0 < engine.state.times[Events.COMPLETED] < 100


def test_interrupt_can_be_switched_off_for_one_engine_or_for_all(monkeypatch):
    one, other = recording()[0], recording()[0]
    one.interrupt_resume_enabled = False
    at(one, Events.ITERATION_COMPLETED, 1, Engine.interrupt)
    with pytest.raises(RuntimeError, match=r"set Engine\.interrupt_resume_enabled = True"):
        one.run("ab")
    other.interrupt()
    monkeypatch.setattr(Engine, "interrupt_resume_enabled", False)
    with pytest.raises(RuntimeError, match="interrupt_resume_enabled is False"):
        other.interrupt()
