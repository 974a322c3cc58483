"""Random programs of handlers, stops, exceptions and resumes, run by the engine and by a plain model of the contract.

A program has a script and a list of calls between the runs. The script holds the actions at the k-th firing of an
event, at the k-th fetch or at the k-th call of the process function. Engine and model both log every event with its
counters, and the outcome of each run. The model is written from the contract alone: nested loops, and a generator that
yields where a run pauses. It calls every filter at every firing.
"""

import logging
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from disttrain.engine import Engine, Events

INSIDE = ["GET_BATCH_STARTED", "GET_BATCH_COMPLETED", "ITERATION_STARTED", "ITERATION_COMPLETED"]
FILTERED = [*INSIDE, "EPOCH_STARTED", "EPOCH_COMPLETED"]
STOPS = ["terminate", "terminate skip", "terminate epoch", "terminate epoch skip", "interrupt"]


class Boom(Exception):
    """Raised by a script."""


class Other(Exception):
    """Raised by a script's handler of EXCEPTION_RAISED."""


@dataclass
class Program:
    script: dict  # (event name, "FETCH" or "PROCESS"; number of the firing) -> actions
    catches: bool  # whether EXCEPTION_RAISED has a handler
    quiet: set  # events without the handler that logs them and acts
    filters: list  # (event name, keyword arguments): handlers that only log that they ran
    between: list  # the calls outside the runs, in turn: (name, arguments, keyword arguments)


@dataclass
class Batches:
    """Data of a kind: sized, unsized or once (an iterator). Each fetch first does the actions of the script."""

    name: str
    size: int
    kind: str
    before_fetch: object = field(repr=False)
    given: int = 0

    def __iter__(self):
        if self.kind == "once":
            return self
        return Batches(self.name, self.size, "once", self.before_fetch)

    def __next__(self):
        self.before_fetch()
        if self.given >= self.size:
            raise StopIteration
        self.given += 1
        return f"{self.name}{self.given}"


class SizedBatches(Batches):
    def __len__(self):
        return self.size


class Actor:
    """Runs a program; the engine and the model carry out its stops in their own ways."""

    def __init__(self, program):
        self.program = program
        self.log = []
        self.fired = Counter()
        self.num_made = 0

    def act(self, place):
        self.fired[place] += 1
        for action in self.program.script.get((place, self.fired[place]), ()):
            if action == "raise":
                raise Boom(place)
            if action == "keyboard":
                raise KeyboardInterrupt
            self.do(action)

    def make(self, kind, size):
        if kind == "none":
            return None
        self.num_made += 1
        make = SizedBatches if kind == "sized" else Batches
        return make("abcdefghijklmnop"[self.num_made % 16], size, kind, lambda: self.act("FETCH"))

    def run_all(self):
        """Do all the calls between the runs; return the log."""
        for name, arguments, keywords in self.program.between:
            try:
                outcome = getattr(self, name)(*arguments, **keywords)
            except (Boom, Other, KeyboardInterrupt, RuntimeError, ValueError) as error:
                outcome = type(error).__name__
            self.log.append((name, outcome, self.counters()))
        return self.log


class Real(Actor):
    def __init__(self, program):
        super().__init__(program)
        self.engine = Engine(self.process)
        self.handles = {}
        for event in (event for event in Events if event.name not in program.quiet):
            if event is not Events.EXCEPTION_RAISED:
                self.engine.add_event_handler(event, self.handle, event.name)
            elif program.catches:
                self.engine.add_event_handler(event, self.caught)
        for index in range(len(program.filters)):
            self.toggle(index)

    def toggle(self, index):
        if index in self.handles:
            self.handles.pop(index).remove()
        else:
            name, arguments = self.program.filters[index]
            note = self.Note(self, index)
            self.handles[index] = self.engine.add_event_handler(Events[name](**arguments), note)

    class Note:
        """A separate handler for each filter, so that the removal of one leaves the others."""

        def __init__(self, actor, index):
            self.actor, self.index = actor, index

        def __call__(self, engine):
            self.actor.log.append(("filter", self.index, engine.state.epoch, engine.state.iteration))

    def counters(self):
        state = self.engine.state
        return state.epoch, state.iteration, state.epoch_length, state.max_epochs, state.max_iters

    def handle(self, engine, name, iter_counter=None):
        batch = engine.state.batch
        self.log.append((name, engine.state.epoch, engine.state.iteration, batch, iter_counter))
        assert engine.last_event_name == name
        self.act(name)

    def caught(self, engine, error):
        self.log.append(("EXCEPTION_RAISED", type(error).__name__))
        self.act("EXCEPTION_RAISED")

    def process(self, engine, batch):
        self.log.append(("process", batch))
        self.act("PROCESS")
        return batch

    def do(self, action):
        name, *skip = action.split(" ") if isinstance(action, str) else action
        if name == "toggle":
            self.toggle(*skip)
        elif name == "fire":
            self.engine.fire_event(Events[skip[0]])
        elif name == "set_data":
            self.engine.set_data(self.make("sized", 2))
        elif name == "interrupt":
            self.engine.interrupt()
        elif skip[:1] == ["epoch"]:
            self.engine.terminate_epoch(skip_epoch_completed=len(skip) == 2)
        else:
            self.engine.terminate(skip_completed=len(skip) == 1)

    def run(self, kind, size, **arguments):
        self.engine.run(self.make(kind, size), **arguments)
        return "returned"

    def load(self, state_dict):
        self.engine.load_state_dict(state_dict)

    def restart(self):
        self.engine.state.max_epochs = self.engine.state.max_iters = None

    def request(self, action):
        self.do(action)


