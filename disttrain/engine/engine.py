"""What a user calls: run, stop, save and load."""

import copy
from collections.abc import Callable, Iterable, Mapping
from time import perf_counter
from typing import Any, Self

from disttrain.engine.cursor import BATCH, EPOCH_END, Cursor
from disttrain.engine.loop import Loop
from disttrain.engine.progress import check_iterable, loaded, plan_run, saved
from disttrain.engine.signatures import check_takes_two
from disttrain.engine.state import State


class Engine(Loop):
    """Runs `process_function(engine, batch)` over data; its result becomes `engine.state.output`.

    It refers to nothing that refers back to it, so that it goes, with its data, when the last reference to it does.
    A subclass may override `_iterate` to say where batches come from.
    """

    def __init__(self, process_function: Callable[[Self, Any], Any]) -> None:
        check_takes_two(process_function, "process_function", "the engine and the batch")
        super().__init__(process_function)
        self._state_dict_user_keys: list[str] = []
        self._next_data: Iterable[Any] | None = None

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
        With `max_iters`, `state.max_epochs` stays None.
        """
        if self._running:
            raise RuntimeError("this engine is already running; run another one inside its handlers")
        data = self._next_data if data is None else data
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
