"""The process function, the arguments of `run`, resuming, `set_data` and the times."""

import functools
import json
import logging

import pytest
from recorded import recording_batches

from disttrain.engine import Engine, Events, State


class Unsized:
    def __init__(self, count):
        self.count = count

    def __iter__(self):
        return iter(range(self.count))


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
def test_process_function_that_can_take_two_is_accepted(right):
    assert Engine(right).run([1]).iteration == 1


def test_attributes_of_a_fresh_engine():
    engine = Engine(lambda engine, batch: None)
    assert engine.state.iteration == 0
    assert engine.last_event_name is None
    assert engine.should_terminate is engine.should_terminate_single_epoch is engine.should_interrupt is False
    assert engine.logger.name.endswith("Engine")
    assert engine.state_dict_user_keys == []
    engine.state_dict_user_keys.append("alpha")
    assert engine.state_dict_user_keys == ["alpha"]
    with pytest.raises(AttributeError):
        engine.state_dict_user_keys = []


@pytest.mark.parametrize("data", [3, object(), lambda: None])
def test_data_that_is_not_iterable(data):
    with pytest.raises(TypeError, match="data must be iterable"):
        recording_batches()[0].run(data)


@pytest.mark.parametrize(
    ("data", "arguments", "message"),
    [
        ("ab", {"max_epochs": 2, "max_iters": 2}, "one of max_epochs and max_iters"),
        ("ab", {"max_epochs": 0}, "max_epochs must be at least 1, got 0"),
        ("ab", {"max_epochs": -2}, "max_epochs must be at least 1, got -2"),
        ("ab", {"max_iters": 0}, "max_iters must be at least 1, got 0"),
        ("ab", {"epoch_length": 0}, "epoch_length must be at least 1, got 0"),
        ("ab", {"epoch_length": 1.5}, "epoch_length must be a whole number, got 1.5"),
        ("ab", {"max_epochs": "two"}, "max_epochs must be a whole number, got 'two'"),
        ("ab", {"max_iters": float("inf")}, "max_iters must be a whole number, got inf"),
        ("", {}, "data of length 0"),
        (None, {}, "expected data or epoch_length"),
        (None, {"max_epochs": 3}, "expected data or epoch_length"),
    ],
)
def test_wrong_arguments_are_refused(data, arguments, message):
    engine, log = recording_batches()
    with pytest.raises(ValueError, match=message):
        engine.run(data, **arguments)
    assert log == []
    assert engine.state.max_epochs is engine.state.max_iters is engine.state.epoch_length is None


def test_whole_numbers_of_any_type_are_taken():
    state = recording_batches()[0].run("abcd", max_epochs=2.0, epoch_length=len("abcd") / 2)
    assert (state.iteration, state.epoch_length, type(state.epoch_length)) == (4, 2, int)


def test_a_refused_run_changes_nothing():
    engine, _ = recording_batches()
    engine.load_state_dict({"iteration": 4, "epoch_length": 2, "max_epochs": 5})
    before = dict(vars(engine.state))
    for arguments in ({"max_epochs": 7, "epoch_length": 3}, {"max_iters": 7}, {"max_epochs": 1}):
        with pytest.raises(ValueError):
            engine.run("ab", **arguments)
        assert vars(engine.state) == before


def test_defaults_of_a_new_state():
    engine, log = recording_batches()
    state = engine.run("abc")
    assert (state.max_epochs, state.max_iters, state.epoch_length) == (1, None, 3)
    assert log == [(1, 1, "a"), (1, 2, "b"), (1, 3, "c")]


def test_epoch_length_is_the_argument_else_the_datas_else_the_previous():
    engine, _ = recording_batches()
    assert engine.run("abc", epoch_length=2).epoch_length == 2
    assert engine.run("abc").epoch_length == 3
    assert engine.run(iter("abc")).epoch_length == 3
    assert engine.run(None).epoch_length == 3
    assert engine.run(Unsized(9), epoch_length=4).epoch_length == 4


