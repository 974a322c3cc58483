"""The loop: calls a process function on batch after batch and fires events around it.

*Contract*: the order of the events is in `Engine.run`. A run is a cursor over (epoch, iteration, iterator): a stop
request or an exception leaves the loop with the cursor at the place to go on from, and the loop goes on from any place.
*Errors*: an exception is logged in one line, then either raised to the caller or given to handlers of
EXCEPTION_RAISED.
*Cost*: an event with no handler, or with none due at this iteration, costs one comparison.
"""

import itertools
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from time import perf_counter
from typing import Any, Self

from disttrain.engine.cursor import (
    BATCH,
    BEGIN,
    COUNT,
    END,
    EPOCH,
    EPOCH_END,
    FETCH,
    FIRST_EPOCH,
    NEXT,
    OVER,
    PROCESS,
    Cursor,
    StopRequest,
)
from disttrain.engine.emitter import LOOP_EVENTS, Emitter, Slot
from disttrain.engine.events import Events
from disttrain.engine.progress import is_done, loaded, plan_run, saved
from disttrain.engine.signatures import check_takes_two
from disttrain.engine.state import State

# Looked up on the class, a member of an enum costs ten times as much.
GET_BATCH_STARTED, GET_BATCH_COMPLETED, ITERATION_STARTED, ITERATION_COMPLETED = LOOP_EVENTS

_NO_MORE = object()


