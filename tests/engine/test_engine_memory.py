"""An engine is freed with its last reference, runs do not grow memory, and an engine can be pickled."""

import contextlib
import copy
import gc
import logging
import pickle
import weakref
from collections import Counter

import pytest

from disttrain.engine import Engine, EventEnum, Events


class Data(list):
    """A list that takes weak references."""


class Mine(EventEnum):
    LOSS = "loss"


class Problem(Exception):
    pass


def step(engine, batch):
    engine.state.seen = [*getattr(engine.state, "seen", []), (engine.state.epoch, engine.state.iteration, batch)]
    return batch


def note(engine, *args, **kwargs):
    engine.state.noted = [*getattr(engine.state, "noted", []), engine.last_event_name]


def stop(engine, iteration, how):
    if engine.state.iteration == iteration:
        getattr(engine, how)()


def fail(engine, *args):
    raise Problem


def again(engine, error):
    raise error


class Own(Engine):
    def __init__(self):
        super().__init__(step)
        self.add_event_handler(Events.ITERATION_COMPLETED, self.react)

    def react(self):
        self.reacted = True


def everything(engine):
    for event in Events:
        if event is not Events.EXCEPTION_RAISED:
            engine.add_event_handler(event, note)
    engine.add_event_handler(Events.ITERATION_COMPLETED(every=2) | Events.EPOCH_COMPLETED(once=1), note)


def with_a_handle(engine):
    with engine.add_event_handler(Events.STARTED, note):
        engine.run("ab")


def swallowing(engine):
    engine.add_event_handler(Events.ITERATION_STARTED, fail)
    engine.add_event_handler(Events.EXCEPTION_RAISED, note)


def raising(engine):
    engine.add_event_handler(Events.ITERATION_STARTED, fail)


def raising_again(engine):
    raising(engine)
    engine.add_event_handler(Events.EXCEPTION_RAISED, again)


def raising_another(engine):
    engine.add_event_handler(Events.EPOCH_STARTED, fail)
    engine.add_event_handler(Events.EXCEPTION_RAISED, lambda engine, error: {}[error])


@pytest.mark.parametrize("make", [lambda: Engine(step), Own], ids=["Engine", "own method"])
@pytest.mark.parametrize(
    "prepare",
    [everything, with_a_handle, swallowing, raising, raising_again, raising_another],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("how", [None, "terminate", "terminate_epoch", "interrupt"])
def test_an_engine_without_references_is_freed_at_once(make, prepare, how, no_collector):
    engine, data = make(), Data([1, 2, 3])
    prepare(engine)
    if how:
        engine.add_event_handler(Events.ITERATION_COMPLETED, stop, 2, how)
    with contextlib.suppress(Problem, KeyError):
        engine.run(data, max_epochs=2)
    watched = [weakref.ref(engine), weakref.ref(data), weakref.ref(engine.state)]
    del engine, data
    assert [reference() for reference in watched] == [None, None, None]


def test_a_run_that_is_over_keeps_no_iterator(no_collector):
    def generate():
        yield from range(3)

    engine, data = Engine(step), generate()
    engine.run(data, epoch_length=3)
    watched = weakref.ref(data)
    engine.state.dataloader = None
    del data
    assert watched() is None


def runs(count):
    """Make runs of every kind in one engine and in new ones."""
    engine = Engine(lambda engine, batch: None)
    engine.add_event_handler(Events.ITERATION_COMPLETED(every=2), lambda engine: None)
    failing = Engine(fail)
    for _ in range(count):
        engine.run((1, 2))
        with engine.add_event_handler(Events.ITERATION_STARTED(once=1), Engine.interrupt):
            engine.run((1, 2))
            engine.run()
        with engine.add_event_handler(Events.ITERATION_STARTED(once=2), Engine.terminate):
            engine.run((1, 2))
        with pytest.raises(Problem):
            failing.run((1, 2))
        Own().load_state_dict(engine.state_dict())


def test_2500_times_five_runs_do_not_grow_memory(no_collector, caplog):
    caplog.set_level(logging.CRITICAL)  # pytest would keep every line that is logged
    runs(20)
    before = Counter(type(o).__name__ for o in gc.get_objects())
    runs(2_500)
    after = Counter(type(o).__name__ for o in gc.get_objects())
    grown = {name: count - before[name] for name, count in after.items() if count - before[name] > 100}
    assert grown == {}


def counters(engine):
    return [entry[:2] for entry in engine.state.seen]


def test_an_engine_can_be_pickled_where_its_handlers_can():
    engine = Own()
    engine.register_events(Mine.LOSS, "after", event_to_attr={Mine.LOSS: "losses"})
    everything(engine)
    engine.add_event_handler(Mine.LOSS(every=2) | Events.ITERATION_STARTED(once=[2, 3]), note)
    engine.add_event_handler(Events.ITERATION_STARTED, stop, 5, how="terminate")
    engine.state_dict_user_keys.append("alpha")
    engine.state.alpha = 3
    twin = pickle.loads(pickle.dumps(engine))
    for either in (engine, twin):
        either.run("abc", max_epochs=3)
    assert twin.state.seen == engine.state.seen
    assert twin.state.noted == engine.state.noted
    assert twin.reacted
    assert twin.has_event_handler(twin.react)
    assert twin.state_dict() == engine.state_dict()
    assert twin.logger is engine.logger


@pytest.mark.parametrize("duplicate", [lambda e: pickle.loads(pickle.dumps(e)), copy.deepcopy], ids=["pickle", "copy"])
def test_a_copy_goes_on_where_the_engine_was(duplicate):
    engine = Engine(step)
    handle = engine.add_event_handler(Events.ITERATION_COMPLETED, stop, 4, "terminate")
    engine.run("abc", max_epochs=3)
    handle.remove()
    twin = duplicate(engine)
    twin.run("xyz")
    engine.run("xyz")
    assert counters(twin) == counters(engine)


@pytest.mark.parametrize("duplicate", [lambda e: pickle.loads(pickle.dumps(e)), copy.deepcopy], ids=["pickle", "copy"])
def test_a_copy_of_a_paused_engine_goes_on_inside_its_epoch(duplicate):
    engine = Engine(step)
    handle = engine.add_event_handler(Events.ITERATION_COMPLETED, stop, 4, "interrupt")
    engine.run((batch for batch in "abcabcabc"), max_epochs=3, epoch_length=3)
    handle.remove()
    twin = duplicate(engine)
    assert twin.state.dataloader is None
    twin.run("xyz")
    engine.run()
    assert counters(twin) == counters(engine) == [(1 + i // 3, 1 + i) for i in range(9)]


def pickle_myself(engine):
    engine.state.pickled = pickle.dumps(engine)


def test_a_pickle_made_by_a_handler_goes_on_with_the_next_epoch():
    engine = Engine(step)
    engine.add_event_handler(Events.EPOCH_COMPLETED(once=2), pickle_myself)
    engine.run("abc", max_epochs=3)
    twin = pickle.loads(engine.state.pickled)
    twin.remove_event_handler(pickle_myself, Events.EPOCH_COMPLETED)
    twin.run("xyz")
    assert counters(twin) == counters(engine)