class Terminated(BaseException):
    pass


class EpochTerminated(BaseException):
    pass


class Escaped(BaseException):
    """Ends the model's run with `error`, which no handler gets any more."""

    def __init__(self, error):
        super().__init__()
        self.error = error


class Model(Actor):
    def __init__(self, program):
        super().__init__(program)
        self.epoch = self.iteration = self.count = 0
        self.epoch_length = self.max_epochs = self.max_iters = None
        self.batch = self.data = self.iterator = self.paused = self.next_data = None
        self.left_here = self.began = False
        self.on = {name: [] for name in FILTERED}
        self.running = {}
        for index in range(len(program.filters)):
            self.toggle(index)
        self.forget()

    def forget(self):
        self.terminate = self.terminate_epoch = self.interrupt = self.skip_completed = self.skip_epoch = False

    def counters(self):
        return self.epoch, self.iteration, self.epoch_length, self.max_epochs, self.max_iters

    def do(self, action):
        name, *skip = action.split(" ") if isinstance(action, str) else action
        if name == "toggle":
            self.toggle(*skip)
        elif name == "fire":
            self.fire(skip[0])
        elif name == "set_data":
            self.data = self.make("sized", 2)
            if self.paused is None:
                self.next_data = self.data
            elif self.iterator is not None:
                self.iterator = iter(self.data)
        elif name == "interrupt":
            self.interrupt = True
        elif skip[:1] == ["epoch"]:
            self.terminate_epoch, self.skip_epoch = True, len(skip) == 2
        else:
            self.terminate, self.skip_completed = True, len(skip) == 1

    def toggle(self, index):
        """Add the filter's handler, or mark it as removed. A firing under way still calls an added handler."""
        if index in self.running:
            self.running.pop(index)["removed"] = True
        else:
            name, arguments = self.program.filters[index]
            self.running[index] = {"index": index, "arguments": arguments, "removed": False}
            self.on[name].append(self.running[index])

    def fire(self, name, iter_counter=None):
        if name not in self.program.quiet:
            self.log.append((name, self.epoch, self.iteration, self.batch, iter_counter))
            self.act(name)
        for handler in self.on.get(name, ()):
            value = self.epoch if name.startswith("EPOCH") else self.iteration
            if not handler["removed"] and self.passes(value, **handler["arguments"]):
                self.log.append(("filter", handler["index"], self.epoch, self.iteration))

    @staticmethod
    def passes(value, every=1, once=None, before=None, after=None):
        if once is not None:
            return value in once
        if after is not None:
            return value > after and (before is None or value < before) and (value - after - 1) % every == 0
        return (before is None or value < before) and value % every == 0

    def carry_out_stops(self, phase):
        """Carry out the requested stops; yield where the run pauses."""
        while self.terminate or self.terminate_epoch or self.interrupt:
            if self.terminate:
                raise Terminated
            if self.terminate_epoch and phase == "in the epoch":
                raise EpochTerminated
            if self.terminate_epoch:
                self.terminate_epoch = False
                if phase == "before the epoch":
                    raise RuntimeError
                continue
            try:
                self.fire("INTERRUPT")
            finally:
                self.interrupt = False
            yield

    def handle_exception(self, error):
        """Call the handler of EXCEPTION_RAISED, or let the error escape."""
        if not self.program.catches:
            raise Escaped(error)
        self.log.append(("EXCEPTION_RAISED", type(error).__name__))
        try:
            self.act("EXCEPTION_RAISED")
        except (Boom, KeyboardInterrupt) as worse:
            raise Escaped(worse) from None

    def done(self):
        if self.max_iters is not None and self.iteration >= self.max_iters:
            return True
        if self.max_epochs is None:
            return False
        whole = self.epoch_length is not None and self.iteration >= self.epoch_length * self.max_epochs
        return whole or self.epoch >= self.max_epochs

    def whole_run(self):
        """Follow the pseudocode of the contract."""
        try:
            try:
                self.fire("STARTED")
                yield from self.carry_out_stops("before the epoch")
                while not self.done() and not self.nothing_left:
                    self.epoch += 1
                    self.began = True
                    self.fire("EPOCH_STARTED")
                    yield from self.carry_out_stops("before the epoch")
                    yield from self.one_epoch()
            except Terminated:
                skip = self.skip_completed
                self.fire("TERMINATE")
                if skip:
                    return
            self.fire("COMPLETED")
        except (Exception, KeyboardInterrupt) as error:
            self.handle_exception(error)

    def fresh(self):
        return iter(() if self.data is None else self.data)

    def one_epoch(self):
        if self.iterator is None:
            if not self.opened:
                going_on = self.iteration % self.epoch_length if self.epoch_length else self.iteration
                self.count = 0 if self.left_here else going_on
            self.opened = True
            self.iterator = self.fresh()
        skip, part = False, self.iterations()
        while part is not None:
            try:
                yield from part
                part = None
            except EpochTerminated:
                part = self.end_of_epoch()
                skip = self.skip_epoch
                try:
                    next(part)
                    part = None
                except Exception as error:
                    self.terminate_epoch = skip = False
                    self.handle_exception(error)
                    part = self.carry_out_stops("in the epoch")
            except Exception as error:
                self.handle_exception(error)
                part = self.carry_out_stops("in the epoch")
        self.count = 0
        yield from self.carry_out_stops("after the epoch")
        if not skip:
            self.fire("EPOCH_COMPLETED")
            yield from self.carry_out_stops("after the epoch")

    def end_of_epoch(self):
        self.fire("TERMINATE_SINGLE_EPOCH", iter_counter=self.count)
        self.terminate_epoch = False
        self.iterator = self.fresh()
        yield

    def iterations(self):
        while True:
            self.batch = None
            if self.data is not None:
                self.fire("GET_BATCH_STARTED")
                yield from self.carry_out_stops("in the epoch")
                fetched = yield from self.fetch()
                if not fetched:
                    yield from self.carry_out_stops("in the epoch")
                    return
                self.fire("GET_BATCH_COMPLETED")
                yield from self.carry_out_stops("in the epoch")
            self.iteration += 1
            self.count += 1
            self.fire("ITERATION_STARTED")
            yield from self.carry_out_stops("in the epoch")
            self.log.append(("process", self.batch))
            self.act("PROCESS")
            self.fire("ITERATION_COMPLETED")
            yield from self.carry_out_stops("in the epoch")
            if self.epoch_length is not None and self.count >= self.epoch_length:
                return
            if self.iteration == self.max_iters:
                raise Terminated

    def fetch(self):
        """Set the batch, from a fresh iterator if need be; return False if there is none and the epoch ends."""
        for fresh in (False, True):
            with suppress(StopIteration):
                self.batch = next(self.iterator)
                return True
            if self.epoch_length is None:
                self.epoch_length = self.count
                break
            if not fresh:
                self.iterator = None
                self.fire("DATALOADER_STOP_ITERATION")
                yield from self.carry_out_stops("in the epoch")
                self.iterator = self.fresh()
        self.nothing_left = self.count == 0 and self.max_epochs is None
        return False

    def run(self, kind, size, max_epochs=None, max_iters=None, epoch_length=None):
        data = self.make(kind, size)
        data = self.next_data if data is None else data
        self.start(data, max_epochs, max_iters, epoch_length)
        try:
            next(self.paused)
            return "returned"
        except StopIteration:
            return self.over("returned")
        except Escaped as escaped:
            return self.over(type(escaped.error).__name__)

    def over(self, outcome):
        self.paused = self.iterator = None
        self.left_here = self.left_here or self.began
        return outcome

    def start(self, data, max_epochs, max_iters, epoch_length):
        """Check the arguments, set the limits and the counters."""
        size = len(data) if isinstance(data, SizedBatches) else None
        limits = (
            self.max_epochs if max_epochs is None else max_epochs,
            self.max_iters if max_iters is None else max_iters,
        )
        anew = self.max_epochs is None and self.max_iters is None
        if max_epochs is not None and max_iters is not None:
            raise ValueError
        if not anew:
            if (max_epochs is not None and self.max_iters is not None) or (max_iters and self.max_epochs is not None):
                raise ValueError
            if (max_epochs or self.epoch) < self.epoch or (max_iters or self.iteration) < self.iteration:
                raise ValueError
            before = self.max_epochs, self.max_iters
            self.max_epochs, self.max_iters = limits
            anew = self.done() and self.paused is None
            self.max_epochs, self.max_iters = before
        if anew:
            known = [length for length in (epoch_length, size, self.epoch_length or None) if length is not None]
            if not known and data is None:
                raise ValueError
            if known[:1] == [0]:
                raise ValueError
            self.epoch = self.iteration = 0
            self.epoch_length = known[0] if known else None
            limits = (1, None) if max_epochs is None and max_iters is None else (max_epochs, max_iters)
        elif not self.epoch_length:
            lengths = [epoch_length, None if self.paused else size]
            length = next((length for length in lengths if length is not None), None)
            if length is None and data is None and self.paused is None:
                raise ValueError
            self.epoch_length = length
        elif epoch_length not in (None, self.epoch_length):
            raise ValueError
        self.max_epochs, self.max_iters = limits
        if anew or self.paused is None:
            self.data, self.next_data, self.iterator = data, None, None
            self.nothing_left = self.opened = False
            self.began = False
            self.count = 0
            self.forget()
            self.paused = self.whole_run()

    def load(self, state_dict):
        self.epoch_length = state_dict["epoch_length"]
        self.iteration = state_dict["iteration"]
        self.epoch = self.iteration // self.epoch_length
        self.max_epochs, self.max_iters = state_dict.get("max_epochs"), state_dict.get("max_iters")
        self.paused = self.iterator = None
        self.left_here = False

    def restart(self):
        self.max_epochs = self.max_iters = None

    def request(self, action):
        self.do(action)