class Engine(Emitter):
    """Runs `process_function(engine, batch)` over data; its result becomes `engine.state.output`.

    A subclass may override `_iterate` to say where batches come from.
    """

    should_terminate = StopRequest()
    should_terminate_single_epoch = StopRequest()
    should_interrupt = StopRequest()

    def __init__(self, process_function: Callable[[Self, Any], Any]) -> None:
        check_takes_two(process_function, "process_function", "the engine and the batch")
        super().__init__()
        self.logger = logging.getLogger(f"{__name__}.{type(self).__name__}")
        self._process_function: Callable[[Any, Any], Any] = process_function
        self._state_dict_user_keys: list[str] = []
        self._cursor: Cursor | None = None
        self._running = False
        self._next_data: Any = None
        self._left: State | None = None  # the state on which this engine's last run ended
        self._forget_stops()

    @property
    def state_dict_user_keys(self) -> list[str]:
        """Names of further attributes of the state that belong in the state dict; add to the list."""
        return self._state_dict_user_keys

    def run(
        self,
        data: Iterable[Any] | None = None,
        max_epochs: int | None = None,
        max_iters: int | None = None,
        epoch_length: int | None = None,
    ) -> State:
        """Run over `data` until a maximum is reached, and return the state.

            STARTED
            for each epoch:                    # epoch += 1 first
                EPOCH_STARTED                  # iter(data) is taken after the first of these
                for each iteration:
                    GET_BATCH_STARTED
                    state.batch = next(...)    # state.batch is None while it is being fetched
                    GET_BATCH_COMPLETED
                    iteration += 1
                    ITERATION_STARTED          # a handler may replace state.batch
                    state.output = process_function(engine, state.batch)
                    ITERATION_COMPLETED
                EPOCH_COMPLETED
            COMPLETED

        An epoch ends after `epoch_length` batches (by default `len(data)`); the next goes on with the same iterator.
        Where that ends early: DATALOADER_STOP_ITERATION, a fresh `iter(state.dataloader)`, and on with the fetch.
        Without data the three events of fetching do not fire. Where the state is that of a run that is not done
        (loaded, terminated, paused), it goes on; else it starts anew. `state.max_epochs = None` makes it start anew.
        """
        if self._running:
            raise RuntimeError("this engine is already running; run another one inside its handlers")
        data = self._next_data if data is None else data
        plan = plan_run(self.state, self._cursor is not None, data, max_epochs, max_iters, epoch_length)
        plan.apply(self.state)
        if plan.anew or self._cursor is None:
            self._cursor = Cursor()
            self.state.dataloader, self._next_data = data, None
            self._forget_stops()
            self.logger.info("run starts at epoch %d, iteration %d", self.state.epoch, self.state.iteration)
        else:
            self._cursor.resume()
            self.logger.info("run goes on at epoch %d, iteration %d", self.state.epoch, self.state.iteration)
        return self._drive(self._cursor)

    def _loop(self, run: Cursor) -> int:
        """Go on from `run.at` until the run ends or a stop is asked for; return the place to go on from.

        What it does from the beginning is `run`'s pseudocode. `at` is past a place only on the way to the one where
        the run goes on.
        """
        process, at = self._process_function, run.at
        if at == BEGIN and self._emit(Events.STARTED):
            return FIRST_EPOCH
        while at < END:
            state = self.state
            if at <= EPOCH:
                if run.exhausted or is_done(state):
                    break
                state.epoch += 1
                run.begin_epoch()
                if self._emit(Events.EPOCH_STARTED):
                    return BATCH
            if at < EPOCH_END:
                if run.iterator is None:
                    run.iterator = self._open(run)
                batch_started, batch_completed, started, completed = self._loop_slots()
                run.inside = True
                n = state.iteration
                while True:
                    if at <= BATCH:
                        state.batch = None
                        self.last_event_name = GET_BATCH_STARTED
                        if batch_started.due <= n and self._fire(batch_started, n):
                            return FETCH
                    if at <= FETCH:
                        batch = next(run.iterator, _NO_MORE)
                        if batch is _NO_MORE:
                            if state.epoch_length is None or run.empty_at == run.count:
                                self._end_of_data(run)
                                break
                            run.empty_at, run.iterator = run.count, None
                            if self._emit(Events.DATALOADER_STOP_ITERATION):
                                return FETCH
                            run.iterator = self._open(run)
                            at = FETCH
                            continue
                        state.batch, state.output = batch, None
                        self.last_event_name = GET_BATCH_COMPLETED
                        if batch_completed.due <= n and self._fire(batch_completed, n):
                            return COUNT
                    if at <= COUNT:
                        n = state.iteration = state.iteration + 1
                        run.count += 1
                        self.last_event_name = ITERATION_STARTED
                        if started.due <= n and self._fire(started, n):
                            return PROCESS
                    if at <= PROCESS:
                        state.output = process(self, state.batch)
                        self.last_event_name = ITERATION_COMPLETED
                        if completed.due <= n and self._fire(completed, n):
                            return NEXT
                    at = BATCH
                    if state.epoch_length is not None and run.count >= state.epoch_length:
                        break
                    if state.max_iters is not None and state.iteration >= state.max_iters:
                        self.should_terminate = True
                        return NEXT
                    if state.iteration != n:
                        n = state.iteration
                        self._loop_slots()
            if at <= EPOCH_END:
                run.inside = False
                state.times[Events.EPOCH_COMPLETED] = perf_counter() - run.epoch_began
                if self._emit(Events.EPOCH_COMPLETED):
                    return EPOCH
            at = EPOCH
        self.state.times[Events.COMPLETED] = perf_counter() - run.began
        self._emit(Events.COMPLETED)
        return OVER

    def _drive(self, run: Cursor) -> State:
        """Run the loop from stop to stop, until the run is over or paused."""
        self._running = True
        try:
            while run.at < OVER and not run.paused:
                try:
                    if self._stop_asked:
                        self._stop(run)
                    else:
                        run.at = self._loop(run)
                except BaseException as error:
                    if not self._swallows(run, error):
                        raise
        finally:
            self._running = False
            if not run.paused:
                self._cursor, self._left = None, self.state
        return self.state

    def _stop(self, run: Cursor) -> None:
        """Do the first of what was asked for, and move the cursor on."""
        if self.should_terminate:
            run.inside = False
            self._emit(Events.TERMINATE)
            run.at = OVER if self._skip_completed else END
            self._stop_asked = False  # what handlers of TERMINATE ask for comes too late
        elif self.should_terminate_single_epoch:
            try:
                self._stop_epoch(run)
            finally:
                self.should_terminate_single_epoch = False
        else:
            try:
                self._emit(Events.INTERRUPT)
            finally:
                self.should_interrupt = False
            run.pause()

    def _stop_epoch(self, run: Cursor) -> None:
        if run.inside:
            self._emit(Events.TERMINATE_SINGLE_EPOCH, iter_counter=run.count)
            run.iterator = self._open(run)
            run.at, run.inside = EPOCH if self._skip_epoch_completed else EPOCH_END, False
        elif run.at != EPOCH:  # after EPOCH_COMPLETED it is ignored
            raise RuntimeError(
                "terminate_epoch() was called in STARTED or EPOCH_STARTED, before the epoch's first iteration; "
                "call it in a later event, or terminate() to end the run"
            )

    def _swallows(self, run: Cursor, error: BaseException) -> bool:
        """Show the error to the handlers of EXCEPTION_RAISED; return False when it is to be raised."""
        state = self.state
        self.logger.error("%s at epoch %d, iteration %d: %s", type(error).__name__, state.epoch, state.iteration, error)
        if not self._slots[Events.EXCEPTION_RAISED].handlers:
            return False
        trace = error.__traceback__
        try:
            self._emit(Events.EXCEPTION_RAISED, error)
            run.at = EPOCH_END if run.inside and isinstance(error, Exception) else OVER
            return isinstance(error, Exception | KeyboardInterrupt)
        except BaseException as raised:
            if raised is not error:
                raise
            error.__traceback__ = trace  # without the frames of the handlers, which hold the error: a cycle
            return False
        finally:
            del error, trace

    def _iterate(self, first: bool) -> Iterator[Any]:
        """Return an iterator over `state.dataloader`, for a subclass to override.

        Called after the first EPOCH_STARTED of a run (`first`), when the iterator should be where `state.iteration`
        says: 0, or what was loaded. Called again (not `first`) when the data is to start anew: after the handlers of
        DATALOADER_STOP_ITERATION and TERMINATE_SINGLE_EPOCH, and by `set_data`. Never called without data.
        """
        assert self.state.dataloader is not None
        return iter(self.state.dataloader)

    def _open(self, run: Cursor) -> Iterator[Any]:
        """Return an iterator for the run; at its start also find how many batches of this epoch are already done."""
        state, first, run.opened = self.state, not run.opened, True
        if first and self._left is not state:
            run.count = state.iteration % state.epoch_length if state.epoch_length else state.iteration
        return itertools.repeat(None) if state.dataloader is None else self._iterate(first)

    def _end_of_data(self, run: Cursor) -> None:
        """End the epoch for want of data: it is as long as what there was, or two iterators in a row were empty."""
        state = self.state
        if state.epoch_length is None:
            state.epoch_length = run.count
        else:
            warnings.warn(
                f"the data gave {run.count} of the epoch_length={state.epoch_length} batches of epoch {state.epoch} "
                "and starts anew with none; pass data that can be iterated again, or a smaller epoch_length",
                UserWarning,
                stacklevel=5,
            )
        run.exhausted = run.count == 0 and state.max_epochs is None

    def _loop_slots(self) -> tuple[Slot, Slot, Slot, Slot]:
        """Return the events of an iteration, each to be looked at again; without data two that nobody handles."""
        slots = [self._slots[event] for event in LOOP_EVENTS]
        for slot in slots:
            slot.wake()
        if self.state.dataloader is None:
            slots[:2] = [Slot(event) for event in LOOP_EVENTS[:2]]
        return slots[0], slots[1], slots[2], slots[3]

    def _forget_stops(self) -> None:
        self._skip_completed = self._skip_epoch_completed = False
        for request in ("should_terminate", "should_terminate_single_epoch", "should_interrupt"):
            self.__dict__[request] = False
        self._stop_asked = False

    def _stop_changed(self) -> None:
        """Make the loop look after the event under way, if a stop is asked for."""
        self._stop_asked = self.should_terminate or self.should_terminate_single_epoch or self.should_interrupt
        if self._stop_asked:
            for event in LOOP_EVENTS:
                self._slots[event].wake()

    def terminate(self, skip_completed: bool = False) -> None:
        """End the run after the event under way: TERMINATE, then COMPLETED unless skipped; no EPOCH_COMPLETED."""
        self._skip_completed = skip_completed
        self.should_terminate = True

    def terminate_epoch(self, skip_epoch_completed: bool = False) -> None:
        """End the epoch after the event under way: TERMINATE_SINGLE_EPOCH, a fresh iterator, EPOCH_COMPLETED.

        In STARTED and EPOCH_STARTED, before the epoch's first iteration, RuntimeError; in EPOCH_COMPLETED ignored.
        """
        self._skip_epoch_completed = skip_epoch_completed
        self.should_terminate_single_epoch = True

    def interrupt(self) -> None:
        """Pause after the event under way: INTERRUPT, and `run` returns; the next `run` goes on at that point."""
        self.should_interrupt = True

    def set_data(self, data: Iterable[Any]) -> None:
        """Take the next batch from `data`. Outside a run: what a `run` without data goes over."""
        if not isinstance(data, Iterable) and not hasattr(data, "__getitem__"):
            raise TypeError(f"data must be iterable, got {data!r} of type {type(data).__name__}")
        self.state.dataloader = data
        if self._cursor is None:
            self._next_data = data
        elif self._cursor.iterator is not None:
            self._cursor.iterator = self._iterate(first=False)

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to go on from here: `epoch_length`, `iteration`, the maximum and the user keys."""
        return saved(self.state, self._state_dict_user_keys)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Let the next `run` go on from what `state_dict` returned; `epoch` may stand in place of `iteration`."""
        loaded(state_dict, self._state_dict_user_keys).apply(self.state)
        for key in self._state_dict_user_keys:
            setattr(self.state, key, state_dict[key])
        self._left = None
        if not self._running:
            self._cursor = None
