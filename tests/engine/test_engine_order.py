"""The order of a run's events, and the batches of a run."""

import warnings
import weakref

import pytest
from torch.utils.data import DataLoader, IterableDataset

from disttrain.engine import Engine, Events

EVENTS_OF_A_RUN = [event for event in Events if event is not Events.EXCEPTION_RAISED]
ITERATION = ["GET_BATCH_STARTED", "GET_BATCH_COMPLETED", "ITERATION_STARTED", "process", "ITERATION_COMPLETED"]
WITHOUT_DATA = ["ITERATION_STARTED", "process", "ITERATION_COMPLETED"]


def recording(process=lambda engine, batch: None):
    """Return an engine and the list to which it writes its events, and "process" for a call of the process function."""
    log = []

    def step(engine, batch):
        log.append("process")
        return process(engine, batch)

    engine = Engine(step)
    for event in EVENTS_OF_A_RUN:
        engine.add_event_handler(event, lambda engine, name=event.name, iter_counter=None: log.append(name))
    return engine, log


class Unsized:
    """Data of no length: the n-th iterator gives the n-th of `counts` batches, the later ones the last."""

    def __init__(self, *counts):
        self.counts = list(counts)
        self.iterated = 0

    def __iter__(self):
        count = self.counts[min(self.iterated, len(self.counts) - 1)]
        self.iterated += 1
        return iter(range(count))


class LenRaises(Unsized):
    def __len__(self):
        raise TypeError("not known")


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(6))


def test_order_of_the_events():
    engine, log = recording()
    engine.run(["a", "b"], max_epochs=2)
    epoch = ["EPOCH_STARTED", *ITERATION, *ITERATION, "EPOCH_COMPLETED"]
    second = ["EPOCH_STARTED", "GET_BATCH_STARTED", "DATALOADER_STOP_ITERATION", *ITERATION[1:], *epoch[6:]]
    assert log == ["STARTED", *epoch, *second, "COMPLETED"]


def test_counters_during_the_events():
    engine = Engine(lambda engine, batch: None)
    seen = []

    def note(engine, name, iter_counter=None):
        seen.append((name, engine.state.epoch, engine.state.iteration))

    for event in EVENTS_OF_A_RUN:
        engine.add_event_handler(event, note, event.name)
    engine.run(["a", "b"], max_epochs=1)
    assert seen == [
        ("STARTED", 0, 0),
        ("EPOCH_STARTED", 1, 0),
        ("GET_BATCH_STARTED", 1, 0),
        ("GET_BATCH_COMPLETED", 1, 0),
        ("ITERATION_STARTED", 1, 1),
        ("ITERATION_COMPLETED", 1, 1),
        ("GET_BATCH_STARTED", 1, 1),
        ("GET_BATCH_COMPLETED", 1, 1),
        ("ITERATION_STARTED", 1, 2),
        ("ITERATION_COMPLETED", 1, 2),
        ("EPOCH_COMPLETED", 1, 2),
        ("COMPLETED", 1, 2),
    ]


def test_iterator_is_taken_after_the_first_epoch_started():
    engine, log = recording()

    class Data(Unsized):
        def __iter__(self):
            log.append("iter")
            return super().__iter__()

    engine.run(Data(4), max_epochs=2, epoch_length=2)
    assert log[:4] == ["STARTED", "EPOCH_STARTED", "iter", "GET_BATCH_STARTED"]
    assert log.count("iter") == 1


def test_batch_is_none_while_it_is_fetched():
    engine = Engine(lambda engine, batch: None)
    seen = []

    def data():
        for batch in "ab":
            seen.append(engine.state.batch)
            yield batch

    engine.add_event_handler(Events.GET_BATCH_STARTED, lambda engine: seen.append(engine.state.batch))
    engine.add_event_handler(Events.GET_BATCH_COMPLETED, lambda engine: seen.append(engine.state.batch))
    engine.run(data(), epoch_length=2)
    assert seen == [None, None, "a", None, None, "b"]


def test_a_batch_is_gone_before_the_next_is_made():
    class Batch:
        pass

    made = []

    def data():
        for _ in range(3):
            assert not made or made[-1]() is None
            batch = Batch()
            made.append(weakref.ref(batch))
            yield batch
            del batch

    Engine(lambda engine, batch: None).run(data())
    assert len(made) == 3


def test_batch_goes_to_the_process_function_and_its_result_to_output():
    engine = Engine(lambda engine, batch: (engine, batch))
    outputs = []
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: outputs.append(engine.state.output))
    engine.run([1, 2])
    assert outputs == [(engine, 1), (engine, 2)]


def test_a_handler_of_iteration_started_may_replace_the_batch():
    seen = []
    engine = Engine(lambda engine, batch: seen.append(batch))

    @engine.on(Events.ITERATION_STARTED)
    def double(engine):
        engine.state.batch *= 2

    engine.run([1, 2, 3])
    assert seen == [2, 4, 6]


