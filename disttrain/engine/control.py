"""The requests that a user makes of an engine besides running it: stop, pause, other data, save, load and copy.

A request to stop is only recorded here. The loop (`engine.py`) carries it out after the current event.
"""

import copy
import itertools
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from disttrain.engine.cursor import BATCH, EPOCH_END, FETCH, Cursor
from disttrain.engine.emitter import Emitter
from disttrain.engine.events import Event, Events
from disttrain.engine.run_plan import check_iterable, plan_from_dict, progress_dict
from disttrain.engine.state import State
from disttrain.parallel.window import AccumulationWindow, warn_of_lost

# A lookup of an enum's member on its class costs ten times as much as a global name.
GET_BATCH_STARTED = Events.GET_BATCH_STARTED
GET_BATCH_COMPLETED = Events.GET_BATCH_COMPLETED
ITERATION_STARTED = Events.ITERATION_STARTED
ITERATION_COMPLETED = Events.ITERATION_COMPLETED
WINDOW = "accumulation_window"
"""The key of an open accumulation window in a state dict."""
LOOP_EVENTS = (GET_BATCH_STARTED, GET_BATCH_COMPLETED, ITERATION_STARTED, ITERATION_COMPLETED)


class StopRequest:
    """An attribute of the engine that requests a stop. Once it is True, the loop stops after the current event."""

    def __set_name__(self, owner: type["Control"], name: str) -> None:
        self._name = f"_{name}"

    def __get__(self, engine: "Control", owner: type["Control"]) -> bool:
        requested: bool = getattr(engine, self._name)
        return requested

    def __set__(self, engine: "Control", requested: bool) -> None:
        setattr(engine, self._name, requested)
        engine._update_stop_requested()