def test_a_done_run_starts_anew():
    engine, log = recording_batches()
    engine.run("ab", max_epochs=2)
    log.clear()
    engine.run("xyz")
    assert log == [(1, 1, "x"), (1, 2, "y"), (1, 3, "z")]
    assert engine.state.max_epochs == 1


def test_a_done_run_of_iterations_starts_anew_from_0():
    engine, log = recording_batches()
    engine.run("abc", max_iters=4)
    log.clear()
    engine.run("abc", max_iters=4)
    assert log == [(1, 1, "a"), (1, 2, "b"), (1, 3, "c"), (2, 4, "a")]


def test_a_larger_maximum_goes_on():
    engine, log = recording_batches()
    engine.run("ab", max_epochs=1)
    engine.run("xy", max_epochs=3)
    assert log == [(1, 1, "a"), (1, 2, "b"), (2, 3, "x"), (2, 4, "y"), (3, 5, "x"), (3, 6, "y")]


def test_a_larger_max_iters_goes_on_with_the_next_epoch():
    engine, log = recording_batches()
    engine.run("abc", max_iters=2)
    engine.run("xyz", max_iters=4)
    assert log == [(1, 1, "a"), (1, 2, "b"), (2, 3, "x"), (2, 4, "y")]


def test_a_larger_maximum_after_a_shortened_epoch_runs_whole_epochs():
    engine, log = recording_batches()
    handle = engine.add_event_handler(Events.ITERATION_COMPLETED(once=1), lambda engine: engine.terminate_epoch())
    engine.run("abc", max_epochs=1)
    handle.remove()
    engine.run("abc", max_epochs=2)
    assert [batch for _, _, batch in log] == ["a", "a", "b", "c"]


def test_a_maximum_below_the_progress():
    engine, _ = recording_batches()
    engine.run("ab", max_epochs=3)
    with pytest.raises(ValueError, match=r"max_epochs must be at least 3.*state.max_epochs = None"):
        engine.run("ab", max_epochs=2)
    engine, _ = recording_batches()
    engine.run("ab", max_iters=5)
    with pytest.raises(ValueError, match=r"max_iters must be at least 5.*state.max_iters = None"):
        engine.run("ab", max_iters=4)
    engine.state.max_iters = None
    assert engine.run("ab", max_iters=4).iteration == 4


def test_another_epoch_length_on_resume():
    engine, _ = recording_batches()
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=1), lambda engine: engine.terminate())
    engine.run("ab", max_epochs=3)
    with pytest.raises(ValueError, match="epoch_length must stay 2 while a run continues, got 3"):
        engine.run("ab", epoch_length=3)
    assert engine.run("ab", epoch_length=2).epoch == 3
    assert engine.run("ab", epoch_length=3).epoch_length == 3


def test_switching_between_the_maxima():
    engine, log = recording_batches()
    engine.run("ab", max_epochs=2)
    with pytest.raises(ValueError, match=r"expected max_epochs.*state.max_epochs = None"):
        engine.run("ab", max_iters=8)
    engine.state.max_epochs = None
    engine.run("ab", max_iters=3)
    with pytest.raises(ValueError, match=r"expected max_iters.*state.max_iters = None"):
        engine.run("ab", max_epochs=2)
    engine.state.max_iters = None
    assert engine.run("ab", max_epochs=1).iteration == 2
    assert len(log) == 4 + 3 + 2


@pytest.mark.parametrize(
    ("counters", "done"),
    [
        ({"iteration": 10, "max_iters": 10}, True),
        ({"iteration": 9, "max_iters": 10}, False),
        ({"iteration": 6, "epoch_length": 3, "max_epochs": 2}, True),
        ({"iteration": 5, "epoch_length": 3, "max_epochs": 2}, False),
        ({"iteration": 1, "epoch": 2, "epoch_length": 3, "max_epochs": 2}, True),
        ({"iteration": 1, "epoch": 2, "max_epochs": 2}, True),
        ({"iteration": 1, "epoch": 1, "max_epochs": 2}, False),
    ],
)
def test_done(counters, done):
    engine, log = recording_batches()
    engine.state = State(**counters)
    engine.run("abc")
    assert (log[0][1] == 1) == done