def test_epoch_ends_at_epoch_length_and_the_next_goes_on_with_the_same_iterator():
    data = iter(range(100))
    seen = []
    Engine(lambda engine, batch: seen.append((engine.state.epoch, batch))).run(data, max_epochs=2, epoch_length=3)
    assert seen == [(1, 0), (1, 1), (1, 2), (2, 3), (2, 4), (2, 5)]
    assert next(data) == 6


def test_epoch_longer_than_the_data():
    engine, log = recording()
    data, seen = Unsized(2), []
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: seen.append(engine.state.batch))
    engine.run(data, epoch_length=5)
    assert seen == [0, 1, 0, 1, 0]
    assert data.iterated == 3
    stop = ["GET_BATCH_STARTED", "DATALOADER_STOP_ITERATION", *ITERATION[1:]]
    assert log == ["STARTED", "EPOCH_STARTED", *2 * ITERATION, *stop, *ITERATION, *stop, "EPOCH_COMPLETED", "COMPLETED"]


def test_an_iterator_is_gone_before_the_next_is_taken():
    alive = []

    class Iterator:
        def __init__(self):
            self.left = iter(range(2))

        def __next__(self):
            return next(self.left)

    class Data:
        def __iter__(self):
            alive.append(sum(reference() is not None for reference in taken))
            iterator = Iterator()
            taken.append(weakref.ref(iterator))
            return iterator

    taken = []
    engine = Engine(lambda engine, batch: None)
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=3), lambda engine: engine.terminate_epoch())
    engine.run(Data(), max_epochs=2, epoch_length=4)
    assert alive == [0, 0, 0, 0]


def test_handler_of_the_iterators_end_may_replace_the_data():
    seen = []
    engine = Engine(lambda engine, batch: seen.append(batch))

    @engine.on(Events.DATALOADER_STOP_ITERATION)
    def replace(engine):
        engine.state.dataloader = "xyz"

    engine.run("ab", epoch_length=5)
    assert seen == ["a", "b", "x", "y", "z"]


def test_two_empty_fetches_in_a_row_end_the_epoch_with_a_warning():
    engine, log = recording()
    with pytest.warns(UserWarning, match="a fresh iterator gave none") as caught:
        engine.run(iter("ab"), max_epochs=2, epoch_length=4)
    assert "gave 2 of the epoch_length=4 batches of epoch 1" in str(caught[0].message)
    assert "gave 0 of the epoch_length=4 batches of epoch 2" in str(caught[1].message)
    assert len(caught) == 2
    assert caught[0].filename == __file__
    dry = ["GET_BATCH_STARTED", "DATALOADER_STOP_ITERATION", "EPOCH_COMPLETED"]
    assert log == ["STARTED", "EPOCH_STARTED", *2 * ITERATION, *dry, "EPOCH_STARTED", *dry, "COMPLETED"]
    assert (engine.state.iteration, engine.state.epoch) == (2, 2)


def test_empty_fetches_that_are_not_in_a_row_do_not_end_the_epoch():
    engine, log = recording()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.run(Unsized(1), epoch_length=4)
    assert log.count("DATALOADER_STOP_ITERATION") == 3
    assert engine.state.iteration == 4


def test_run_of_iterations_over_exhausted_data_ends():
    engine, log = recording()
    with pytest.warns(UserWarning, match="a fresh iterator gave none") as caught:
        engine.run(iter("abc"), max_iters=7, epoch_length=2)
    assert [str(warning.message)[:15] for warning in caught] == ["the data gave 1", "the data gave 0"]
    assert engine.state.iteration == 3
    assert log[-2:] == ["EPOCH_COMPLETED", "COMPLETED"]


@pytest.mark.parametrize("maximum", [{"max_epochs": 3}, {"max_iters": 7}])
def test_empty_data_of_unknown_length(maximum):
    engine, log = recording()
    with pytest.warns(UserWarning, match="the data gave no batch"):
        engine.run(Unsized(0), **maximum)
    assert log == ["STARTED", "EPOCH_STARTED", "GET_BATCH_STARTED", "EPOCH_COMPLETED", "COMPLETED"]
    engine.run(Unsized(2), **maximum)
    assert engine.state.epoch_length == 2


@pytest.mark.parametrize("maximum", [{"max_epochs": 2}, {"max_iters": 6}])
def test_without_data_batch_is_none_and_the_data_events_never_fire(maximum):
    engine, log = recording(lambda engine, batch: engine.state.batch is None and batch is None)
    names = []
    engine.add_event_handler(Events.ITERATION_STARTED, lambda engine: names.append(engine.last_event_name))
    engine.run(epoch_length=3, **maximum)
    epoch = ["EPOCH_STARTED", *3 * WITHOUT_DATA, "EPOCH_COMPLETED"]
    assert log == ["STARTED", *epoch, *epoch, "COMPLETED"]
    assert engine.state.output is True
    assert engine.state.dataloader is None