places = st.sampled_from(
    [*INSIDE, "EPOCH_STARTED", "EPOCH_COMPLETED", "STARTED", "COMPLETED", "DATALOADER_STOP_ITERATION"]
    + ["TERMINATE", "TERMINATE_SINGLE_EPOCH", "INTERRUPT", "EXCEPTION_RAISED", "FETCH", *["PROCESS"] * 4]
)
numbers = st.integers(1, 5)
soon = st.sampled_from([1, 1, 1, 2, 2, 3, 4, 6])
actions = st.one_of(
    st.sampled_from(STOPS),
    st.sampled_from(["raise", "raise", "keyboard"]),
    st.tuples(st.just("toggle"), st.integers(0, 3)),
    st.just(("set_data",)),
    st.tuples(st.just("fire"), st.sampled_from(FILTERED)),
)
scripts = st.dictionaries(st.tuples(places, soon), st.lists(actions, min_size=1, max_size=2), min_size=1, max_size=6)
filter_arguments = st.one_of(
    st.builds(lambda values: {"once": values}, st.lists(numbers, min_size=1, max_size=3)),
    st.fixed_dictionaries({"every": st.integers(1, 4)}, optional={"before": numbers, "after": st.integers(0, 4)}),
)
filters = st.lists(st.tuples(st.sampled_from(FILTERED), filter_arguments), min_size=4, max_size=4)
maxima = st.one_of(
    st.just({}),
    st.builds(lambda n: {"max_epochs": n}, st.integers(1, 4)),
    st.builds(lambda n: {"max_iters": n}, st.integers(1, 12)),
)
lengths = st.one_of(st.just({}), st.builds(lambda n: {"epoch_length": n}, st.integers(1, 4)))
kinds = st.sampled_from(["sized", "sized", "unsized", "once", "none"])
sizes = st.sampled_from([0, 1, 2, 2, 3, 3, 4])
runs = st.builds(lambda *a: ("run", a[:2], {**a[2], **a[3]}), kinds, sizes, maxima, lengths)
loads = st.builds(
    lambda iteration, length, maximum: ("load", ({"iteration": iteration, "epoch_length": length, **maximum},), {}),
    st.integers(0, 9),
    st.integers(1, 4),
    st.sampled_from([{"max_epochs": 9}, {"max_iters": 10}]),
)
others = st.one_of(
    loads,
    st.just(("restart", (), {})),
    st.builds(lambda action: ("request", (action,), {}), st.one_of(st.sampled_from(STOPS), st.just(("set_data",)))),
)
programs = st.builds(
    lambda script, catches, quiet, filters, first, rest: Program(script, catches, quiet, filters, [first, *rest]),
    scripts,
    st.booleans(),
    st.sets(st.sampled_from(INSIDE), max_size=3),
    filters,
    runs,
    st.lists(st.one_of(runs, runs, others), max_size=5),
)


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(programs)
@pytest.mark.filterwarnings("ignore:the data gave")
def test_the_engine_behaves_like_the_model(program):
    logging.disable(logging.CRITICAL)
    try:
        assert Real(program).run_all() == Model(program).run_all()
    finally:
        logging.disable(logging.NOTSET)
