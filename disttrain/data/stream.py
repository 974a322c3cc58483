"""A stream as training data: each slot's microbatches in the stream's own order, and resuming inside it.

*Contract*: the slot is the atom, so neither ranks nor workers change what a step holds. Over a dataset with
`shard(num_shards, index)` slot s reads shard s of `num_slots`, `global_batch_size // num_slots` samples a step; over
any other, step i of a pass is the samples [i*B, (i+1)*B) of the whole stream, slot s the s-th part. A pass ends with
the last step for which every slot had its samples, on all ranks alike, and the next begins (`set_epoch` is called).

Passes have no length that is known beforehand. So a position is a pass and a step in it, or a number of steps counted
over all passes, and how the one follows from the other shows only in the reading.

*Errors*: a pass without a single step, or one that has become shorter than the run has read: DataError on every rank.

*Cost*: a step is fetched one ahead, so that its step's end is known with it; and each step starts one question to the
other ranks, answered while the step computes. Workers start anew with each pass.
"""

import itertools
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.context import BaseContext
from typing import Any, Protocol

from disttrain.data.fetching import Fetching
from disttrain.data.loader import StepBatch
from disttrain.data.sampler import check_sizes
from disttrain.data.stream_reader import Part, Requests, State, StreamReader
from disttrain.errors import DataError

logger = logging.getLogger(__name__)


class Ranks(Protocol):
    """The part of a `Backend` by which ranks agree where a pass ends; None in its place means one process alone."""

    def start_any(self, flag: bool, /) -> Callable[[], bool]:
        """Start to ask whether any rank says True; the function returned waits for the answer."""

    def all_gather(self, value: Any, /) -> Any:
        """Return every rank's plain object, in the order of the ranks."""


class _NoOthers:
    def start_any(self, flag: bool, /) -> Callable[[], bool]:
        return lambda: flag

    def all_gather(self, value: Any, /) -> Any:
        return [value]