def test_max_epochs_none_forces_a_restart():
    engine, log = recording_batches()
    engine.load_state_dict({"iteration": 3, "epoch_length": 2, "max_epochs": 5})
    engine.state.max_epochs = None
    engine.run("ab")
    assert log == [(1, 1, "a"), (1, 2, "b")]


def test_after_terminate_the_next_run_goes_on_with_the_next_epoch():
    engine, log = recording_batches()
    handle = engine.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: engine.terminate())
    engine.run("abc", max_epochs=3)
    assert engine.should_terminate
    handle.remove()
    engine.run("xyz")
    assert log == [(1, 1, "a"), *((2, 2 + i, "xyz"[i]) for i in range(3)), *((3, 5 + i, "xyz"[i]) for i in range(3))]
    assert not engine.should_terminate


def test_after_terminate_in_the_last_epoch_the_next_run_starts_anew():
    engine, log = recording_batches()
    handle = engine.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: engine.terminate())
    engine.run("abc")
    handle.remove()
    engine.run("abc")
    assert log == [(1, 1, "a"), (1, 1, "a"), (1, 2, "b"), (1, 3, "c")]


def test_from_a_loaded_state_it_goes_on_inside_the_epoch():
    engine, log = recording_batches()
    ends = []
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: ends.append(engine.state.iteration))
    engine.load_state_dict({"iteration": 7, "epoch_length": 5, "max_epochs": 3})
    engine.run("abcde")
    assert log[:4] == [(2, 8, "a"), (2, 9, "b"), (2, 10, "c"), (3, 11, "d")]
    assert ends == [10, 15]


def test_a_state_loaded_by_a_handler_of_started():
    engine, log = recording_batches()

    @engine.on(Events.STARTED)
    def load(engine):
        engine.load_state_dict({"iteration": 7, "epoch_length": 5, "max_epochs": 2})

    engine.run("abcde", max_epochs=2)
    assert [(epoch, iteration) for epoch, iteration, _ in log] == [(2, 8), (2, 9), (2, 10)]


def test_a_state_loaded_inside_an_iteration_moves_the_counters():
    engine, log = recording_batches()
    loads = [{"iteration": 8, "epoch_length": 5, "max_epochs": 2}]
    seen = []
    engine.add_event_handler(Events.ITERATION_STARTED(every=10), lambda engine: seen.append(engine.state.iteration))

    @engine.on(Events.ITERATION_COMPLETED(once=2))
    def load(engine):
        engine.load_state_dict(loads[0])

    engine.run("abcde", max_epochs=2)
    assert [iteration for _, iteration, _ in log] == [1, 2, 9, 10, 11]
    assert seen == [10]


def test_a_state_loaded_into_an_engine_that_ran():
    engine, log = recording_batches()
    engine.run("abcde")
    engine.load_state_dict({"iteration": 3, "epoch_length": 5, "max_epochs": 1})
    log.clear()
    engine.run("vwxyz")
    assert log == [(1, 4, "v"), (1, 5, "w")]


def test_a_run_terminated_before_its_first_epoch_keeps_its_place():
    engine, log = recording_batches()
    handle = engine.add_event_handler(Events.STARTED, lambda engine: engine.terminate())
    engine.load_state_dict({"iteration": 3, "epoch_length": 5, "max_epochs": 1})
    engine.run("vwxyz")
    handle.remove()
    engine.run("vwxyz")
    assert log == [(1, 4, "v"), (1, 5, "w")]