class Control(Emitter):
    """All of an engine but its loop. Users make an `Engine`."""

    should_terminate = StopRequest()
    should_terminate_single_epoch = StopRequest()
    should_interrupt = StopRequest()
    interrupt_resume_enabled: bool = True
    """False: `interrupt()` is an error. Set it for one engine, or for all by `Engine.interrupt_resume_enabled`."""

    def __init__(self) -> None:
        super().__init__()
        self.logger = logging.getLogger(f"disttrain.engine.engine.{type(self).__name__}")
        self._cursor: Cursor | None = None
        self._running = False
        self._state_at_end: State | None = None  # the state with which this engine's last run ended
        self._next_data: Iterable[Any] | None = None
        self.raised_after: Event | None = None  # the newest exception came after this event
        self.window: AccumulationWindow | None = None
        self.loaded_window: Mapping[str, Any] | None = None
        self._state_dict_user_keys: list[str] = []
        self._clear_stop_requests()

    @property
    def state_dict_user_keys(self) -> list[str]:
        """Names of further attributes of the state that the state dict holds; append to this list."""
        return self._state_dict_user_keys

    def terminate(self, skip_completed: bool = False) -> None:
        """End the run after the current event: TERMINATE, then COMPLETED unless skipped; no EPOCH_COMPLETED.

        The next `run` of this engine continues with the next epoch.
        """
        self._skip_completed = skip_completed
        self.should_terminate = True

    def terminate_epoch(self, skip_epoch_completed: bool = False) -> None:
        """End the epoch after the current event: TERMINATE_SINGLE_EPOCH, a fresh iterator, EPOCH_COMPLETED.

        EPOCH_COMPLETED can be skipped. In STARTED and EPOCH_STARTED, before the epoch's first iteration, the request
        is a RuntimeError. In EPOCH_COMPLETED it is ignored.
        """
        self._skip_epoch_completed = skip_epoch_completed
        self.should_terminate_single_epoch = True

    def interrupt(self) -> None:
        """Pause after the current event: INTERRUPT, then `run` returns. The next `run` continues at that point.

        RuntimeError if `interrupt_resume_enabled` is False.
        """
        if not self.interrupt_resume_enabled:
            raise RuntimeError(
                "expected no interrupt() while interrupt_resume_enabled is False, got one; set "
                f"{type(self).__name__}.interrupt_resume_enabled = True, or end the run by terminate()"
            )
        self.should_interrupt = True

    def set_data(self, data: Iterable[Any]) -> None:
        """Take the next batch from `data`. Outside a run: use `data` in the next `run` that is given none."""
        check_iterable(data)
        self.state.dataloader = data
        if self._cursor is None:
            self._next_data = data
        elif self._cursor.iterator is not None:
            self._cursor.iterator = self._iterate(first=False)
            self._reenter_loop()

    def state_dict(self) -> dict[str, Any]:
        """Return the state to resume from: `epoch_length`, `iteration`, the maximum and the user keys.

        Inside an accumulation window also the window, with the gradients so far.
        """
        window = self.loaded_window if self.window is None else self.window.state_dict()
        return progress_dict(self.state, self._state_dict_user_keys) | ({WINDOW: window} if window else {})

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Let the next `run` continue from a `state_dict`, which may hold `epoch` in place of `iteration`.

        The run continues inside the epoch, at `iteration % epoch_length`. A paused run is dropped.
        """
        plan = plan_from_dict(state_dict, self._state_dict_user_keys)
        plan.apply(self.state)
        for key in self._state_dict_user_keys:
            setattr(self.state, key, state_dict[key])
        self.window, self.loaded_window = None, state_dict.get(WINDOW)
        self._state_at_end = None
        if self._running:
            self._reenter_loop()
        else:
            self._cursor = None

    def __getstate__(self) -> dict[str, Any]:
        """Return everything but the data; the next `run` of a copy needs data.

        The copy of an engine that was paused inside an epoch continues inside that epoch, as from a loaded state. The
        copy of an engine that was running continues with the next epoch, as after `terminate`.
        """
        state = copy.copy(self.state)
        state.dataloader = None
        state_at_end = state if self._state_at_end is self.state or self._cursor is not None else None
        if self._cursor is not None and not self._running and BATCH <= self._cursor.at < EPOCH_END:
            state.epoch, state_at_end = state.epoch - 1, None
        window = self.loaded_window if self.window is None else self.window.state_dict()
        fresh = {"_cursor": None, "_running": False, "_next_data": None, "window": None, "loaded_window": window}
        return {**self.__dict__, "state": state, "_state_at_end": state_at_end, **fresh}

    def _iterate(self, first: bool) -> Iterator[Any]:
        """Return an iterator over `state.dataloader`. A subclass may override this.

        The call after a run's first EPOCH_STARTED (`first`) needs an iterator that begins at `state.iteration`, which
        is 0 or was loaded. The later calls (not `first`) need one that begins anew. They come after the handlers of
        DATALOADER_STOP_ITERATION and of TERMINATE_SINGLE_EPOCH, and from `set_data`. No call comes without data.
        """
        state = self.state
        assert state.dataloader is not None
        if first and self._state_at_end is not state and state.iteration % (state.epoch_length or 1):
            self.logger.warning(
                "the run goes on inside epoch %d, at iteration %d, and takes its data from the beginning; "
                "a DeterministicEngine goes on at the batch",
                state.epoch,
                state.iteration,
            )
        return iter(state.dataloader)

    def _open(self, run: Cursor) -> Iterator[Any]:
        """Return an iterator for the run. At the run's start also count the batches of this epoch that are done."""
        state, first, run.opened = self.state, not run.opened, True
        if first and self._state_at_end is not state:
            run.count = state.iteration % state.epoch_length if state.epoch_length else state.iteration
        return itertools.repeat(None) if state.dataloader is None else self._iterate(first)

    def _restart_data(self, run: Cursor) -> int | None:
        """Fire DATALOADER_STOP_ITERATION and take a fresh iterator; return the place to leave the loop for, if any.

        Data of unknown length ends the epoch instead, and sets the epoch's length. Two empty fetches in a row also
        end the epoch. If such an epoch had no batch and the run counts iterations, the run ends, since its next
        epoch would have none either.
        """
        state = self.state
        state.batch = None
        if state.epoch_length is not None and run.empty_at != run.count:
            run.empty_at, run.iterator = run.count, None
            if self._emit(Events.DATALOADER_STOP_ITERATION):
                return FETCH
            run.iterator = self._open(run)
            return None
        if state.epoch_length is None:
            state.epoch_length = run.count
            told = "" if run.count else "the data gave no batch; pass data that was not iterated before"
        else:
            told = (
                f"the data gave {run.count} of the epoch_length={state.epoch_length} batches of epoch {state.epoch}, "
                "and a fresh iterator gave none; pass data that can be iterated again, or a smaller epoch_length"
            )
        if told:
            warnings.warn(told, UserWarning, stacklevel=5)
        run.exhausted = run.count == 0 and state.max_epochs is None
        return EPOCH_END

    def _warn_of_untaken_window(self) -> None:
        """At a run's end: warn if no iteration has taken the loaded window, as those of a step that accumulates do."""
        loaded = self.loaded_window
        if loaded is not None and self.state.iteration > loaded["iteration"]:
            self.loaded_window = None
            warn_of_lost(loaded, "the process function does not accumulate gradients by gradient_accumulation_steps")

    def _clear_stop_requests(self) -> None:
        self._skip_completed = self._skip_epoch_completed = False
        self._should_terminate = self._should_terminate_single_epoch = self._should_interrupt = False
        self._stop_requested = False

    def _update_stop_requested(self) -> None:
        """Follow a change of one of the requests to stop."""
        self._stop_requested = self.should_terminate or self.should_terminate_single_epoch or self.should_interrupt
        if self._stop_requested:
            self._reenter_loop()

    def _reenter_loop(self) -> None:
        """Make the loop return after the current event, so that it is entered again with the values of then."""
        self._stop_requested = True
        for event in LOOP_EVENTS:
            self._handler_lists[event].wake()
