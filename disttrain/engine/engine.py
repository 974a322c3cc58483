"""The loop over epochs and batches. It is written once, and can be left and entered again at any place.

*Contract*: `_loop` is the pseudocode of `Engine.run`. It returns at a stop request and raises at an exception. `_drive`
then carries out the request, moves the cursor on and enters the loop again. Therefore no second loop is needed to
pause, to end an epoch or to continue after an exception.
*Errors*: an exception is logged in one line. Then it is raised to the caller, or passed to the handlers of
EXCEPTION_RAISED if there are any.
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
from disttrain.engine.registration import HandlerList
from disttrain.engine.run_plan import is_done, plan_run
from disttrain.engine.signatures import check_takes_two
from disttrain.engine.state import State

_NO_MORE = object()


class Engine(Control):
    """Runs `process_function(engine, batch)` over data; its result becomes `engine.state.output`.

    It is in no reference cycle, so it and its data are freed with the last reference to it. A subclass may override
    `_iterate` to choose where batches come from, and `_around_run` to put a context around every run.
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

        An epoch ends after `epoch_length` batches (by default `len(data)`). The next epoch continues with the same
        iterator. If the iterator ends early, DATALOADER_STOP_ITERATION fires, a fresh `iter(state.dataloader)` is
        taken, and the fetch is repeated. Without data the three events of fetching do not fire.

        The run continues if the state belongs to a run that is not done (loaded, terminated or paused). Otherwise it
        starts anew. `state.max_epochs = None` forces a new start. With `max_iters`, `state.max_epochs` stays None.
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
                self._cursor = Cursor(started_at=perf_counter())
                self.state.dataloader, self._next_data = data, None
                self._clear_stop_requests()
            else:
                self._cursor.resume()
            verb = "starts" if plan.anew else "goes on"
            self.logger.info("run %s at epoch %d, iteration %d", verb, self.state.epoch, self.state.iteration)
            return self._drive(self._cursor)

    def _around_run(self, data: Iterable[Any] | None) -> AbstractContextManager[None]:
        """Return a context for a whole run over `data` (None: none was passed). A subclass may override this."""
        return nullcontext()

    def _loop(self, run: Cursor) -> int:
        """Run from `run.at` until the run ends or a stop is requested; return the place to continue from.

        From the beginning this is the pseudocode of `run`. At a later entry, the places before `at` are skipped once.
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
                batch_started, batch_completed, started, completed = self._woken_loop_handlers()
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
                            if (next_place := self._restart_data(run)) is not None:
                                return next_place
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
                    if state.iteration != n:  # a handler has moved the counter
                        n = state.iteration
                        self._woken_loop_handlers()
            if at <= EPOCH_END:
                run.inside = False
                state.times["EPOCH_COMPLETED"] = perf_counter() - run.epoch_started_at
                if self._emit(Events.EPOCH_COMPLETED):
                    return EPOCH
            at = EPOCH
        self.state.times["COMPLETED"] = perf_counter() - run.started_at
        self._emit(Events.COMPLETED)
        return OVER

    def _drive(self, run: Cursor) -> State:
        """Enter the loop again after each stop, until the run is over or paused.

        A stop that was requested while the run was paused is carried out before the loop is entered.
        """
        self._running = True
        try:
            while run.at < OVER and not run.paused:
                try:
                    if self._stop_requested:
                        self._carry_out_stop(run)
                    else:
                        run.at = self._loop(run)
                except BaseException as error:
                    if not self._handle_exception(run, error):
                        raise
        finally:
            self._running = False
            self._warn_of_untaken_window()
            if not run.paused:
                self._cursor = None
                if run.epoch_started_at:
                    self._state_at_end = self.state
        verb = "pauses" if run.paused else "ends"
        self.logger.info("run %s at epoch %d, iteration %d", verb, self.state.epoch, self.state.iteration)
        return self.state

    def _carry_out_stop(self, run: Cursor) -> None:
        """Carry out the first of the requested stops, and move the cursor on."""
        if self.should_terminate:
            run.inside, next_place = False, OVER if self._skip_completed else END
            self._emit(Events.TERMINATE)
            run.at, self._stop_requested = next_place, False  # a request by a handler of TERMINATE comes too late
        elif self.should_terminate_single_epoch:
            try:
                self._end_epoch_early(run)
            finally:
                self.should_terminate_single_epoch = False
        elif self.should_interrupt:
            try:
                self._emit(Events.INTERRUPT)
            finally:
                self.should_interrupt = False
            run.pause()
        else:  # by _reenter_loop
            self._stop_requested = False

    def _end_epoch_early(self, run: Cursor) -> None:
        if run.inside:
            next_place = EPOCH if self._skip_epoch_completed else EPOCH_END
            self._emit(Events.TERMINATE_SINGLE_EPOCH, iter_counter=run.count)
            run.iterator = None  # ends the old iterator's workers before the new iterator starts its own
            run.iterator = self._open(run)
            run.at, run.inside = next_place, False
        elif run.at in (FIRST_EPOCH, BATCH):  # elsewhere the epoch is over already, and the request is ignored
            raise RuntimeError(
                "terminate_epoch() was called in STARTED or EPOCH_STARTED, before the epoch's first iteration; "
                "call it in a later event, or call terminate() to end the run"
            )

    def _handle_exception(self, run: Cursor, error: BaseException) -> bool:
        """Pass the error to the handlers of EXCEPTION_RAISED; return False if it must be raised to the caller.

        A handled error ends the epoch if it came from inside the iterations, else the run. A KeyboardInterrupt always
        ends the run. SystemExit and its like are meant for the process: they are passed to the handlers and raised.
        """
        state = self.state
        name, message = type(error).__name__, str(error)  # the error itself would live as long as the log record
        self.logger.error("%s at epoch %d, iteration %d: %s", name, state.epoch, state.iteration, message)
        if not self._handler_lists[Events.EXCEPTION_RAISED].registrations:
            return False
        self.raised_after, trace = self.last_event_name, error.__traceback__
        try:
            self._emit(Events.EXCEPTION_RAISED, error)
            run.at = EPOCH_END if run.inside and isinstance(error, Exception) else OVER
            return isinstance(error, Exception | KeyboardInterrupt)
        except BaseException as raised:
            if raised is not error:
                raise
            error.__traceback__ = trace  # drops the handlers' frames: they hold the error, which would be a cycle
            return False
        finally:
            del error, trace

    def _woken_loop_handlers(self) -> tuple[HandlerList, HandlerList, HandlerList, HandlerList]:
        """Wake the handler lists of an iteration's four events and return them; without data two are empty ones."""
        handler_lists = [self._handler_lists[event] for event in LOOP_EVENTS]
        for handler_list in handler_lists:
            handler_list.by_iteration = self.state.event_to_attr.get(handler_list.event) == "iteration"
            handler_list.wake()
        if self.state.dataloader is None:
            handler_lists[:2] = [HandlerList(event) for event in LOOP_EVENTS[:2]]
        return handler_lists[0], handler_lists[1], handler_lists[2], handler_lists[3]
