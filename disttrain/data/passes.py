"""Reads the steps of a stream, pass after pass; each step is fetched ahead and known to exist on all ranks.

*Contract*: `ahead` is the step that comes next, already fetched. A pass ends when some rank does not have that step.
If the streams have no state to resume from, the pass is read from its start and the steps before the position are
dropped.

*Errors*: DataError on every rank for a pass without a step, and for a pass that is shorter than the run has read it
before. An exception of fetching is raised on its rank, when its step is asked for.
"""

import logging
from collections.abc import Callable
from typing import TypeVar

from disttrain.data.fetching import Fetching
from disttrain.data.ranks import StreamRanks
from disttrain.data.stream_reader import Part, Requests, StreamReader, StreamState
from disttrain.errors import DataError

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Passes:
    """Reads steps from a position; all attributes are valid after `settle`.

    The position is `epoch` (the pass) and `step`, and `to_drop` steps that are still to be read and dropped from there.
    `steps_before` is the number of steps in all earlier passes, None if unknown. `states` are the states of the streams
    at `step`, by the first slot of their unit, or None.
    """

    def __init__(
        self, reader: StreamReader, fetching: Fetching, num_workers: int, ranks: StreamRanks, *, accept_other_data: bool
    ) -> None:
        self._reader = reader
        self._fetching = fetching
        self._ranks = ranks
        self._accept_other_data = accept_other_data
        num_units = len(reader.units)
        # One request for each unit, filled up to a multiple of the workers, so a unit is always read by one worker.
        self._requests_per_step = -(-num_units // num_workers) * num_workers if num_workers else num_units
        self._wait_for_end: Callable[[], bool] | None = None
        """Returns whether the pass ends before `ahead`; None if that is known already."""
        self.ahead: list[Part] | Exception | None = None
        self.go_to(0, 0, steps_before=0)

    def go_to(self, epoch: int, step: int, *, steps_before: int | None, to_drop: int = 0) -> None:
        """Set the position to `step` of pass `epoch`, with nothing fetched."""
        self.stop()
        self.epoch, self.step, self.steps_before, self.to_drop = epoch, step, steps_before, to_drop
        self.states: dict[int, StreamState] | None = None
        self.known_step = 0
        """A step that the pass must have, because the run has been there before; 0 if none is known."""

    def stop(self) -> None:
        """Drop the fetched step and close the streams, here and in the workers; the position stays."""
        self._fetching.stop()
        self._reader.begin(0, {})
        self.ahead, self._wait_for_end = None, None

    def discard_states(self) -> None:
        """Read the pass from its start again, because the states of the streams give other samples than before."""
        logger.warning(
            "the state of the training data does not bring back the samples that came next: it lacks something, as "
            "that of Hugging Face's shuffle buffers does. The pass is read again up to this position"
        )
        self.stop()
        self.states = None

    def settle(self) -> None:
        """Wait for the pending question whether every rank has the step ahead; if not, end the pass."""
        if self._wait_for_end is not None:
            wait, self._wait_for_end = self._wait_for_end, None
            if wait():
                self._end_pass()

    def make_ready(self) -> None:
        """Fetch the next step and check that every rank has it. If the pass is over, the next pass begins."""
        while self.ahead is None or self._wait_for_end is not None:
            if self.ahead is None:
                self._fetch_ahead()
            self.settle()

    def advance(self) -> list[Part]:
        """Return the parts of the step ahead, or raise the exception of fetching it; fetch the step after it."""
        current = self.ahead
        assert current is not None, "`make_ready` comes first"
        if isinstance(current, Exception):
            self.ahead = None
            raise current
        try:
            self._fetch_ahead()
        except BaseException:  # a KeyboardInterrupt: the current step was not yielded, so it must come again
            self.stop()
            raise
        self.step += 1
        self.to_drop = max(0, self.to_drop - 1)
        states = {unit.slots.start: part.state for unit, part in zip(self._reader.units, current, strict=True)}
        known = {slot: state for slot, state in states.items() if state is not None}
        self.states = known if len(known) == len(states) else None
        return current

    def _fetch_ahead(self) -> None:
        """Fetch the step that comes next, and start to ask all ranks whether the pass is over for one of them."""
        try:
            if not self._fetching.started:
                self._start()
            self.ahead = self._fetching.take(self._requests_per_step)[: len(self._reader.units)]
        except Exception as error:  # noqa: BLE001 - `advance` raises it; the step before it is sound
            self.ahead = error
        ended = isinstance(self.ahead, list) and any(part.batches is None for part in self.ahead)
        self._wait_for_end = self._ranks.start_any(ended)

    def _start(self) -> None:
        if self.step and self.states is None:
            self.step, self.to_drop = 0, self.step  # without states, reading can begin only at the start of the pass
        self._reader.begin(self.epoch, self.states or {})
        self._fetching.start(Requests(len(self._reader.units), self._requests_per_step, self.step, self.to_drop))

    def _end_pass(self) -> None:
        """Go to the start of the next pass, or raise if this pass was too short."""
        parts = self.ahead if isinstance(self.ahead, list) else []
        left = {u.slots.start: p.num_left for u, p in zip(self._reader.units, parts, strict=False) if p.batches is None}
        epoch, length = self.epoch, self.step
        self.stop()
        if length == 0:
            raise DataError(self._reader.too_short_message(epoch, gather_by_slot(self._ranks, left) or {}))
        if length <= self.known_step and not self._accept_other_data:
            if self.states is not None:
                self.discard_states()
                return
            raise DataError(
                f"the training data has changed since the run began: pass {epoch} ends after {length} steps, expected "
                f"more than {self.known_step}, as before; restore the data, start a new run with --fresh, or continue "
                "with other data by accept_other_data=true"
            )
        logger.info("pass %d of the training data is over after %d steps; left over here: %s", epoch, length, left)
        steps_before = None if self.steps_before is None else self.steps_before + length
        self.go_to(epoch + 1, 0, steps_before=steps_before, to_drop=self.to_drop)


def gather_by_slot(ranks: StreamRanks, mine: dict[int, T] | None) -> dict[int, T] | None:
    """Return the values of all ranks' slots; None if one rank has None. A collective."""
    by_rank: list[dict[int, T] | None] = ranks.all_gather(mine)
    known = [part for part in by_rank if part is not None]
    return {slot: x for part in known for slot, x in part.items()} if len(known) == len(by_rank) else None