class StreamLoader:
    """Yields a `StepBatch` a step, for the rest of the current pass over `dataset`; the next `iter` is the next pass.

    `epoch` and `step` are the position: the step that comes next. The dataset is any object whose `iter` begins a pass
    from its start. It may have

    - `shard(num_shards, index)`, which returns an iterable over a disjoint part (Hugging Face's convention): then each
      rank reads its own slots' parts only. Without, every rank reads everything and keeps its slots' samples;
    - `state_dict()` and `load_state_dict(state)`, on it or on its iterator (torchdata's convention), the state made of
      plain values and tensors: then a checkpoint is gone on from at once. Without, what lies before is read again and
      dropped. A state that was loaded holds for the `iter` that follows;
    - `set_epoch(epoch)`, called before each pass: an order of its own must be a function of that and of the state.

    It must not shard itself by its rank or keep a random generator that has a history: what it gave would depend on
    how many read it, which breaks the promise. `torch.utils.data.get_worker_info()` is None where it is read, so that
    one which asks it reads all it was given.
    """

    def __init__(
        self,
        dataset: Any,
        global_batch_size: int,
        num_slots: int = 1,
        *,
        seed: int = 0,
        slots: range | None = None,
        ranks: Ranks | None = None,
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        accept_other_data: bool = False,
        pin_memory: bool = False,
        prefetch_factor: int | None = None,
        multiprocessing_context: str | BaseContext | None = None,
    ) -> None:
        check_sizes(global_batch_size, global_batch_size, num_slots)
        self.slots = range(num_slots) if slots is None else slots
        self.num_slots = num_slots
        self.accept_other_data = accept_other_data
        self._reader = StreamReader(dataset, global_batch_size // num_slots, num_slots, self.slots, seed, collate_fn)
        self.num_workers = min(num_workers, len(self._reader.units))
        self._num_workers_given = num_workers
        self._ranks: Ranks = _NoOthers() if ranks is None else ranks
        self._fetching = Fetching(self._reader, self.num_workers, pin_memory, prefetch_factor, multiprocessing_context)
        self._epoch = self._step = self._to_drop = 0
        self._pass_began: int | None = 0
        self._must_pass = 0
        self._states: dict[int, State] | None = None
        self._ahead: list[Part] | Exception | None = None
        self._answer: Callable[[], bool] | None = None
        # Runs when the loader is collected and, before multiprocessing ends what is left, at the interpreter's exit.
        weakref.finalize(self, self._fetching.stop)

    @property
    def sharded(self) -> bool:
        """Whether each slot reads a shard of its own."""
        return self._reader.sharded

    @property
    def epoch(self) -> int:
        """The pass of the step that comes next, from 0."""
        self._settle()
        return self._epoch

    @property
    def step(self) -> int:
        """The step that comes next, from 0 in each pass."""
        self._settle()
        return self._step + self._to_drop

    @property
    def iteration(self) -> int | None:
        """Steps that lie before the position, over all passes; None where that is not known."""
        step = self.step
        return None if self._pass_began is None else self._pass_began + step

    @property
    def notes(self) -> list[str]:
        """What a person should know of how this data is read."""
        notes = []
        if not self.sharded and len(self.slots) < self.num_slots:
            notes.append(
                "the training data is a stream without shard(num_shards, index), so each rank reads all of it and "
                "keeps its own samples; with that method each would read its own part only"
            )
        if self.num_workers < self._num_workers_given:
            why = "one for each slot of a rank" if self.sharded else "as a stream without shard() is read by one"
            notes.append(f"num_workers={self._num_workers_given}: only {self.num_workers} a rank can be of use, {why}")
        return notes

    def seek(self, epoch: int, step: int) -> None:
        """Go to `step` steps behind the beginning of pass `epoch`: beyond its end, into the passes that follow.

        Free where the loader stands already; elsewhere those steps are read and dropped.
        """
        if epoch < 0 or step < 0:
            raise ValueError(f"there is no epoch={epoch}, step={step}: both count from 0")
        if self._stands_at(epoch, step):
            return
        began = self._pass_began if epoch == self._epoch else None
        self._go_to(epoch, 0, pass_began=0 if epoch == 0 else began)
        self._to_drop = step

    def state_dict(self) -> dict[str, Any]:
        """Return the position, and every slot's state as of the last batch that was yielded. A collective."""
        self._settle()
        states = self._states
        if self.sharded:
            by_rank = self._ranks.all_gather(states)
            states = None if None in by_rank else {slot: state for part in by_rank for slot, state in part.items()}
        return {
            "epoch": self._epoch,
            "step": self._step + self._to_drop,
            "pass_began": self._pass_began,
            "sharded": self.sharded,
            "states": states,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go to where `state_dict` was called, on any number of ranks and workers of the same number of slots."""
        states = state_dict["states"]
        if state_dict["sharded"] != self.sharded:
            if not self.accept_other_data:
                raise DataError(
                    f"the training data {'has lost its' if state_dict['sharded'] else 'has now a'} shard(num_shards, "
                    "index), which gives each slot other samples; restore it, or start anew with --fresh"
                )
            states = None
        self._go_to(state_dict["epoch"], state_dict["step"], pass_began=state_dict["pass_began"])
        self._must_pass = self._step
        if states is not None:
            self._states = {unit.slots.start: states[unit.slots.start] for unit in self._reader.units}

    def catch_up(self, show: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Fetch the step that comes next, after what lies before it where there is no state to go by. A collective.

        `show(done, total)` hears how many steps are read and dropped, if there are any.
        """
        self._ready()
        total = self._to_drop
        if total:
            logger.warning(
                "%d steps of the training data are read and dropped, from the start of pass %d; "
                "a stream with state_dict() and load_state_dict(state) goes on at once",
                total,
                self._epoch,
            )
        while left := self._to_drop:
            show(total - left, total)
            self._advance()
            self._ready()
        if total:
            show(total, total)

    def close(self) -> None:
        """End the workers; the loader stays where it stands and starts new ones if it is used again."""
        self._stop()
        self._answer = None

    def __iter__(self) -> Iterator[StepBatch]:
        self.catch_up()
        epoch = self._epoch
        while self.epoch == epoch:
            yield self._next()

    def _next(self) -> StepBatch:
        self.catch_up()
        epoch, step = self._epoch, self._step
        parts = self._advance()
        microbatches = itertools.chain.from_iterable(part.batches or [] for part in parts)
        return StepBatch(microbatches, epoch=epoch, step=step, slots=self.slots)

    def _stands_at(self, epoch: int, step: int) -> bool:
        return (epoch, step) == (self.epoch, self.step) or (epoch == 0 and step == self.iteration)

    def _go_to(self, epoch: int, step: int, *, pass_began: int | None) -> None:
        self.close()
        self._epoch, self._step, self._to_drop, self._pass_began = epoch, step, 0, pass_began
        self._states, self._must_pass = None, 0

    def _stop(self) -> None:
        self._fetching.stop()
        self._reader.begin(self._epoch, {})  # lets go of what was open in this process
        self._ahead = None

    def _start(self) -> None:
        if self._step and self._states is None:
            # There is only the pass's beginning to go by.
            self._step, self._to_drop = 0, self._step
        self._reader.begin(self._epoch, self._states or {})
        self._fetching.start(Requests(len(self._reader.units), self._round, self._step, self._to_drop))

    @property
    def _round(self) -> int:
        """Requests a step: one for each unit, and as many more that each unit's always go to the same worker."""
        num_units = len(self._reader.units)
        return num_units if not self.num_workers else -(-num_units // self.num_workers) * self.num_workers

    def _ready(self) -> None:
        """See to it that the step that comes next is at hand, and on every rank; in the next pass, if this is over."""
        while self._ahead is None or self._answer is not None:
            if self._ahead is None:
                self._look_ahead()
            self._settle()

    def _look_ahead(self) -> None:
        """Fetch the step that comes next, and start to ask whether it is more than some rank has."""
        try:
            if not self._fetching.started:
                self._start()
            self._ahead = self._fetching.take(self._round)[: len(self._reader.units)]
        except Exception as error:  # noqa: BLE001 - it is raised when its step's turn comes; this one is sound
            self._ahead = error
        ended = isinstance(self._ahead, list) and any(part.batches is None for part in self._ahead)
        self._answer = self._ranks.start_any(ended)

    def _advance(self) -> list[Part]:
        """Move on by the step at hand, and return its parts; raise what fetching it has raised."""
        ahead, self._ahead = self._ahead, None
        assert ahead is not None, "a step is at hand"
        if isinstance(ahead, Exception):
            raise ahead
        self._step += 1
        self._to_drop = max(0, self._to_drop - 1)
        states = {unit.slots.start: part.state for unit, part in zip(self._reader.units, ahead, strict=True)}
        known = {slot: state for slot, state in states.items() if state is not None}
        self._states = known if len(known) == len(states) else None
        self._look_ahead()
        return ahead

    def _settle(self) -> None:
        """Hear whether every rank has the step at hand; if not, the pass is over."""
        if self._answer is not None:
            answer, self._answer = self._answer, None
            if answer():
                self._end_pass()

    def _end_pass(self) -> None:
        parts = self._ahead if isinstance(self._ahead, list) else []
        left = {u.slots.start: p.num_left for u, p in zip(self._reader.units, parts, strict=False) if p.batches is None}
        epoch, length = self._epoch, self._step
        self._stop()
        if length == 0:
            together = {slot: n for part in self._ranks.all_gather(left) for slot, n in part.items()}
            raise DataError(self._reader.too_short(together))
        if length <= self._must_pass and not self.accept_other_data:
            raise DataError(
                f"the training data has changed since the run began: pass {epoch} ends after {length} steps, expected "
                f"more than {self._must_pass}, which it had; restore it, start anew with --fresh, or go on all the "
                "same with accept_other_data=true"
            )
        logger.info("pass %d of the training data is over after %d steps; left over here: %s", epoch, length, left)
        self._epoch, self._step, self._states, self._must_pass = epoch + 1, 0, None, 0
        if self._pass_began is not None:
            self._pass_began += length
