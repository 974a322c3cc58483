"""In which order things happen: the loop over epochs and batches, written once, which can be left and entered anywhere.

*Contract*: `Loop._loop` is the pseudocode of `Engine.run`. It is left at a stop request or an exception; `_drive` does
what that asks for, moves the cursor on, and enters it again. So pausing, ending an epoch and going on after an
exception need no second loop.
*Errors*: an exception is logged in one line, then either raised to the caller or given to handlers of
EXCEPTION_RAISED.
*Cost*: an event with no handler, or with none due at this iteration, costs one comparison.
"""

import itertools
import logging
import warnings
from collections.abc import Callable, Iterator
from time import perf_counter
from typing import Any

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
from disttrain.engine.emitter import Emitter
from disttrain.engine.events import Events
from disttrain.engine.progress import is_done
from disttrain.engine.registration import Slot
from disttrain.engine.state import State

# Looked up on the class, a member of an enum costs ten times as much.
GET_BATCH_STARTED = Events.GET_BATCH_STARTED
GET_BATCH_COMPLETED = Events.GET_BATCH_COMPLETED
ITERATION_STARTED = Events.ITERATION_STARTED
ITERATION_COMPLETED = Events.ITERATION_COMPLETED
LOOP_EVENTS = (GET_BATCH_STARTED, GET_BATCH_COMPLETED, ITERATION_STARTED, ITERATION_COMPLETED)

_NO_MORE = object()


class Loop(Emitter):
    """Drives a cursor through a run; `Engine` is what a user calls."""

    should_terminate = StopRequest()
    should_terminate_single_epoch = StopRequest()
    should_interrupt = StopRequest()

    def __init__(self, process_function: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.logger = logging.getLogger(f"disttrain.engine.engine.{type(self).__name__}")
        self._process_function = process_function
        self._cursor: Cursor | None = None
        self._running = False
        self._left: State | None = None  # the state on which the last run of this engine ended
        self._forget_stops()

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
                        state.batch = next(run.iterator, _NO_MORE)
                        if state.batch is _NO_MORE:
                            state.batch = None
                            if state.epoch_length is None or run.empty_at == run.count:
                                self._end_of_data(run)
                                return EPOCH_END
                            run.empty_at, run.iterator = run.count, None
                            if self._emit(Events.DATALOADER_STOP_ITERATION):
                                return FETCH
                            run.iterator = self._open(run)
                            at = FETCH
                            continue
                        state.output = None
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
        """Run the loop from stop to stop, until the run is over or paused.

        What is asked for while a run is paused is done first when it goes on.
        """
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
                self._cursor = None
                if run.epoch_began:
                    self._left = self.state
        verb = "pauses" if run.paused else "ends"
        self.logger.info("run %s at epoch %d, iteration %d", verb, self.state.epoch, self.state.iteration)
        return self.state

    def _stop(self, run: Cursor) -> None:
        """Do the first of what was asked for, and move the cursor on."""
        if self.should_terminate:
            run.inside, then = False, OVER if self._skip_completed else END
            self._emit(Events.TERMINATE)
            run.at, self._stop_asked = then, False  # what handlers of TERMINATE ask for comes too late
        elif self.should_terminate_single_epoch:
            try:
                self._stop_epoch(run)
            finally:
                self.should_terminate_single_epoch = False
        elif self.should_interrupt:
            try:
                self._emit(Events.INTERRUPT)
            finally:
                self.should_interrupt = False
            run.pause()
        else:  # see _look_again
            self._stop_asked = False

    def _stop_epoch(self, run: Cursor) -> None:
        if run.inside:
            then = EPOCH if self._skip_epoch_completed else EPOCH_END
            self._emit(Events.TERMINATE_SINGLE_EPOCH, iter_counter=run.count)
            run.iterator = None  # the old one's workers end before the new one's begin
            run.iterator = self._open(run)
            run.at, run.inside = then, False
        elif run.at in (FIRST_EPOCH, BATCH):  # else the epoch is over, and it is ignored
            raise RuntimeError(
                "terminate_epoch() was called in STARTED or EPOCH_STARTED, before the epoch's first iteration; "
                "call it in a later event, or terminate() to end the run"
            )

    def _swallows(self, run: Cursor, error: BaseException) -> bool:
        """Show the error to the handlers of EXCEPTION_RAISED; return False when it is to be raised.

        Shown inside the iterations it ends the epoch, elsewhere the run; a KeyboardInterrupt ends the run anywhere.
        SystemExit and its like, meant for the process, are shown and raised all the same.
        """
        state = self.state
        name, message = type(error).__name__, str(error)  # the error itself would live as long as the log record
        self.logger.error("%s at epoch %d, iteration %d: %s", name, state.epoch, state.iteration, message)
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
        """End the epoch for want of data: it is as long as what there was, or two fetches in a row were empty.

        A run that counts iterations ends with an epoch that had none: the next would have none either.
        """
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
        for slot in (slots := [self._slots[event] for event in LOOP_EVENTS]):
            slot.by_iteration = self.state.event_to_attr.get(slot.event) == "iteration"
            slot.wake()
        if self.state.dataloader is None:
            slots[:2] = [Slot(event) for event in LOOP_EVENTS[:2]]
        return slots[0], slots[1], slots[2], slots[3]

    def _forget_stops(self) -> None:
        self._skip_completed = self._skip_epoch_completed = False
        self._should_terminate = self._should_terminate_single_epoch = self._should_interrupt = False
        self._stop_asked = False

    def _stop_changed(self) -> None:
        """Follow a change of one of the requests to stop."""
        self._stop_asked = self.should_terminate or self.should_terminate_single_epoch or self.should_interrupt
        if self._stop_asked:
            self._look_again()

    def _look_again(self) -> None:
        """Make the loop stop after the event under way and start again from what it finds then."""
        self._stop_asked = True
        for event in LOOP_EVENTS:
            self._slots[event].wake()
