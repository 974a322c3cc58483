"""What a user asks of an engine besides running it: stop, pause, other data, save and load, copies.

A stop that is asked for is noted here and done by the loop (`engine.py`), after the event under way.
"""

import copy
import itertools
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from disttrain.engine.cursor import BATCH, EPOCH_END, Cursor, StopRequest
from disttrain.engine.emitter import Emitter
from disttrain.engine.events import Events
from disttrain.engine.progress import check_iterable, loaded, saved
from disttrain.engine.state import State

# Looked up on the class, a member of an enum costs ten times as much.
GET_BATCH_STARTED = Events.GET_BATCH_STARTED
GET_BATCH_COMPLETED = Events.GET_BATCH_COMPLETED
ITERATION_STARTED = Events.ITERATION_STARTED
ITERATION_COMPLETED = Events.ITERATION_COMPLETED
LOOP_EVENTS = (GET_BATCH_STARTED, GET_BATCH_COMPLETED, ITERATION_STARTED, ITERATION_COMPLETED)


class Control(Emitter):
    """The part of an engine that is not its loop; `Engine` is what a user makes."""

    should_terminate = StopRequest()
    should_terminate_single_epoch = StopRequest()
    should_interrupt = StopRequest()

    def __init__(self) -> None:
        super().__init__()
        self.logger = logging.getLogger(f"disttrain.engine.engine.{type(self).__name__}")
        self._cursor: Cursor | None = None
        self._running = False
        self._left: State | None = None  # the state on which the last run of this engine ended
        self._next_data: Iterable[Any] | None = None
        self._state_dict_user_keys: list[str] = []
        self._forget_stops()

    @property
    def state_dict_user_keys(self) -> list[str]:
        """Names of further attributes of the state that belong in the state dict; add to the list."""
        return self._state_dict_user_keys

    def terminate(self, skip_completed: bool = False) -> None:
        """End the run after the event under way: TERMINATE, then COMPLETED unless skipped; no EPOCH_COMPLETED.

        The next `run` of this engine goes on with the next epoch.
        """
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
        check_iterable(data)
        self.state.dataloader = data
        if self._cursor is None:
            self._next_data = data
        elif self._cursor.iterator is not None:
            self._cursor.iterator = self._iterate(first=False)
            self._look_again()

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to go on from here: `epoch_length`, `iteration`, the maximum and the user keys."""
        return saved(self.state, self._state_dict_user_keys)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Let the next `run` go on from what `state_dict` returned; `epoch` may stand in place of `iteration`.

        It goes on inside the epoch, at `iteration % epoch_length`. A paused run is dropped.
        """
        plan = loaded(state_dict, self._state_dict_user_keys)
        plan.apply(self.state)
        for key in self._state_dict_user_keys:
            setattr(self.state, key, state_dict[key])
        self._left = None
        if self._running:
            self._look_again()
        else:
            self._cursor = None

    def __getstate__(self) -> dict[str, Any]:
        """Return everything but the data: the next `run` of a copy is given some.

        A copy of an engine that was paused inside an epoch goes on inside that epoch, as from a loaded state; one of
        an engine that was running goes on with the next epoch, as after `terminate`.
        """
        state = copy.copy(self.state)
        state.dataloader = None
        left = state if self._left is self.state or self._cursor is not None else None
        if self._cursor is not None and not self._running and BATCH <= self._cursor.at < EPOCH_END:
            state.epoch, left = state.epoch - 1, None
        fresh = {"state": state, "_left": left, "_cursor": None, "_running": False, "_next_data": None}
        return {**self.__dict__, **fresh}

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
