"""Loads training data from a stream: each slot's microbatches in the stream's own order, resumable at any step.

*Contract*: the slot is the atom, so the content of a step does not depend on ranks or workers. If the dataset has
`shard(num_shards, index)`, slot s reads shard s of `num_slots`, and takes `global_batch_size // num_slots` samples in
each step. Otherwise, with a global batch size of B, step i of a pass is the samples [i*B, (i+1)*B) of the whole stream,
and slot s is the s-th part of them. A pass ends with the last step for which every slot has its samples, at the same
step on all ranks. Then the next pass begins, after a call of `set_epoch`.

The length of a pass is not known beforehand. So there are two forms of a position: a pass and a step in it, or a number
of steps over all passes. One form follows from the other only by reading.

*Errors*: DataError on every rank for a pass without a step, and for data that has changed since the run was saved.

*Cost*: each step is fetched one step ahead, so the end of a pass is known with its last step. Each step starts one
question to the other ranks, which is answered while the step computes. The workers restart with each pass.
"""

import functools
import itertools
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from disttrain.data.dataset import LoadingError
from disttrain.data.fetching import Fetching
from disttrain.data.loader import StepBatch
from disttrain.data.passes import Passes, gather_by_slot
from disttrain.data.probes import Digest
from disttrain.data.ranks import OneRank, StreamRanks
from disttrain.data.sampler import check_sizes
from disttrain.data.stream_reader import Requests, StreamReader
from disttrain.errors import DataError

logger = logging.getLogger(__name__)


