"""In which order things happen: the loop over epochs and batches, written once, which can be left and entered anywhere.

*Contract*: `_loop` is the pseudocode of `Engine.run`. It is left at a stop request or an exception; `_drive` does
what that asks for, moves the cursor on, and enters it again. So pausing, ending an epoch and going on after an
exception need no second loop.
*Errors*: an exception is logged in one line, then either raised to the caller or given to handlers of
EXCEPTION_RAISED.
*Cost*: an event with no handler, or with none due at this iteration, costs one comparison.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from time import perf_counter
from typing import Any, Self

from disttrain.engine.control import (
    GET_BATCH_COMPLETED,
    GET_BATCH_STARTED,
    ITERATION_COMPLETED,
    ITERATION_STARTED,
    LOOP_EVENTS,
    Control,
)
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
)
from disttrain.engine.events import Events
from disttrain.engine.progress import is_done, plan_run
from disttrain.engine.registration import Slot
from disttrain.engine.signatures import check_takes_two
from disttrain.engine.state import State

_NO_MORE = object()


class Engine(Control):
    """Runs `process_function(engine, batch)` over data; its result becomes `engine.state.output`.

    It refers to nothing that refers back to it, so that it goes, with its data, when the last reference to it does.
    A subclass may override `_iterate` to say where batches come from, and `_around_run` for what a run is to leave
    as it found it.
    """

    def __init__(self, process_function: Callable[[Self, Any], Any]) -> None:
        check_takes_two(process_function, "process_function", "the engine and the batch")
        super().__init__()
        self._process_function: Callable[[Any, Any], Any] = process_function

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
        With `max_iters`, `state.max_epochs` stays None.
        """
        if self._running:
            raise RuntimeError("this engine is already running; run another one inside its handlers")
        data = self._next_data if data is None else data
        with self._around_run(data):
            paused = self._cursor is not None
            plan = plan_run(self.state, paused, data, max_epochs, max_iters, epoch_length)
            plan.apply(self.state)
            self._map_attributes()
            if self._cursor is None or plan.anew:
                self._cursor = Cursor(began=perf_counter())
                self.state.dataloader, self._next_data = data, None
                self._forget_stops()
            else:
                self._cursor.resume()
            verb = "starts" if plan.anew else "goes on"
            self.logger.info("run %s at epoch %d, iteration %d", verb, self.state.epoch, self.state.iteration)
            return self._drive(self._cursor)

    def _around_run(self, data: Iterable[Any] | None) -> AbstractContextManager[None]:
        """Return a context that every run is in, for a subclass to override; `data` is what it goes over, if new."""
        return nullcontext()

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

    def _loop_slots(self) -> tuple[Slot, Slot, Slot, Slot]:
        """Return the events of an iteration, each to be looked at again; without data two that nobody handles."""
        for slot in (slots := [self._slots[event] for event in LOOP_EVENTS]):
            slot.by_iteration = self.state.event_to_attr.get(slot.event) == "iteration"
            slot.wake()
        if self.state.dataloader is None:
            slots[:2] = [Slot(event) for event in LOOP_EVENTS[:2]]
        return slots[0], slots[1], slots[2], slots[3]
