"""The steps of a stream, one after another over its passes, each fetched one ahead and known to be there on all ranks.

*Contract*: `ahead` is the step at hand, the one that comes next; a pass is over when some rank does not have it. What
has no state to be gone on from is read from the start of its pass and dropped.

*Errors*: a pass without a single step, or one that is shorter than the run has read already: DataError on every rank.
What fetching raises is raised when its step's turn comes, on that rank.
"""

import logging
from collections.abc import Callable
from typing import TypeVar

from disttrain.data.fetching import Fetching
from disttrain.data.ranks import Ranks
from disttrain.data.stream_reader import Part, Requests, State, StreamReader
from disttrain.errors import DataError

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Passes:
    """Reads steps; `epoch`, `step` and `began` (steps before the pass, None where unknown) say where, once `settled`.

    `to_drop` steps are still to be dropped from there; `states` are those of the units at `step`, by first slot.
    """

    def __init__(
        self, reader: StreamReader, fetching: Fetching, num_workers: int, ranks: Ranks, *, accept_other_data: bool
    ) -> None:
        self._reader = reader
        self._fetching = fetching
        self._ranks = ranks
        self._accept_other_data = accept_other_data
        num_units = len(reader.units)
        # One request for each unit, and as many more that each unit's always go to the same worker.
        self._requests_a_step = -(-num_units // num_workers) * num_workers if num_workers else num_units
        self._answer: Callable[[], bool] | None = None
        self.ahead: list[Part] | Exception | None = None
        self.go_to(0, 0, began=0)

    def go_to(self, epoch: int, step: int, *, began: int | None, to_drop: int = 0) -> None:
        """Stand at `step` of pass `epoch`, with nothing fetched."""
        self.stop()
        self.epoch, self.step, self.began, self.to_drop = epoch, step, began, to_drop
        self.states: dict[int, State] | None = None
        self.must_pass = 0
        """The pass has this step, for a run has been there; 0: nobody knows."""

    def stop(self) -> None:
        """Let go of what was fetched and of what is open, here and in workers; the place stays."""
        self._fetching.stop()
        self._reader.begin(0, {})
        self.ahead, self._answer = None, None

    def distrust_states(self) -> None:
        """Go on from the pass's beginning: what the states of the streams bring back is not what came next."""
        logger.warning(
            "the state of the training data does not bring back the samples that came next: it lacks something, as "
            "that of Hugging Face's shuffle buffers does. What lies before is read again"
        )
        self.stop()
        self.states = None

    def settle(self) -> None:
        """Hear whether every rank has the step at hand; if not, the pass is over."""
        if self._answer is not None:
            answer, self._answer = self._answer, None
            if answer():
                self._end_pass()

    def make_ready(self) -> None:
        """See to it that the next step is at hand, here and on every rank: in the next pass, if this one is over."""
        while self.ahead is None or self._answer is not None:
            if self.ahead is None:
                self._look_ahead()
            self.settle()

    def advance(self) -> list[Part]:
        """Move on by the step at hand, and return its parts; raise what fetching it has raised."""
        here = self.ahead
        assert here is not None, "a step is at hand"
        if isinstance(here, Exception):
            self.ahead = None
            raise here
        try:
            self._look_ahead()
        except BaseException:  # a KeyboardInterrupt: the step at hand, which nobody has seen, comes again
            self.stop()
            raise
        self.step += 1
        self.to_drop = max(0, self.to_drop - 1)
        states = {unit.slots.start: part.state for unit, part in zip(self._reader.units, here, strict=True)}
        known = {slot: state for slot, state in states.items() if state is not None}
        self.states = known if len(known) == len(states) else None
        return here

    def _look_ahead(self) -> None:
        """Fetch the step that comes next, and start to ask whether it is more than some rank has."""
        try:
            if not self._fetching.started:
                self._start()
            self.ahead = self._fetching.take(self._requests_a_step)[: len(self._reader.units)]
        except Exception as error:  # noqa: BLE001 - it is raised when its step's turn comes; the one before is sound
            self.ahead = error
        ended = isinstance(self.ahead, list) and any(part.batches is None for part in self.ahead)
        self._answer = self._ranks.start_any(ended)

    def _start(self) -> None:
        if self.step and self.states is None:
            self.step, self.to_drop = 0, self.step  # there is only the pass's beginning to go by
        self._reader.begin(self.epoch, self.states or {})
        self._fetching.start(Requests(len(self._reader.units), self._requests_a_step, self.step, self.to_drop))

    def _end_pass(self) -> None:
        parts = self.ahead if isinstance(self.ahead, list) else []
        left = {u.slots.start: p.num_left for u, p in zip(self._reader.units, parts, strict=False) if p.batches is None}
        epoch, length = self.epoch, self.step
        self.stop()
        if length == 0:
            raise DataError(self._reader.too_short(epoch, by_slot(self._ranks, left) or {}))
        if length <= self.must_pass and not self._accept_other_data:
            if self.states is not None:
                self.distrust_states()
                return
            raise DataError(
                f"the training data has changed since the run began: pass {epoch} ends after {length} steps, expected "
                f"more than {self.must_pass}, which it had; restore it, start anew with --fresh, or go on all the "
                "same with accept_other_data=true"
            )
        logger.info("pass %d of the training data is over after %d steps; left over here: %s", epoch, length, left)
        began = None if self.began is None else self.began + length
        self.go_to(epoch + 1, 0, began=began, to_drop=self.to_drop)


def by_slot(ranks: Ranks, mine: dict[int, T] | None) -> dict[int, T] | None:
    """Return what all ranks know of their slots; None where one has nothing. A collective."""
    by_rank: list[dict[int, T] | None] = ranks.all_gather(mine)
    known = [part for part in by_rank if part is not None]
    return {slot: x for part in known for slot, x in part.items()} if len(known) == len(by_rank) else None
