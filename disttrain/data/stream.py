"""A stream as training data: each slot's microbatches in the stream's own order, and resuming inside it.

*Contract*: the slot is the atom, so neither ranks nor workers change what a step holds. Over a dataset with
`shard(num_shards, index)` slot s reads shard s of `num_slots`, `global_batch_size // num_slots` samples a step; over
any other, step i of a pass is the samples [i*B, (i+1)*B) of the whole stream, slot s the s-th part. A pass ends with
the last step for which every slot had its samples, on all ranks alike, and the next begins (`set_epoch` is called).

Passes have no length that is known beforehand. So a position is a pass and a step in it, or a number of steps counted
over all passes, and how the one follows from the other shows only in the reading.

*Errors*: DataError on every rank: a pass without a step, or data that is not what it was when the run was saved.

*Cost*: a step is fetched one ahead, so that a pass's end is known with its last step; and each step starts one
question to the other ranks, answered while it computes. Workers start anew with each pass.
"""

import itertools
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.context import BaseContext
from typing import Any

from disttrain.data.fetching import Fetching
from disttrain.data.loader import StepBatch
from disttrain.data.passes import Passes, by_slot
from disttrain.data.ranks import NoOthers, Ranks
from disttrain.data.sampler import check_sizes
from disttrain.data.stream_reader import StreamReader
from disttrain.errors import DataError

logger = logging.getLogger(__name__)


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

    `digest(microbatch)` lets a checkpoint say what comes next: going on from it, other samples are an error (not with
    `accept_other_data`), and a state that does not bring them back is not used.
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
        digest: Callable[[Any], str] | None = None,
        accept_other_data: bool = False,
        pin_memory: bool = False,
        prefetch_factor: int | None = None,
        multiprocessing_context: str | BaseContext | None = None,
    ) -> None:
        check_sizes(global_batch_size, global_batch_size, num_slots)
        self.slots = range(num_slots) if slots is None else slots
        self.num_slots = num_slots
        self.accept_other_data = accept_other_data
        reader = StreamReader(dataset, global_batch_size // num_slots, num_slots, self.slots, seed, collate_fn)
        self.sharded = reader.sharded
        """Whether each slot reads a shard of its own."""
        self.num_workers = min(num_workers, len(reader.units))
        self._num_workers_given = num_workers
        self._first_slots = [unit.slots.start for unit in reader.units]
        self._ranks: Ranks = NoOthers() if ranks is None else ranks
        self._digest = digest
        self._fetching = fetching = Fetching(
            reader, self.num_workers, pin_memory, prefetch_factor, multiprocessing_context
        )
        self._passes = Passes(reader, fetching, self.num_workers, self._ranks, accept_other_data=accept_other_data)
        self._expected: dict[int, str] | None = None
        # Runs when the loader is collected and, before multiprocessing ends what is left, at the interpreter's exit.
        weakref.finalize(self, fetching.stop)

    @property
    def epoch(self) -> int:
        """The pass of the step that comes next, from 0."""
        self._passes.settle()
        return self._passes.epoch

    @property
    def step(self) -> int:
        """The step that comes next, from 0 in each pass."""
        self._passes.settle()
        return self._passes.step + self._passes.to_drop

    @property
    def iteration(self) -> int | None:
        """Steps that lie before the position, over all passes; None where that is not known."""
        step, began = self.step, self._passes.began
        return None if began is None else began + step

    @property
    def loading_s(self) -> float:
        """Time in which this rank read data, or waited for its workers to, so far."""
        return self._fetching.took_s

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
        if (epoch, step) == (self.epoch, self.step) or (epoch == 0 and step == self.iteration):
            return
        began = self._passes.began if epoch == self.epoch else None
        self._passes.go_to(epoch, 0, began=0 if epoch == 0 else began, to_drop=step)
        self._expected = None

    def state_dict(self) -> dict[str, Any]:
        """Return the position, every slot's state there, and digests of what comes next. A collective."""
        return {
            "epoch": self.epoch,
            "step": self.step,
            "pass_began": self._passes.began,
            "sharded": self.sharded,
            "states": by_slot(self._ranks, self._passes.states),
            "next": by_slot(self._ranks, self._digests()),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go to where `state_dict` was called, on any number of ranks and workers, with as many slots."""
        states, following = state_dict["states"], state_dict["next"]
        if state_dict["sharded"] != self.sharded:
            if not self.accept_other_data:
                raise DataError(
                    f"the training data {'has lost its' if state_dict['sharded'] else 'has now a'} shard(num_shards, "
                    "index), which gives each slot other samples; restore it, or start anew with --fresh"
                )
            states = None
        self._passes.go_to(state_dict["epoch"], state_dict["step"], began=state_dict["pass_began"])
        self._passes.must_pass = state_dict["step"]
        if states is not None:
            self._passes.states = {slot: states[slot] for slot in self._first_slots}
        self._expected = None
        if following is not None and not self.accept_other_data:
            self._expected = {slot: following[slot] for slot in self.slots}

    def catch_up(self, show: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Fetch the step that comes next, after what lies before it where there is no state to go by. A collective.

        `show(done, total)` hears how many steps are read and dropped, if there are any. After `load_state_dict` it is
        looked whether what comes next is what came next then; a state that does not bring it back is not used.
        """
        self._drop(show)
        if self._expected is None:
            return
        others = self._others()
        if others and self._passes.states is not None:
            self._passes.distrust_states()
            self._drop(show)
            others = self._others()
        if others:
            raise DataError(
                f"the training data has changed since the run began: step {self.step} of pass {self.epoch} has other "
                f"samples than it had, in slot {others[0]}; restore it (a stream must give the same samples whenever "
                "it is read), start anew with --fresh, or go on all the same with accept_other_data=true"
            )
        self._expected = None

    def close(self) -> None:
        """End the workers; the loader stays where it stands and starts new ones if it is used again."""
        self._passes.stop()

    def __iter__(self) -> Iterator[StepBatch]:
        self.catch_up()
        epoch = self.epoch
        while self.epoch == epoch:
            yield self._next()

    def _next(self) -> StepBatch:
        self.catch_up()
        epoch, step = self._passes.epoch, self._passes.step
        parts = self._passes.advance()
        microbatches = itertools.chain.from_iterable(part.batches or [] for part in parts)
        return StepBatch(microbatches, epoch=epoch, step=step, slots=self.slots)

    def _drop(self, show: Callable[[int, int], None]) -> None:
        passes = self._passes
        passes.make_ready()
        total = passes.to_drop
        if total:
            logger.warning(
                "%d steps of the training data are read and dropped, from the start of pass %d; "
                "a stream with state_dict() and load_state_dict(state) goes on at once",
                total,
                passes.epoch,
            )
        while left := passes.to_drop:
            show(total - left, total)
            passes.advance()
            passes.make_ready()
        if total:
            show(total, total)

    def _digests(self) -> dict[int, str] | None:
        """Return the digests of this rank's microbatches of the step at hand; None where it is not known."""
        ahead = self._passes.ahead
        if self._digest is None or not isinstance(ahead, list) or self._passes.to_drop:
            return None
        microbatches = [batch for part in ahead for batch in part.batches or []]
        return {slot: self._digest(batch) for slot, batch in zip(self.slots, microbatches, strict=True)}

    def _others(self) -> list[int]:
        """Return the slots, over all ranks, whose samples at hand are others than expected."""
        found, expected = self._digests(), self._expected
        mine = [s for s in self.slots if found is not None and expected is not None and found[s] != expected[s]]
        return [slot for others in self._ranks.all_gather(mine) for slot in others]