def test_a_loaded_state_of_unknown_length_takes_the_length_of_the_data():
    engine, log = recording_batches()
    engine.load_state_dict({"iteration": 1, "epoch_length": None, "max_epochs": 1})
    engine.run("abc")
    assert engine.state.epoch_length == 3
    assert [iteration for _, iteration, _ in log] == [2, 3]


def test_a_run_that_goes_on_fires_started():
    engine, _ = recording_batches()
    seen = []
    engine.add_event_handler(Events.STARTED, lambda engine: seen.append(engine.state.iteration))
    engine.load_state_dict({"iteration": 3, "epoch_length": 5, "max_epochs": 1})
    engine.run("abcde")
    assert seen == [3]


@pytest.mark.parametrize(
    ("event", "batches"),
    [
        (Events.GET_BATCH_STARTED, "abwxy"),
        (Events.GET_BATCH_COMPLETED, "abcwx"),
        (Events.ITERATION_STARTED, "abwxy"),
        (Events.ITERATION_COMPLETED, "abwxy"),
    ],
)
def test_set_data_swaps_the_iterator_at_once(event, batches):
    engine, log = recording_batches()
    engine.add_event_handler(event(once=2), lambda engine: engine.set_data("wxyz"))
    engine.run("abcde")
    assert "".join(batch for _, _, batch in log) == batches
    assert engine.state.dataloader == "wxyz"


def test_set_data_from_the_process_function():
    seen = []

    def step(engine, batch):
        seen.append(batch)
        if batch == "b":
            engine.set_data("wxyz")

    Engine(step).run("abcde")
    assert seen == ["a", "b", "w", "x", "y"]


def test_set_data_from_no_data_fires_the_data_events():
    engine, log = recording_batches()
    seen = []
    engine.add_event_handler(Events.GET_BATCH_COMPLETED, lambda engine: seen.append(engine.state.batch))
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda engine: engine.set_data("ab"))
    engine.run(epoch_length=4)
    assert [batch for _, _, batch in log] == [None, None, "a", "b"]
    assert seen == ["a", "b"]


def test_a_run_without_data_uses_data_that_was_set_before():
    engine, log = recording_batches()
    engine.set_data("ab")
    engine.run()
    engine.set_data("ab")
    engine.run("xy")
    assert [batch for _, _, batch in log] == ["a", "b", "x", "y"]
    with pytest.raises(TypeError, match="data must be iterable"):
        engine.set_data(3)


def test_times_are_set_before_their_events_fire():
    engine, _ = recording_batches()
    seen = []
    assert engine.state.times[Events.COMPLETED] is None

    @engine.on(Events.EPOCH_COMPLETED | Events.COMPLETED)
    def note(engine):
        seen.append(engine.state.times[engine.last_event_name])

    engine.run("ab", max_epochs=2)
    first, second, whole = seen
    assert 0 < first < whole
    assert 0 < second < whole
    assert engine.state.times["COMPLETED"] == whole
    assert engine.state.times["EPOCH_COMPLETED"] == second


def test_a_run_logs_where_it_starts_and_ends(caplog):
    engine, _ = recording_batches()
    with caplog.at_level(logging.INFO, logger=engine.logger.name):
        engine.run("ab", max_epochs=2)
        engine.add_event_handler(Events.STARTED, lambda engine: engine.interrupt())
        engine.run("ab", max_epochs=3)
        engine.run()
    assert caplog.messages == [
        "run starts at epoch 0, iteration 0",
        "run ends at epoch 2, iteration 4",
        "run goes on at epoch 2, iteration 4",
        "run pauses at epoch 2, iteration 4",
        "run goes on at epoch 2, iteration 4",
        "run ends at epoch 3, iteration 6",
    ]


def test_times_can_be_written_as_json():
    engine = Engine(lambda engine, batch: None)
    engine.run([1], max_epochs=1)
    assert set(json.loads(json.dumps(engine.state.times))) == {"EPOCH_COMPLETED", "COMPLETED"}
    assert engine.state.times[Events.COMPLETED] == engine.state.times["COMPLETED"]