class StreamLoader:
    """Yields a `StepBatch` for each step of the rest of the current pass. The next `iter` is the next pass.

    `epoch` and `step` are the position: the next step. The dataset is any object whose `iter` begins a pass from its
    start. It may also have:

    - `shard(num_shards, index)` returns an iterable over a disjoint part (Hugging Face's convention). Then each rank
      reads only the parts of its own slots. Otherwise every rank reads everything and keeps its slots' samples.
    - `state_dict()` and `load_state_dict(state)`, on the dataset or on its iterator (torchdata's convention). The state
      consists of plain values and tensors, and a loaded state is valid for the next `iter`. Then a run resumes at once.
      Otherwise the pass is read again from its start, up to the position, and these samples are dropped.
    - `set_epoch(epoch)` is called before each pass. An order of the dataset's own must depend only on the epoch and on
      the state.

    The dataset must not shard itself by its rank, and must not keep a random generator that has a history: the samples
    would depend on the number of readers, and the promise of equal bits would break.
    `torch.utils.data.get_worker_info()` is None in the reading process, so a dataset that uses it reads its whole part.

    With `digest(microbatch)`, a checkpoint holds digests of the samples that come next. A resumed loader compares them.
    A state that gives other samples is not used. If the samples still differ, that is an error, except with
    `accept_other_data`.
    """

    def __init__(
        self,
        dataset: Any,
        global_batch_size: int,
        num_slots: int = 1,
        *,
        seed: int = 0,
        slots: range | None = None,
        ranks: StreamRanks | None = None,
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        digest: Callable[[Any], str] | None = None,
        accept_other_data: bool = False,
        pin_memory: bool = False,
    ) -> None:
        check_sizes(global_batch_size, global_batch_size, num_slots)
        self.slots = range(num_slots) if slots is None else slots
        self.num_slots = num_slots
        self.accept_other_data = accept_other_data
        reader = StreamReader(dataset, global_batch_size // num_slots, num_slots, self.slots, seed, collate_fn)
        self.sharded = reader.sharded
        """True if each slot reads a shard of its own."""
        self.num_workers = min(num_workers, len(reader.units))
        self._num_workers_given = num_workers
        self._first_slots = [unit.slots.start for unit in reader.units]
        self._ranks: StreamRanks = OneRank() if ranks is None else ranks
        self._digest = digest
        self._seed = seed
        self._dataset = dataset
        self._fetching = fetching = Fetching(reader, self.num_workers, pin_memory)
        self._passes = Passes(reader, fetching, self.num_workers, self._ranks, accept_other_data=accept_other_data)
        self._expected: dict[int, str] | None = None
        # Runs when the loader is collected, and at the interpreter's exit before multiprocessing ends its children.
        weakref.finalize(self, fetching.stop)

    @property
    def epoch(self) -> int:
        """The pass of the next step, from 0."""
        self._passes.settle()
        return self._passes.epoch

    @property
    def step(self) -> int:
        """The next step, from 0 in each pass."""
        self._passes.settle()
        return self._passes.step + self._passes.to_drop

    @property
    def iteration(self) -> int | None:
        """The number of steps before the position, over all passes; None if unknown."""
        step, steps_before = self.step, self._passes.steps_before
        return None if steps_before is None else steps_before + step

    @property
    def loading_s(self) -> float:
        """The time that this rank has spent so far on reading data, or on waiting for its workers."""
        return self._fetching.took_s

    @property
    def notes(self) -> list[str]:
        """Facts about the reading of this data that a person should know."""
        notes = []
        if not self.sharded and len(self.slots) < self.num_slots:
            notes.append(
                "the training data is a stream without shard(num_shards, index), so each rank reads all of it and "
                "keeps its own samples; with that method each rank would read only its own part"
            )
        if self.num_workers < self._num_workers_given:
            reason = "one for each slot" if self.sharded else "since one process reads a stream without shard()"
            notes.append(
                f"num_workers={self._num_workers_given}: each rank uses only {self.num_workers} of them, {reason}"
            )
        return notes

    def load_probes(self, count: int, digest: Digest) -> list[str]:
        """Return the digests of the first `count` samples of slot 0's stream, or fewer, which any rank can read.

        They are read by a reader of their own, with one sample for each slot in a step. If the stream raises an
        exception, the last of them is the exception's type.
        """
        reader = StreamReader(self._dataset, 1, self.num_slots, range(1), self._seed, functools.partial(_only, digest))
        fetching = Fetching(reader, min(self.num_workers, 1), pin_memory=False)
        digests: list[str] = []
        try:
            fetching.start(Requests(1, 1, first_step=0, num_dropped=0))
            while len(digests) < count and (batches := fetching.take(1)[0].batches) is not None:
                digests += batches
        except LoadingError as error:
            digests.append(f"raised {type(error.__cause__ or error).__name__}")
        finally:
            fetching.stop()
            reader.begin(0, {})
        return digests

    def seek(self, epoch: int, step: int) -> None:
        """Set the position to `step` steps after the start of pass `epoch`; it may be in a later pass.

        Seeking the present position is free. For another one the steps before it are read and dropped.
        """
        if epoch < 0 or step < 0:
            raise ValueError(f"there is no epoch={epoch}, step={step}: both count from 0")
        if (epoch, step) == (self.epoch, self.step) or (epoch == 0 and step == self.iteration):
            return
        steps_before = self._passes.steps_before if epoch == self.epoch else None
        self._passes.go_to(epoch, 0, steps_before=0 if epoch == 0 else steps_before, to_drop=step)
        self._expected = None

    def state_dict(self) -> dict[str, Any]:
        """Return the position, the states of all slots there, and the digests of the next step. A collective."""
        return {
            "epoch": self.epoch,
            "step": self.step,
            "pass_began": self._passes.steps_before,
            "sharded": self.sharded,
            "states": gather_by_slot(self._ranks, self._passes.states),
            "next": gather_by_slot(self._ranks, self._digests()),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Set the position at which `state_dict` was called, on any number of ranks and workers, with as many slots."""
        states, digests = state_dict["states"], state_dict["next"]
        if state_dict["sharded"] != self.sharded:
            if not self.accept_other_data:
                raise DataError(
                    f"the training data {'has lost its' if state_dict['sharded'] else 'has now a'} shard(num_shards, "
                    "index), which gives each slot other samples; restore the data, or start a new run with --fresh"
                )
            states = None
        self._passes.go_to(state_dict["epoch"], state_dict["step"], steps_before=state_dict["pass_began"])
        self._passes.known_step = state_dict["step"]
        if states is not None:
            self._passes.states = {slot: states[slot] for slot in self._first_slots}
        self._expected = None
        if digests is not None and not self.accept_other_data:
            self._expected = {slot: digests[slot] for slot in self.slots}

    def catch_up(self, show: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Fetch the next step. Without states, read and drop the steps before it first. A collective.

        `show(done, total)` gets the number of steps dropped so far, and of all steps to drop. After `load_state_dict`
        the samples of the next step are compared with those that came next then. If they differ, the states are not
        used, and the pass is read from its start.
        """
        self._drop(show)
        if self._expected is None:
            return
        changed = self._changed_slots()
        if changed and self._passes.states is not None:
            self._passes.discard_states()
            self._drop(show)
            changed = self._changed_slots()
        if changed:
            raise DataError(
                f"the training data has changed since the run began: step {self.step} of pass {self.epoch} has other "
                f"samples than before, in slot {changed[0]}; restore the data (a stream must give the same samples "
                "each time it is read), start a new run with --fresh, or continue with other data by "
                "accept_other_data=true"
            )
        self._expected = None

    def close(self) -> None:
        """End the workers. The position stays, and the loader starts new workers if it is used again."""
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
                "a stream with state_dict() and load_state_dict(state) resumes at once",
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
        """Return the digests of this rank's microbatches in the step ahead; None if it is not fetched, or no digest."""
        ahead = self._passes.ahead
        if self._digest is None or not isinstance(ahead, list) or self._passes.to_drop:
            return None
        microbatches = [batch for part in ahead for batch in part.batches or []]
        return {slot: self._digest(batch) for slot, batch in zip(self.slots, microbatches, strict=True)}

    def _changed_slots(self) -> list[int]:
        """Return the slots of all ranks whose samples in the step ahead differ from the expected ones."""
        actual, expected = self._digests(), self._expected
        mine = [s for s in self.slots if actual is not None and expected is not None and actual[s] != expected[s]]
        return [slot for slots in self._ranks.all_gather(mine) for slot in slots]


def _only(digest: Digest, samples: list[Any]) -> str:
    """Return the digest of the only sample of a batch, as a collate function."""
    (sample,) = samples
    return digest(sample)