def test_without_data_a_replaced_batch_is_gone_at_the_next_iteration():
    seen = []
    engine = Engine(lambda engine, batch: seen.append(batch))

    @engine.on(Events.ITERATION_STARTED(once=1))
    def replace(engine):
        engine.state.batch = "mine"

    engine.run(epoch_length=3)
    assert seen == ["mine", None, None]


@pytest.mark.parametrize("data", [Unsized(3), LenRaises(3), (i for i in range(3))], ids=["no len", "len raises", "gen"])
def test_unknown_length_is_set_by_the_first_end_which_ends_the_epoch(data):
    engine, log = recording()
    lengths = []
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: lengths.append(engine.state.epoch_length))
    engine.run(data)
    assert lengths == [None, None, None]
    assert engine.state.epoch_length == 3
    assert log == ["STARTED", "EPOCH_STARTED", *3 * ITERATION, "GET_BATCH_STARTED", "EPOCH_COMPLETED", "COMPLETED"]


def test_unknown_length_over_epochs():
    engine, log = recording()
    data = LenRaises(3)
    engine.run(data, max_epochs=3)
    assert engine.state.iteration == 9
    assert data.iterated == 3
    assert log.count("DATALOADER_STOP_ITERATION") == 2


def test_unknown_length_with_max_iters():
    engine, log = recording()
    engine.run(Unsized(3), max_iters=5)
    assert (engine.state.iteration, engine.state.epoch, engine.state.epoch_length) == (5, 2, 3)
    assert log[-2:] == ["TERMINATE", "COMPLETED"]


def test_output_is_set_to_none_only_after_a_successful_fetch():
    engine = Engine(lambda engine, batch: batch)
    seen = []
    for event in (Events.GET_BATCH_STARTED, Events.DATALOADER_STOP_ITERATION, Events.GET_BATCH_COMPLETED):
        engine.add_event_handler(event, lambda engine: seen.append(engine.state.output))
    engine.run(Unsized(2), epoch_length=3)
    assert seen == [None, None, 0, None, 1, 1, None]
    assert engine.state.output == 0


def test_the_last_output_survives_a_run_that_ends_with_its_data():
    engine = Engine(lambda engine, batch: batch)
    engine.run(batch for batch in "ab")
    assert engine.state.output == "b"


@pytest.mark.parametrize(
    ("data", "length"),
    [
        ([0, 1, 2, 3], 4),
        (dict.fromkeys(range(3)), 3),
        (DataLoader(list(range(8)), batch_size=2), 4),
        (DataLoader(Stream(), batch_size=4), 2),
        ("text", 4),
    ],
    ids=["list", "dict", "DataLoader", "IterableDataset", "str"],
)
def test_any_iterable(data, length):
    engine = Engine(lambda engine, batch: batch)
    state = engine.run(data, max_epochs=2)
    assert state is engine.state
    assert (state.epoch_length, state.iteration, state.epoch) == (length, 2 * length, 2)
    assert state.dataloader is data


def test_data_that_only_has_getitem():
    class Indexed:
        def __getitem__(self, index):
            return [5, 6, 7][index]

    seen = []
    Engine(lambda engine, batch: seen.append(batch)).run(Indexed())
    assert seen == [5, 6, 7]


def test_last_event_name_is_that_of_every_event_with_or_without_handlers():
    names = []
    engine = Engine(lambda engine, batch: names.append(engine.last_event_name))
    assert engine.last_event_name is None

    def data():
        names.append(engine.last_event_name)
        yield 1

    engine.run(data())
    assert names == [Events.GET_BATCH_STARTED, Events.ITERATION_STARTED]
    assert engine.last_event_name is Events.COMPLETED


def test_engines_nest():
    inner_log = []
    inner = Engine(lambda engine, batch: inner_log.append(batch))
    outer = Engine(lambda engine, batch: inner_log.append(f"outer {batch}"))
    outer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: inner.run(range(2)))
    outer.run("ab")
    assert inner_log == ["outer a", 0, 1, "outer b", 0, 1]


def test_an_engine_does_not_run_inside_itself():
    engine = Engine(lambda engine, batch: engine.run([1]))
    with pytest.raises(RuntimeError, match="already running"):
        engine.run([1])
    assert engine.state.iteration == 1


def test_no_more_batches_are_fetched_than_needed():
    taken = []

    def data():
        for batch in range(10):
            taken.append(batch)
            yield batch

    Engine(lambda engine, batch: None).run(data(), max_epochs=2, epoch_length=2)
    assert taken == [0, 1, 2, 3]
